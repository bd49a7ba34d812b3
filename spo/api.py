"""The library face: a model, its activations, vectors out of two lists, answers with and without.

Everything here is a short way to what the jobs use as well: engines, estimators, artifacts. A
steered answer is handed over only when the engine's receipt says that it was steered exactly as
asked. Nothing here needs Ray.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from spo import plugins
from spo.algorithms.combination import estimate
from spo.algorithms.estimators import Contrast
from spo.artifact import SteeringArtifact
from spo.config import DEFAULT_CACHE, EngineConfig, EstimateConfig, ModelConfig, SteeringConfig
from spo.config.load import validated
from spo.engines.base import Capture, Engine, EngineInfo, confirm
from spo.engines.factory import open_engine
from spo.errors import ConfigError, EngineError, SteeringError
from spo.items import Form, Item, member_of, prompts_of
from spo.records import (
    GenerateRequest,
    Positions,
    PromptKind,
    Rollout,
    Sampling,
    Side,
)
from spo.resolve import resolve_model
from spo.stage1.activations import (
    CALIBRATION,
    Activations,
    ContrastRow,
    digest_of_rows,
    steering_vector,
)
from spo.stage1.reading import capture_requests

_BACKENDS: dict[str, Literal["hf", "vllm"]] = {"transformers": "hf", "vllm": "vllm"}
_SOURCE = "lists"
_CALIBRATION_ROWS = 64
_READ_AT_ONCE = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reading:
    """Pooled activations of some texts."""

    layers: tuple[int, ...]
    """Zero-based decoder blocks."""
    values: NDArray[np.float32]
    """(texts, layers, hidden) mean over the positions that were asked for."""
    norms: NDArray[np.float32]
    """(texts, layers) typical hidden norm over these positions."""


def open_model(
    model: str | Path = "testbed",
    *,
    backend: str = "transformers",
    revision: str | None = None,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    gpu: bool | None = None,
    settings: EngineConfig | None = None,
) -> Model:
    """Load a frozen model.

    Args:
        model: hub id, folder in hub layout, or "testbed", the small one that comes with us.
        backend: "transformers", or "vllm" (offline; its own process on a GPU).
        revision: hub revision.
        dtype: computation type; "auto" is float32 on a CPU for Transformers, else the model's own.
        gpu: whether to use one; None: if there is one.
        settings: further settings of the engine, e.g. `EngineConfig(max_model_len=4096)`.

    Raises:
        ConfigError: the backend is unknown.
        EngineError: the model or the backend cannot be loaded.
        SteeringError: the engine started and steering cannot be shown to work.
    """
    if backend not in _BACKENDS:
        raise ConfigError(f"expected a backend of {sorted(_BACKENDS)}, got {backend!r}")
    on_gpu = torch.cuda.is_available() if gpu is None else gpu
    if backend == "transformers" and dtype == "auto" and on_gpu:
        dtype = "bfloat16"
    given = settings or EngineConfig()
    cards = float(on_gpu) * given.tensor_parallel_size
    tree = given.model_dump() | {
        "backend": _BACKENDS[backend],
        "dtype": dtype,
        "num_gpus": cards,
    }
    config = validated(EngineConfig, tree, None)
    cache = DEFAULT_CACHE.expanduser().absolute()
    found = resolve_model(ModelConfig(id=str(model), revision=revision), cache)
    try:
        engine = open_engine(found.path, found.revision, config, capture_rows=_READ_AT_ONCE)
    except ModuleNotFoundError as error:
        raise EngineError(
            f"backend {backend!r} needs the package {error.name!r}; install this project with its "
            "extra `cpu` or `gpu`"
        ) from error
    return Model(engine)


class Model:
    """A frozen model that can be read and steered. Closed by `close`, or at the end of a `with`.

    Args:
        engine: what holds the weights; `open_model` makes one.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._turn = threading.Lock()
        self._pictures = tempfile.TemporaryDirectory(prefix="spo-pictures-")
        self._folder = Path(self._pictures.name)

    @property
    def info(self) -> EngineInfo:
        """Name, revision, hidden size, number of decoder blocks, backend."""
        return self.engine.info

    def read(
        self,
        items: Sequence[Item],
        *,
        layers: Sequence[int] | None = None,
        positions: str = Positions.LAST_PROMPT,
        form: Form = "chat",
    ) -> Reading:
        """Pooled activations of the unsteered model; the first token is never pooled over.

        Args:
            items: texts, or (picture, text) pairs.
            layers: zero-based decoder blocks; None reads all.
            positions: which tokens, see `spo.Positions`.
            form: "chat" or "plain".
        """
        where = member_of(Positions, positions, "positions")
        rows = self._rows(items, form, Side.SAFE, where)
        blocks = self._layers(layers)
        values, norms = _stacked(self._capture(rows, blocks))
        return Reading(layers=blocks, values=values, norms=norms)

    def make_vector(
        self,
        harm: Sequence[Item],
        safe: Sequence[Item],
        *,
        method: str = "mean_difference",
        layers: Sequence[int] | None = None,
        read_at: str | None = None,
        form: Form = "chat",
        calibration: Sequence[Item] | None = None,
    ) -> SteeringArtifact:
        """A vector from two lists, as Stage I makes it from one source.

        Layers are weighed by how well they separate rows that no direction was fitted to.

        Args:
            harm: what the vector points towards; at least 10.
            safe: what it points away from; at least 10.
            method: an estimator, built in ("mean_difference", "pca", "linear_probe") or added.
            layers: decoder blocks to steer; None: the five that separate best.
            read_at: tokens to pool over, see `spo.Positions`; None: the last prompt token of a
                chat, all text of plain text.
            form: "chat" or "plain".
            calibration: benign items whose answers give the mean norms and the gate's offset;
                None takes the first 64 of `safe`.
        """
        plugins.find(plugins.ESTIMATORS, method)
        usual = Positions.LAST_PROMPT if form == "chat" else Positions.TEXT
        where = usual if read_at is None else member_of(Positions, read_at, "read_at")
        benign = safe[:_CALIBRATION_ROWS] if calibration is None else calibration
        rows = {
            "harm": self._rows(harm, form, Side.HARM, where),
            "safe": self._rows(safe, form, Side.SAFE, where),
            CALIBRATION: self._rows(benign, form, Side.SAFE, Positions.GENERATED, CALIBRATION),
        }
        blocks = self._layers(layers)
        config = EstimateConfig(method=method, layers=None if layers is None else blocks)
        found = self._activations(rows, blocks)
        result = estimate(found.contrasts, found.layers, found.num_layers, config)
        usual_steering = SteeringConfig()
        return SteeringArtifact(
            vector=steering_vector(found, result),
            operator=usual_steering.operator,
            coefficient=usual_steering.coefficient,
            positions=usual_steering.positions,
            method=method,
            data_sha256=found.data_sha256,
            config_digest=hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:16],
        )

    def answer(
        self,
        item: Item,
        steering: SteeringArtifact | None = None,
        *,
        coefficient: float | None = None,
        form: Form = "chat",
        max_tokens: int = 64,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Rollout:
        """One answer; see `answers`."""
        return self.answers(
            [item],
            steering,
            coefficient=coefficient,
            form=form,
            sampling=Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed),
        )[0]

    def answers(
        self,
        items: Sequence[Item],
        steering: SteeringArtifact | None = None,
        *,
        coefficient: float | None = None,
        form: Form = "chat",
        sampling: Sampling | None = None,
    ) -> list[Rollout]:
        """Answers in order, steered by an artifact or not at all.

        Args:
            items: texts, or (picture, text) pairs.
            steering: from `make_vector`, `load` or `pull`; `dataclasses.replace` changes its
                operator or positions. None asks the unsteered model.
            coefficient: strength; None takes the artifact's own.
            form: "chat" or "plain".
            sampling: None: greedy, 64 tokens.

        Raises:
            SteeringError: an answer cannot be shown to be steered as asked; none is handed over.
        """
        if steering is None and coefficient is not None:
            raise ConfigError("a coefficient goes with a steering artifact, got none; give both")
        name = "" if steering is None else f"api-{steering.vector.sha256[:24]}"
        spec = None if steering is None else steering.spec(name)
        if spec is not None and coefficient is not None:
            spec = replace(spec, coefficient=coefficient)
        prompts = prompts_of(items, form, PromptKind.BENIGN, self._folder, "asked")
        how = sampling or Sampling(max_tokens=64, temperature=0.0)
        run = uuid.uuid4().hex
        requests = [
            GenerateRequest(request_id=f"{run}/{i}", prompt=prompt, sampling=how, steering=spec)
            for i, prompt in enumerate(prompts)
        ]
        sha256 = "" if steering is None else steering.vector.sha256
        with self._turn:
            if steering is None:
                answers = self.engine.generate(requests)
            else:
                self.engine.publish(name, steering.vector, 0)
                try:
                    answers = self.engine.generate(requests)
                finally:  # an engine has few places, a notebook makes many vectors
                    self.engine.retire(name)
        if [a.request_id for a in answers] != [r.request_id for r in requests]:
            raise SteeringError(
                f"the engine's {len(answers)} answers are not those of the {len(requests)} "
                "requests, in order; none is handed over"
            )
        for answer in answers:
            confirm(answer.receipt, spec, sha256, answer=answer.request_id)
        return answers

    def close(self) -> None:
        """Give memory and processes back."""
        self._pictures.cleanup()
        self.engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _layers(self, layers: Sequence[int] | None) -> tuple[int, ...]:
        blocks = self.info.num_layers
        chosen = tuple(range(blocks)) if layers is None else tuple(sorted(set(layers)))
        if not chosen or chosen[0] < 0 or chosen[-1] >= blocks:
            raise ConfigError(
                f"layers must be decoder blocks 0..{blocks - 1} of {self.info.model_id!r}, got "
                f"{layers}"
            )
        return chosen

    def _rows(
        self,
        items: Sequence[Item],
        form: str,
        side: Side,
        positions: Positions,
        source: str = _SOURCE,
    ) -> list[ContrastRow]:
        kind = PromptKind.HARM if side is Side.HARM else PromptKind.BENIGN
        return [
            ContrastRow(source=source, side=side, prompt=prompt, positions=positions)
            for prompt in prompts_of(items, form, kind, self._folder, f"{source} {side.value}")
        ]

    def _activations(
        self, rows: dict[str, list[ContrastRow]], layers: tuple[int, ...]
    ) -> Activations:
        read = {name: _stacked(self._capture(part, layers)) for name, part in rows.items()}
        h0, norms = (part.mean(axis=0) for part in read[CALIBRATION])
        info = self.info
        return Activations(
            contrasts=(Contrast.of_arrays(_SOURCE, read["harm"][0], read["safe"][0]),),
            layers=layers,
            calibration=h0,
            mean_norms=norms,
            num_layers=info.num_layers,
            model_id=info.model_id,
            model_revision=info.model_revision,
            data_sha256=digest_of_rows(
                [_by_content(row) for part in rows.values() for row in part]
            ),
            quarantined=(),
        )

    def _capture(self, rows: Sequence[ContrastRow], layers: tuple[int, ...]) -> list[Capture]:
        with self._turn:
            return self.engine.capture(capture_requests(self.engine, rows, layers))


def _stacked(captures: Sequence[Capture]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(rows, layers, hidden) means and (rows, layers) norms."""
    return np.stack([c.mean for c in captures]), np.stack([c.norm for c in captures])


def _by_content(row: ContrastRow) -> ContrastRow:
    """The row with its picture's content in place of its path, which differs in every session."""
    if row.prompt.image is None:
        return row
    digest = hashlib.sha256(Path(row.prompt.image).read_bytes()).hexdigest()
    return replace(row, prompt=replace(row.prompt, image=digest))
