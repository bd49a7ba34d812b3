"""The engine protocol: everything the stages may ask of a model runtime.

An engine holds a frozen model and a table of published vectors. A request names the vector and the
version it wants; an engine that does not hold exactly that raises `SteeringError`. It never answers
unsteered in place of steered, and every steered output carries a receipt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from spo.errors import SteeringError, UnpublishedError
from spo.records import (
    GenerateRequest,
    Positions,
    Prompt,
    Rollout,
    SteeringReceipt,
    SteeringSpec,
)
from spo.vector import SteeringVector


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What model an engine holds."""

    model_id: str
    """Hub id or folder name; the same string that vectors carry."""
    model_revision: str
    hidden_size: int
    num_layers: int
    """Number of decoder blocks of the language model."""
    dtype: str
    """Computation type, e.g. "bfloat16"."""
    backend: str
    """"hf", "vllm" or "fake"."""
    version: str
    """Version of the backend library, for reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobRequest:
    """Score given answer tokens under the model, steered or not."""

    request_id: str
    prompt: Prompt
    token_ids: tuple[int, ...]
    """Tokens of the answer."""
    steering: SteeringSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureRequest:
    """Read pooled activations of the *unsteered* model."""

    request_id: str
    prompt: Prompt
    layers: tuple[int, ...]
    """Zero-based decoder blocks; computation may stop after the highest."""
    positions: Positions
    """Tokens to pool over. The first token of the sequence is always left out (attention sink)."""
    token_ids: tuple[int, ...] = ()
    """Answer tokens that follow the prompt, for pooling over GENERATED."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Capture:
    """Pooled activations of one sequence."""

    request_id: str
    mean: NDArray[np.float32]
    """(layers, hidden) mean activation over the pooled positions."""
    norm: NDArray[np.float32]
    """(layers,) median over the pooled positions of the hidden norm."""
    tokens: int
    """Number of pooled positions."""


class Sampler(Protocol):
    """The part of an engine that a pool of engines offers as well."""

    @property
    def info(self) -> EngineInfo: ...

    def publish(self, name: str, vector: SteeringVector, version: int) -> str:
        """Install a vector under a name and version; returns its sha256 as held by the engine.

        The same (name, version) with the same content may be published again; with other content
        it raises SteeringError. Older versions may be dropped once no request uses them.
        """
        ...

    def retire(self, name: str, version: int | None = None) -> None:
        """Drop one version, or all versions, of a vector.

        Raises:
            UnpublishedError: that version is not held. All versions of an unknown name is no error.
            SteeringError: a request in flight uses it.
        """
        ...

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Rollout]:
        """Answer requests, in order. Steered, differently steered and unsteered ones may mix."""
        ...

    def logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float]]:
        """Natural-log probability of each answer token, in order."""
        ...


class Engine(Sampler, Protocol):
    """A frozen model with steering. Implementations: `HfEngine`, `VllmEngine`, `FakeEngine`."""

    concurrent: bool
    """Whether several threads may call the engine at once; the others take one call at a time."""

    def alive(self) -> bool:
        """Whether the processes behind the engine still run; asks nothing of the model."""
        ...

    def capture(self, requests: Sequence[CaptureRequest]) -> list[Capture]:
        """Pooled activations, in order."""
        ...

    def close(self) -> None:
        """Give the model's memory and processes back."""
        ...


KEPT_VERSIONS = 4
"""Of each name, the latest versions that an engine or a pool holds."""


class VectorTable:
    """Published vectors of one engine: the last few versions of each name."""

    def __init__(self, keep_versions: int = KEPT_VERSIONS) -> None:
        self._keep = keep_versions
        self._vectors: dict[str, dict[int, SteeringVector]] = {}

    def put(self, name: str, vector: SteeringVector, version: int) -> None:
        """Store a version; a version once stored never changes its content."""
        versions = self._vectors.setdefault(name, {})
        held = versions.get(version)
        if held is not None and held.sha256 != vector.sha256:
            raise SteeringError(
                f"vector {name!r} version {version} is already published with content "
                f"{held.sha256[:12]}, got {vector.sha256[:12]}; publish changes as a new version"
            )
        versions[version] = vector
        for old in sorted(versions)[: -self._keep]:
            del versions[old]

    def retire(self, name: str, version: int | None = None) -> None:
        """Drop one version, or all versions, of a name; see `Sampler.retire`."""
        versions = self._vectors.get(name, {})
        if version is not None and version not in versions:
            raise UnpublishedError(
                f"vector {name!r} version {version} is not held; it holds {sorted(versions)}"
            )
        for number in [version] if version is not None else list(versions):
            del versions[number]
        if not versions:
            self._vectors.pop(name, None)

    def get(self, spec: SteeringSpec) -> SteeringVector:
        """The vector that a request asks for, or SteeringError naming what is there."""
        vector = self._vectors.get(spec.vector, {}).get(spec.version)
        if vector is None:
            held = {name: sorted(versions) for name, versions in self._vectors.items()}
            raise UnpublishedError(
                f"vector {spec.vector!r} version {spec.version} is not published in this engine "
                f"(it holds {held}); publish it first. Nothing was generated"
            )
        return vector


def receipt_for(spec: SteeringSpec, vector: SteeringVector) -> SteeringReceipt:
    """The receipt of a request steered by `vector` as `spec` asks."""
    return SteeringReceipt(
        vector=spec.vector,
        version=spec.version,
        sha256=vector.sha256,
        coefficient=spec.coefficient,
        operator=spec.operator,
        positions=spec.positions,
        layers=vector.layers,
    )


def confirm(
    receipt: SteeringReceipt | None, spec: SteeringSpec | None, sha256: str, *, answer: str
) -> None:
    """Raise unless an answer was steered exactly as asked: the one check of a receipt.

    Args:
        receipt: what the engine says it applied.
        spec: what was asked for; None asks for the unsteered model.
        sha256: content that the vector must have; "" for the unsteered model.
        answer: id of the answer, for the message.

    Raises:
        SteeringError: the two differ in anything, or no content to expect was given.
    """
    if spec is None and receipt is None and not sha256:
        return
    wanted = None if spec is None else _facts(spec, sha256)
    applied = None if receipt is None else _facts(receipt, receipt.sha256)
    same = wanted is not None and applied is not None and _same(wanted, applied)
    if not sha256 or not same:
        raise SteeringError(
            f"answer {answer!r}: asked for {_words(wanted, sha256)}, the engine confirms "
            f"{_words(applied, '')}; the answer is not used. Publish the vector and ask again"
        )


def _facts(steering: SteeringSpec | SteeringReceipt, sha256: str) -> dict[str, Any]:
    """What a spec and a receipt have in common, with the vector's content."""
    names = ("vector", "version", "coefficient", "operator", "positions")
    return {"sha256": sha256, **{name: getattr(steering, name) for name in names}}


def _same(wanted: dict[str, Any], applied: dict[str, Any]) -> bool:
    """Value by value: comparing the whole would let a NaN pass for itself."""
    return all(value == applied[name] for name, value in wanted.items())


def _words(facts: dict[str, Any] | None, sha256: str) -> str:
    if facts is None:
        return "no steering" + (f" with content {sha256[:12]}" if sha256 else "")
    content = str(facts["sha256"])[:12] or "unknown"
    return (
        f"vector {facts['vector']!r} version {facts['version']} with content {content}, "
        f"coefficient {facts['coefficient']}, {facts['operator']} on {facts['positions']}"
    )
