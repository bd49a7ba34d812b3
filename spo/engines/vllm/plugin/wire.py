"""What crosses from the engine's caller to vLLM's workers. No torch, no vLLM.

* `PluginConfig` travels in `additional_config["spo_steering"]`, once, at start.
* `RequestSteering` travels in `SamplingParams.extra_args["spo"]` with every request.

Both are plain JSON types on the wire and are checked again on arrival.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from spo.errors import SteeringError
from spo.records import Operator, Positions

CONFIG_KEY = "spo_steering"
"""Key in vLLM's `additional_config`."""
REQUEST_KEY = "spo"
"""Key in `SamplingParams.extra_args`."""
OPERATOR_CODES: dict[Operator, int] = {
    Operator.ADD: 0,
    Operator.PROJECT: 1,
    Operator.ADAPTIVE: 2,
    Operator.CLAMP: 3,
}


BODIES = ("kernel", "traced")
"""Forms of the operator; see `op`."""


def op_version() -> str:
    """Digest of the code that is compiled into the graph; part of vLLM's compile-cache key."""
    files = [Path(__file__).with_name(name).read_bytes() for name in ("op.py", "kernel.py")]
    return hashlib.sha256(b"".join(files)).hexdigest()[:12]


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginConfig:
    """What is compiled into the engine; all of it enters vLLM's compile-cache key.

    Raises:
        SteeringError: a count is out of range or an operator unknown.
    """

    slots: int = 8
    """Vectors (versions counted apart) that the engine can hold at once."""
    lanes: int = 1
    """Vectors that one request can stack."""
    operators: tuple[Operator, ...] = tuple(Operator)
    """Rules compiled in. With `add` alone the graph never reads the hidden state."""
    capture_rows: int = 0
    """Sequences whose activations can be pooled at once; 0 leaves capturing out of the graph."""
    body: str = "kernel"
    """Form of the operator, see `op`."""
    version: str = ""
    """Digest of the compiled code."""

    def __post_init__(self) -> None:
        for name, low, high in (("slots", 1, 4096), ("lanes", 1, 16), ("capture_rows", 0, 4096)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise SteeringError(
                    f"{name} must be a whole number in {low}..{high}, got {value!r}"
                )
        if self.body not in BODIES:
            raise SteeringError(f"body must be one of {list(BODIES)}, got {self.body!r}")
        if not self.operators:
            raise SteeringError(
                f"operators must name at least one of {_values(Operator)}, got none"
            )

    @property
    def gated(self) -> bool:
        """Whether an operator other than `add` is compiled in."""
        return set(self.operators) != {Operator.ADD}

    def to_wire(self) -> dict[str, Any]:
        """JSON form for `additional_config`."""
        return {**asdict(self), "operators": [operator.value for operator in self.operators]}

    @classmethod
    def from_wire(cls, data: object) -> PluginConfig:
        """Inverse of `to_wire`, refusing unknown keys."""
        known = set(cls.__dataclass_fields__)
        if not isinstance(data, Mapping) or not set(data) <= known:
            raise SteeringError(
                f"additional_config[{CONFIG_KEY!r}] must be a mapping with keys among "
                f"{sorted(known)}, got {data!r}"
            )
        fields = dict(data)
        names = fields.get("operators", [operator.value for operator in Operator])
        fields["operators"] = tuple(_member(Operator, "operator", name) for name in names)
        return cls(**fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One vector as one request uses it.

    Raises:
        SteeringError: the coefficient is not a finite number.
    """

    slot: int
    """Row of the engine's tables, 1..slots."""
    sha256: str
    """Content that the slot must hold; the worker refuses anything else."""
    coefficient: float
    operator: Operator
    positions: Positions

    def __post_init__(self) -> None:
        if not isfinite(self.coefficient):
            raise SteeringError(f"coefficient must be a finite number, got {self.coefficient}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSteering:
    """What one request asks of the workers."""

    key: str
    """Unique among live requests; the receipt is fetched by it."""
    lanes: tuple[Lane, ...] = ()
    capture_row: int = 0
    """Row of the capture pool, 1..capture_rows; 0 captures nothing."""
    capture_positions: Positions = Positions.ALL
    prompt_length: int = 0
    """Prompt tokens when answer tokens follow them in the same prompt; 0: all are prompt."""

    def to_wire(self) -> dict[str, Any]:
        """JSON form for `extra_args`."""
        return {
            "key": self.key,
            "lanes": [
                [lane.slot, lane.sha256, lane.coefficient, lane.operator, lane.positions]
                for lane in self.lanes
            ],
            "capture_row": self.capture_row,
            "capture_positions": self.capture_positions.value,
            "prompt_length": self.prompt_length,
        }

    @classmethod
    def from_wire(cls, data: Any) -> RequestSteering:
        """Inverse of `to_wire`; raises SteeringError on anything malformed."""
        try:
            lanes = tuple(
                Lane(
                    slot=int(slot),
                    sha256=str(sha256),
                    coefficient=float(coefficient),
                    operator=_member(Operator, "operator", operator),
                    positions=_member(Positions, "positions", positions),
                )
                for slot, sha256, coefficient, operator, positions in data["lanes"]
            )
            return cls(
                key=str(data["key"]),
                lanes=lanes,
                capture_row=int(data["capture_row"]),
                capture_positions=_member(Positions, "positions", data["capture_positions"]),
                prompt_length=int(data["prompt_length"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, SteeringError):
                raise
            raise SteeringError(
                f"extra_args[{REQUEST_KEY!r}] is malformed ({type(error).__name__}: {error}); it "
                "is written by RequestSteering.to_wire, not by hand"
            ) from error


def cache_salt(lanes: Sequence[Lane], own: str | None = None) -> str | None:
    """Prefix-cache salt of a request: two requests share cached blocks only if steered alike.

    Args:
        lanes: what steers the request; none for an unsteered one.
        own: the caller's own salt, kept as a further distinction.

    Returns:
        A hex digest, or `own` unchanged for an unsteered request.
    """
    if not lanes:
        return own
    parts = [
        [lane.sha256, float(lane.coefficient).hex(), lane.operator, lane.positions]
        for lane in lanes
    ]
    return hashlib.sha256(json.dumps([parts, own]).encode()).hexdigest()


def _values(kind: Any) -> list[str]:
    return [member.value for member in kind]


def _member(kind: Any, what: str, name: object) -> Any:
    try:
        return kind(name)
    except ValueError:
        raise SteeringError(
            f"{what} must be one of {_values(kind)}, got {name!r}; nothing was generated"
        ) from None
