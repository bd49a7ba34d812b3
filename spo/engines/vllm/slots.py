"""Which vector version lies in which slot of the engine, and who still uses it.

Lives on the caller's side, in one process; the workers only obey slot numbers and check hashes.
"""

from __future__ import annotations

from dataclasses import dataclass

from spo.errors import SteeringError, UnpublishedError
from spo.records import SteeringSpec
from spo.vector import SteeringVector

KEPT_VERSIONS = 4
"""Newest versions of one name that stay; room is never made at the cost of another name."""


@dataclass(slots=True, kw_only=True, eq=False)
class Slot:
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
        self._slots: dict[tuple[str, int], Slot] = {}

    def held(self) -> dict[str, list[int]]:
        """Names and versions that requests may ask for."""
        held: dict[str, list[int]] = {}
        for slot in self._slots.values():
            if slot.ready:
                held.setdefault(slot.name, []).append(slot.version)
        return {name: sorted(versions) for name, versions in sorted(held.items())}

    def find(self, name: str, version: int) -> Slot | None:
        """The slot of a version, or None."""
        return self._slots.get((name, version))

    def reserve(self, name: str, version: int, vector: SteeringVector) -> Slot:
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
        slot = Slot(number=self._free.pop(), name=name, version=version, vector=vector)
        self._slots[(name, version)] = slot
        return slot

    def discard(self, slot: Slot) -> None:
        """Give a slot back."""
        if slot.users:
            raise SteeringError(
                f"vector {slot.name!r} version {slot.version} is read by {slot.users} requests in "
                "flight; wait for them before dropping it"
            )
        del self._slots[(slot.name, slot.version)]
        self._free.append(slot.number)

    def acquire(self, spec: SteeringSpec) -> Slot:
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

    def release(self, slot: Slot) -> None:
        """End of one request's use."""
        slot.users -= 1
