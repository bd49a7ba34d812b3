"""Slots of the shared engines, leased to trials for a limited time.

A trial that is stopped early or killed runs no `finally`, so nothing here waits for one: a lease
that is not renewed ends, and the office retires the vectors that nobody holds. Trials that steer
with the same vector share its slot, so trials that differ only in coefficient, operator or
positions need one slot together. The office also hands out turns, so that a trial with many
requests does not make a small one wait for all of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from spo.errors import SpoError, StageError

_LEAST_SHARE = 4
_TRAINED = "trial-"
_TRAINED_SLOTS = 4
"""Versions of one name that an engine keeps."""


def trained_name(digest: str) -> str:
    """Name under which a trial publishes the vector that it trains."""
    return f"{_TRAINED}{digest}"


def slots_of(name: str) -> int:
    """Slots that a vector name takes: several for one that changes while it is read."""
    return _TRAINED_SLOTS if name.startswith(_TRAINED) else 1


@dataclass(slots=True, kw_only=True)
class _Held:
    """A vector in the engines."""

    slots: int
    holders: set[str] = field(default_factory=set)
    used: float = 0.0
    doomed: bool = False
    """To be dropped as soon as no request reads it."""


class SlotOffice:
    """Who holds which slots. Thread-safe; it keeps no vector, only names.

    Args:
        capacity: slots that trials may hold together.
        lease_s: time without a sign of life after which a trial's leases end.
        retire: drops a vector from all engines; an error means that it is still in use, and it is
            tried again.
        batch: requests that the engines work on at once, over all of them.
        clock: seconds.
    """

    def __init__(
        self,
        *,
        capacity: int,
        lease_s: float,
        retire: Callable[[str], object],
        batch: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._capacity = capacity
        self._lease_s = lease_s
        self._retire = retire
        self._batch = batch
        self._clock = clock
        self._lock = threading.RLock()
        self._vectors: dict[str, _Held] = {}
        self._seen: dict[str, float] = {}
        self._working: set[str] = set()
        self.expired = 0

    def acquire(self, trial: str, name: str, slots: int) -> bool:
        """Lease the slots of a vector; False while there is no room.

        Raises:
            StageError: it would not fit even into empty engines.
        """
        if slots > self._capacity:
            raise StageError(
                f"trial {trial} needs {slots} slots, the engines have {self._capacity} for trials; "
                "raise engine.slots"
            )
        with self._lock:
            self.reap()
            held = self._vectors.get(name)
            if held is None:
                if not self._make_room(slots):
                    return False
                held = self._vectors[name] = _Held(slots=slots)
            held.holders.add(trial)
            held.doomed = False
            held.used = self._seen[trial] = self._clock()
            return True

    def renew(self, trial: str) -> bool:
        """A sign of life; False when the trial's leases have ended."""
        with self._lock:
            if trial not in self._seen:
                return False
            self._seen[trial] = self._clock()
            return True

    def release(self, trial: str, *, keep: bool = True) -> None:
        """End of a trial. Its vectors stay while there is room, for others that use the same.

        Args:
            trial: the trial.
            keep: False drops vectors that only it held, for versions that nobody asks for again.
        """
        with self._lock:
            self._seen.pop(trial, None)
            self._working.discard(trial)
            for name, held in list(self._vectors.items()):
                if trial in held.holders:
                    held.holders.discard(trial)
                    if not held.holders and not keep:
                        self._drop(name)

    def give_back(self, trial: str, name: str) -> None:
        """End of one lease; the vector goes unless another trial holds it."""
        with self._lock:
            held = self._vectors.get(name)
            if held is not None:
                held.holders.discard(trial)
                if not held.holders:
                    self._drop(name)

    def reap(self) -> None:
        """End the leases of trials that gave no sign of life."""
        with self._lock:
            limit = self._clock() - self._lease_s
            for trial in [trial for trial, seen in self._seen.items() if seen < limit]:
                self.expired += 1
                self.release(trial, keep=False)
            for name in [name for name, held in self._vectors.items() if held.doomed]:
                self._drop(name)

    def close(self) -> None:
        """Retire everything that is not in use."""
        with self._lock:
            for name in list(self._vectors):
                self._vectors[name].holders.clear()
                self._drop(name)

    def share(self, trial: str) -> int:
        """The trial begins to generate: how many requests it may have in the engines at once."""
        with self._lock:
            self._working.add(trial)
            return max(_LEAST_SHARE, self._batch // len(self._working))

    def rest(self, trial: str) -> None:
        """The trial has no request in the engines any more."""
        with self._lock:
            self._working.discard(trial)

    def held(self) -> dict[str, dict[str, Any]]:
        """Vector name to its slots and the trials that hold it."""
        with self._lock:
            return {
                name: {"slots": held.slots, "holders": sorted(held.holders)}
                for name, held in self._vectors.items()
            }

    def _make_room(self, slots: int) -> bool:
        while sum(held.slots for held in self._vectors.values()) + slots > self._capacity:
            idle = [name for name, held in self._vectors.items() if not held.holders]
            if not idle or not self._drop(min(idle, key=lambda name: self._vectors[name].used)):
                return False
        return True

    def _drop(self, name: str) -> bool:
        try:
            self._retire(name)
        except SpoError:
            # A request of a killed trial still reads it; `reap` tries again.
            self._vectors[name].doomed = True
            return False
        del self._vectors[name]
        return True


class OfficeActor:
    """`SlotOffice` in a process of its own; ends leases also when nobody asks for anything.

    Args:
        connect: gives the function that retires a vector, inside this process.
        options: arguments of `SlotOffice`.
    """

    def __init__(
        self, connect: Callable[[], Callable[[str], object]], options: Mapping[str, Any]
    ) -> None:
        self._office = SlotOffice(retire=connect(), **options)
        self._stop = threading.Event()
        pause = max(0.2, float(options["lease_s"]) / 4)
        threading.Thread(target=self._watch, args=(pause,), daemon=True).start()

    def _watch(self, pause: float) -> None:
        while not self._stop.wait(pause):
            self._office.reap()

    def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        """One of `SlotOffice`'s methods."""
        return getattr(self._office, method)(*arguments, **named)

    def close(self) -> dict[str, Any]:
        """End all leases; how many ended by time alone, and what the engines still hold."""
        self._stop.set()
        self._office.close()
        return {"expired": self._office.expired, "left": self._office.held()}


class Office(Protocol):
    """What a lease needs: `SlotOffice` itself, or a stand-in that calls the actor."""

    def acquire(self, trial: str, name: str, slots: int) -> bool: ...
    def renew(self, trial: str) -> bool: ...
    def release(self, trial: str, *, keep: bool = True) -> None: ...
    def give_back(self, trial: str, name: str) -> None: ...
    def share(self, trial: str) -> int: ...
    def rest(self, trial: str) -> None: ...


class RemoteOffice:
    """Calls an `OfficeActor`.

    Args:
        actor: its handle.
        timeout_s: longest wait for an answer.
    """

    def __init__(self, actor: Any, *, timeout_s: float = 60.0) -> None:
        self._actor = actor
        self._timeout_s = timeout_s

    def _call(self, method: str, *arguments: Any, **named: Any) -> Any:
        import ray

        try:
            return ray.get(
                self._actor.call.remote(method, *arguments, **named), timeout=self._timeout_s
            )
        except ray.exceptions.RayActorError as error:
            raise StageError(f"the sweep's slot office is gone: {error}") from error
        except ray.exceptions.GetTimeoutError as error:
            raise StageError(
                f"waited {self._timeout_s:.0f} s for the sweep's slot office; the cluster is "
                "overloaded or lost"
            ) from error

    def acquire(self, trial: str, name: str, slots: int) -> bool:
        """See `SlotOffice.acquire`."""
        return bool(self._call("acquire", trial, name, slots))

    def renew(self, trial: str) -> bool:
        """See `SlotOffice.renew`."""
        return bool(self._call("renew", trial))

    def release(self, trial: str, *, keep: bool = True) -> None:
        """See `SlotOffice.release`."""
        self._call("release", trial, keep=keep)

    def give_back(self, trial: str, name: str) -> None:
        """See `SlotOffice.give_back`."""
        self._call("give_back", trial, name)

    def share(self, trial: str) -> int:
        """See `SlotOffice.share`."""
        return int(self._call("share", trial))

    def rest(self, trial: str) -> None:
        """See `SlotOffice.rest`."""
        self._call("rest", trial)
