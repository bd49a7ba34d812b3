"""Which vectors are live under which name, in which version, and what a request is steered by.

Pure state with files behind it: content-addressed artifacts and one small JSON, so that a restarted
registry knows what was live. A version never changes its content; rolling back is choosing an
older version.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from spo.artifact import SteeringArtifact
from spo.draws import share_of
from spo.errors import ArtifactError, SteeringError
from spo.files import write_atomic
from spo.records import Operator, Positions, SteeringSpec

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_STATE = "registry.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One published artifact."""

    name: str
    number: int
    sha256: str
    coefficient: float
    """Used where a request names none."""
    operator: Operator
    positions: Positions
    largest_dose: float
    """Largest norm of a layer's direction relative to the layer's mean hidden norm."""
    layers: tuple[int, ...]
    method: str

    def spec(
        self, coefficient: float | None = None, positions: Positions | None = None
    ) -> SteeringSpec:
        """What a request asks the engine for."""
        return SteeringSpec(
            vector=self.name,
            version=self.number,
            coefficient=self.coefficient if coefficient is None else coefficient,
            operator=self.operator,
            positions=positions or self.positions,
        )

    def dose(self, coefficient: float) -> float:
        """|coefficient| as a dose relative to the hidden norm."""
        relative = self.operator in (Operator.PROJECT, Operator.CLAMP)
        return abs(coefficient) * (1.0 if relative else self.largest_dose)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Everything under one name."""

    live: int
    """Version that requests get."""
    previous: tuple[int, ...] = ()
    """Versions that were live before, oldest first."""
    canary: int | None = None
    """Version on trial."""
    canary_share: float = 0.0
    """Share of requests that get it."""
    versions: Mapping[int, Version] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What gateways route by."""

    epoch: int
    entries: Mapping[str, Entry]

    def route(self, name: str, number: int | None, ticket: str) -> Version:
        """The version that steers a request.

        Args:
            name: vector.
            number: a version that the request insists on.
            ticket: decides by its hash whether the request falls into the canary's share.

        Raises:
            SteeringError: no such vector or version; never another one instead.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise SteeringError(
                f"no vector named {name!r} is loaded; there are {sorted(self.entries)}"
            )
        if number is None:
            number = entry.live
            if entry.canary is not None and share_of(ticket) < entry.canary_share:
                number = entry.canary
        version = entry.versions.get(number)
        if version is None:
            raise SteeringError(
                f"vector {name!r} has no version {number}; there are {sorted(entry.versions)}"
            )
        return version


class VectorRegistry:
    """See the module's text. Not thread-safe.

    Args:
        folder: where state and artifacts are kept.
        keep_versions: older ones are forgotten, except those that are live or on trial.
        max_names: more vectors would not fit the engines' slots.
    """

    def __init__(self, folder: Path, *, keep_versions: int, max_names: int) -> None:
        self._folder = folder
        self._keep = keep_versions
        self._max_names = max_names
        self._staged: dict[tuple[str, int], Version] = {}
        self._next: dict[str, int] = {}
        self.snapshot = Snapshot(epoch=0, entries={})
        if (folder / _STATE).exists():
            self._read()

    def stage(self, name: str, artifact: SteeringArtifact) -> Version:
        """A new version that nobody is routed to yet; the same content keeps its version."""
        if not _NAME.fullmatch(name):
            raise ArtifactError(
                f"vector names are lower-case letters, digits, '.', '_' and '-', got {name!r}"
            )
        entry = self.snapshot.entries.get(name)
        if entry is None and len(self.snapshot.entries) >= self._max_names:
            raise ArtifactError(
                f"{self._max_names} vectors are loaded and the engines have no slot for another; "
                "unload one, or start with more serve.slots"
            )
        vector = artifact.vector
        made = Version(
            name=name,
            number=self._next.get(name, 1),
            sha256=vector.sha256,
            coefficient=artifact.coefficient,
            operator=artifact.operator,
            positions=artifact.positions,
            largest_dose=float(vector.doses.max()),
            layers=vector.layers,
            method=artifact.method,
        )
        for known in entry.versions.values() if entry else ():
            if replace(made, number=known.number) == known:
                return known
        self._next[name] = made.number + 1
        artifact.save(self._artifact_folder(made))
        self._staged[(name, made.number)] = made
        return made

    def commit(self, version: Version, share: float | None = None) -> Snapshot:
        """Route requests to a staged or known version: all of them, or a share on trial."""
        name, number = version.name, version.number
        self._staged.pop((name, number), None)
        entry = self.snapshot.entries.get(name)
        if entry is None:
            entry = Entry(live=number, versions={number: version})
        else:
            entry = replace(entry, versions={**entry.versions, number: version})
            if share is not None:
                entry = replace(entry, canary=number, canary_share=share)
            else:
                entry = _make_live(entry, number)
        return self._set(name, self._trimmed(entry))

    def rollback(self, name: str, number: int | None = None) -> Snapshot:
        """End a trial, or make the version live that was live before, or the one named."""
        entry = self._entry(name)
        if number is None and entry.canary is not None:
            return self._set(name, replace(entry, canary=None, canary_share=0.0))
        if number is None:
            if not entry.previous:
                raise SteeringError(f"vector {name!r} has no earlier version to roll back to")
            number = entry.previous[-1]
            entry = replace(_make_live(entry, number), previous=entry.previous[:-1])
            return self._set(name, entry)
        if number not in entry.versions:
            raise SteeringError(
                f"vector {name!r} has no version {number}; there are {sorted(entry.versions)}"
            )
        return self._set(name, _make_live(entry, number))

    def unload(self, name: str, number: int | None = None) -> Snapshot:
        """Forget a name, or one version that is neither live nor on trial."""
        entry = self._entry(name)
        if number is None:
            entries = {key: value for key, value in self.snapshot.entries.items() if key != name}
            return self._publish(entries)
        if number in (entry.live, entry.canary):
            raise SteeringError(
                f"version {number} of {name!r} is in use; roll back first, or unload the name"
            )
        if number not in entry.versions:
            raise SteeringError(
                f"vector {name!r} has no version {number}; there are {sorted(entry.versions)}"
            )
        return self._set(name, _without(entry, {number}))

    def artifact(self, name: str, number: int) -> SteeringArtifact:
        """A version's artifact, read back and verified; SteeringError when it is unknown."""
        entry = self.snapshot.entries.get(name)
        version = self._staged.get((name, number)) or (entry and entry.versions.get(number))
        if not version:
            raise SteeringError(f"vector {name!r} version {number} is not in the registry")
        artifact = SteeringArtifact.load(self._artifact_folder(version), model_id=None)
        if artifact.vector.sha256 != version.sha256:
            raise SteeringError(
                f"the stored file of {name!r} version {number} holds "
                f"{artifact.vector.sha256[:12]}, expected {version.sha256[:12]}"
            )
        return artifact

    def _entry(self, name: str) -> Entry:
        entry = self.snapshot.entries.get(name)
        if entry is None:
            raise SteeringError(
                f"no vector named {name!r} is loaded; there are {sorted(self.snapshot.entries)}"
            )
        return entry

    def _artifact_folder(self, version: Version) -> Path:
        return self._folder / "artifacts" / f"{version.name}-{version.number}-{version.sha256[:16]}"

    def _trimmed(self, entry: Entry) -> Entry:
        spare = [n for n in sorted(entry.versions) if n not in (entry.live, entry.canary)]
        excess = len(entry.versions) - self._keep
        return _without(entry, set(spare[: max(0, excess)]))

    def _set(self, name: str, entry: Entry) -> Snapshot:
        return self._publish({**self.snapshot.entries, name: entry})

    def _publish(self, entries: Mapping[str, Entry]) -> Snapshot:
        """Written before it is used: what was promised survives a restart."""
        snapshot = Snapshot(epoch=self.snapshot.epoch + 1, entries=dict(entries))
        self._folder.mkdir(parents=True, exist_ok=True)
        state = {
            "epoch": snapshot.epoch,
            "next": self._next,
            "entries": {
                name: {
                    **asdict(entry),
                    "versions": [asdict(version) for version in entry.versions.values()],
                }
                for name, entry in snapshot.entries.items()
            },
        }
        write_atomic(self._folder / _STATE, json.dumps(state, indent=1).encode())
        self.snapshot = snapshot
        return snapshot

    def _read(self) -> None:
        path = self._folder / _STATE
        try:
            state = json.loads(path.read_text())
            entries = {name: _parsed(row) for name, row in state["entries"].items()}
            self._next = {name: int(number) for name, number in state["next"].items()}
            self.snapshot = Snapshot(epoch=int(state["epoch"]), entries=entries)
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path} is damaged ({error!r}); restore it, or delete it to start with no vectors"
            ) from error


def _parsed(row: Mapping[str, Any]) -> Entry:
    versions = [
        Version(
            **{
                **version,
                "operator": Operator(version["operator"]),
                "positions": Positions(version["positions"]),
                "layers": tuple(version["layers"]),
            }
        )
        for version in row["versions"]
    ]
    return Entry(
        **{
            **row,
            "previous": tuple(row["previous"]),
            "versions": {version.number: version for version in versions},
        }
    )


def _make_live(entry: Entry, number: int) -> Entry:
    if entry.canary == number:
        entry = replace(entry, canary=None, canary_share=0.0)
    if entry.live == number:
        return entry
    return replace(entry, live=number, previous=(*entry.previous, entry.live))


def _without(entry: Entry, numbers: set[int]) -> Entry:
    return replace(
        entry,
        previous=tuple(n for n in entry.previous if n not in numbers),
        versions={n: v for n, v in entry.versions.items() if n not in numbers},
    )
