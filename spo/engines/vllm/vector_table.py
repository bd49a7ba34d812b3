"""The caller's side of steering: checks a request before the engine sees it, its receipt after.

No vLLM here: `VllmEngine` and the streaming engine share this, and unit tests need no engine.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from threading import Lock
from typing import Any

import numpy as np

from spo.algorithms.positions import Span, select_positions
from spo.engines.base import KEPT_VERSIONS, receipt_for
from spo.engines.vllm.plugin.wire import Lane, PluginConfig, RequestSteering
from spo.errors import SteeringError, UnpublishedError
from spo.records import Operator, Positions, SteeringReceipt, SteeringSpec
from spo.vector import SteeringVector


@dataclass(slots=True, kw_only=True, eq=False)
class VectorSlot:
    """One occupied slot."""

    number: int
    """1..slots; row 0 of the tables means "not steered"."""
    name: str
    version: int
    vector: SteeringVector
    users: int = 0
    """Requests in flight that read the slot."""
    ready: bool = False
    """False until every worker has confirmed the content."""


class SlotTable:
    """Allocation with reference counts. Not thread-safe: the engine holds its lock.

    Args:
        slots: how many vectors fit.
    """

    def __init__(self, slots: int) -> None:
        self._free = list(range(slots, 0, -1))
        self._slots: dict[tuple[str, int], VectorSlot] = {}

    def held(self) -> dict[str, list[int]]:
        """Names and versions that requests may ask for."""
        held: dict[str, list[int]] = {}
        for slot in self._slots.values():
            if slot.ready:
                held.setdefault(slot.name, []).append(slot.version)
        return {name: sorted(versions) for name, versions in sorted(held.items())}

    def find(self, name: str, version: int) -> VectorSlot | None:
        """The slot of a version, or None."""
        return self._slots.get((name, version))

    def reserve(self, name: str, version: int, vector: SteeringVector) -> VectorSlot:
        """A slot to write a new version into; drops unused older versions of the same name.

        Callers that share an engine publish under names of their own, so none can drive out the
        vectors of another.

        Raises:
            SteeringError: the version exists with other content, or every slot is needed.
        """
        held = self.find(name, version)
        if held is not None:
            if held.vector.sha256 != vector.sha256:
                raise SteeringError(
                    f"vector {name!r} version {version} is already published with content "
                    f"{held.vector.sha256[:12]}, got {vector.sha256[:12]}; publish changes as a "
                    "new version"
                )
            return held
        own = sorted(
            (slot for (held_name, _), slot in self._slots.items() if held_name == name),
            key=lambda slot: slot.version,
        )
        spare = [slot for slot in own if not slot.users]
        if spare and (not self._free or len(own) >= KEPT_VERSIONS):
            self.discard(spare[0])
        if not self._free:
            in_use = {f"{s.name}:{s.version}": s.users for s in self._slots.values()}
            raise SteeringError(
                f"all {len(self._slots)} slots are taken (vector:version -> requests in flight: "
                f"{in_use}) and none holds an unused older version of {name!r}; wait, drop a "
                "vector with retire(), or start the engine with more slots (engine.slots)"
            )
        slot = VectorSlot(number=self._free.pop(), name=name, version=version, vector=vector)
        self._slots[(name, version)] = slot
        return slot

    def discard(self, slot: VectorSlot) -> None:
        """Give a slot back."""
        if slot.users:
            raise SteeringError(
                f"vector {slot.name!r} version {slot.version} is read by {slot.users} requests in "
                "flight; wait for them before dropping it"
            )
        del self._slots[(slot.name, slot.version)]
        self._free.append(slot.number)

    def acquire(self, spec: SteeringSpec) -> VectorSlot:
        """Bind a request to the slot of the version it names; `release` must follow.

        Raises:
            SteeringError: that version is not in the engine.
        """
        slot = self.find(spec.vector, spec.version)
        if slot is None or not slot.ready:
            raise UnpublishedError(
                f"vector {spec.vector!r} version {spec.version} is not published in this engine "
                f"(it holds {self.held()}); publish it first. Nothing was generated"
            )
        slot.users += 1
        return slot

    def release(self, slot: VectorSlot) -> None:
        """End of one request's use."""
        slot.users -= 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Binding:
    """A request's hold on the slots that steer it."""

    key: str
    """Unique; the worker's receipt is fetched by it."""
    specs: tuple[SteeringSpec, ...]
    slots: tuple[VectorSlot, ...]
    lanes: tuple[Lane, ...]

    def wire(self, *, prompt_length: int = 0) -> dict[str, Any]:
        """What goes into `SamplingParams.extra_args`; see `RequestSteering`."""
        return RequestSteering(
            key=self.key, lanes=self.lanes, prompt_length=prompt_length
        ).to_wire()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineAccount:
    """What the engine's output says about one finished sequence."""

    prompt_length: int
    """Prompt tokens, without answer tokens that were given."""
    tokens: int
    """All tokens that went through the model at least (prompt and fed-back answer)."""
    cached: int
    """Tokens taken from the prefix cache."""
    spans: tuple[Span, ...]
    """Where the caller's processor put image tokens."""


class SteeringDesk:
    """Slots, checks and receipts. Thread-safe.

    Args:
        config: what is compiled into the engine.
        max_dose: largest |coefficient|, and largest |coefficient| times the vector's dose.
    """

    def __init__(self, config: PluginConfig, max_dose: float) -> None:
        self.config = config
        self.max_dose = max_dose
        self.slots = SlotTable(config.slots)
        self._lock = Lock()
        self._keys = itertools.count()
        # Distinguishes the requests of several callers of one engine.
        self._prefix = os.urandom(4).hex()

    def next_key(self) -> str:
        """A new request key."""
        return f"{self._prefix}-{next(self._keys)}"

    def reserve(self, name: str, vector: SteeringVector, version: int) -> VectorSlot:
        """A slot for a new version; see `SlotTable.reserve`."""
        with self._lock:
            return self.slots.reserve(name, version, vector)

    def confirm(self, slot: VectorSlot, hashes: Sequence[str]) -> str:
        """Mark a slot as usable once all workers hold its content, or drop it and raise."""
        with self._lock:
            if list(hashes) and all(held == slot.vector.sha256 for held in hashes):
                slot.ready = True
                return slot.vector.sha256
            if not slot.ready:
                self.slots.discard(slot)
        raise SteeringError(
            f"workers hold {[held[:12] for held in hashes]} after publishing {slot.name!r} version "
            f"{slot.version}, expected {slot.vector.sha256[:12]}; nothing was published"
        )

    def retire(self, name: str, version: int | None = None) -> None:
        """Drop versions of a name that no request uses; SteeringError if one is in use."""
        with self._lock:
            versions = [version] if version is not None else self.slots.held().get(name, [])
            for number in versions:
                slot = self.slots.find(name, number)
                if slot is None:
                    raise UnpublishedError(
                        f"vector {name!r} version {number} is not held; it holds "
                        f"{self.slots.held()}"
                    )
                self.slots.discard(slot)

    def bind(self, requests: Sequence[Sequence[SteeringSpec]]) -> list[Binding]:
        """Hold the slots of all requests, or of none.

        Args:
            requests: the stacked specs of each request; empty for an unsteered one.

        Raises:
            SteeringError: a spec cannot be served exactly; the message lists what can.
        """
        bindings: list[Binding] = []
        try:
            for specs in requests:
                bindings.append(self._bind(tuple(specs)))
        except SteeringError:
            self.release(bindings)
            raise
        return bindings

    def _bind(self, specs: tuple[SteeringSpec, ...]) -> Binding:
        if len(specs) > self.config.lanes:
            raise SteeringError(
                f"{len(specs)} vectors are stacked in one request and the engine was started with "
                f"lanes={self.config.lanes}; start it with more lanes"
            )
        slots: list[VectorSlot] = []
        with self._lock:
            try:
                for spec in specs:
                    slots.append(self._acquire(spec))
            except SteeringError:
                for slot in slots:
                    self.slots.release(slot)
                raise
        lanes = tuple(
            Lane(
                slot=slot.number,
                sha256=slot.vector.sha256,
                coefficient=spec.coefficient,
                operator=spec.operator,
                positions=spec.positions,
            )
            for slot, spec in zip(slots, specs, strict=True)
        )
        return Binding(key=self.next_key(), specs=specs, slots=tuple(slots), lanes=lanes)

    def _acquire(self, spec: SteeringSpec) -> VectorSlot:
        for value, kind, name in (
            (spec.operator, Operator, "operator"),
            (spec.positions, Positions, "positions"),
        ):
            if not isinstance(value, kind):
                raise SteeringError(
                    f"{name} must be one of {[m.value for m in kind]}, got {value!r}; nothing was "
                    "generated"
                )
        if spec.operator not in self.config.operators:
            raise SteeringError(
                f"operator {spec.operator.value!r} is not compiled into this engine (it has "
                f"{[o.value for o in self.config.operators]}); start it with that operator"
            )
        number = spec.coefficient
        if isinstance(number, bool) or not isinstance(number, int | float) or not isfinite(number):
            raise SteeringError(f"coefficient must be a finite number, got {number!r}")
        slot = self.slots.acquire(spec)
        # Project and clamp remove a part of what is there, whatever the vector's length.
        relative = spec.operator in (Operator.PROJECT, Operator.CLAMP)
        dose = abs(number) * (1.0 if relative else float(slot.vector.doses.max()))
        if dose > self.max_dose:
            self.slots.release(slot)
            raise SteeringError(
                f"coefficient {number} of vector {spec.vector!r} version {spec.version} is a dose "
                f"of {dose:.3g} times the hidden norm, at most {self.max_dose:.3g} is allowed; "
                "lower it, or start the engine with a higher max_dose"
            )
        return slot

    def release(self, bindings: Sequence[Binding]) -> None:
        """End of the requests: their slots may be reused."""
        with self._lock:
            for binding in bindings:
                for slot in binding.slots:
                    self.slots.release(slot)

    def receipts(
        self, binding: Binding, figures: Sequence[Mapping[str, Any]], seen: EngineAccount
    ) -> tuple[SteeringReceipt, ...]:
        """Receipts of one request, one for each stacked spec.

        Args:
            binding: what the request asked for.
            figures: the worker's own account of it, from every rank.
            seen: the engine's account.

        Raises:
            SteeringError: the accounts disagree; the answer must not be used.
        """
        figure = figures[0]
        if any(other != figure for other in figures[1:]):
            raise SteeringError(f"workers disagree on request {binding.key!r}: {list(figures)}")
        index = np.arange(figure["first"], figure["until"], dtype=np.int64)
        expected = [
            int(
                select_positions(
                    lane.positions,
                    index,
                    prompt_length=seen.prompt_length,
                    image_spans=seen.spans,
                ).sum()
            )
            for lane in binding.lanes
        ]
        wanted = [lane.sha256 for lane in binding.lanes]
        whole = 0 <= figure["first"] <= seen.cached and figure["until"] >= seen.tokens
        if figure["sha256"] != wanted or figure["steered"] != expected or not whole:
            raise SteeringError(
                f"request {binding.key!r} cannot be shown to be steered: expected content "
                f"{[sha[:12] for sha in wanted]} on {expected} tokens up to {seen.tokens} (cached: "
                f"{seen.cached}), the worker says {dict(figure)}; the answer was dropped"
            )
        return tuple(
            receipt_for(spec, slot.vector)
            for spec, slot in zip(binding.specs, binding.slots, strict=True)
        )
