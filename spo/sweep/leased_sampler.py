"""A sampler for one trial of a sweep: leases what it publishes, takes turns with the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from spo.engines.base import EngineInfo, LogprobRequest, Sampler
from spo.errors import SpoError, StageError
from spo.records import GenerateRequest, Rollout
from spo.sweep.slot_office import Office, slots_of
from spo.vector import SteeringVector

_Request = TypeVar("_Request", GenerateRequest, LogprobRequest)


class LeasedSampler:
    """A sampler for one trial: leases what it publishes, takes turns, and stops when it lost them.

    Implements `spo.engines.base.Sampler`.

    Args:
        sampler: the shared pool.
        office: gives the leases.
        trial: unique name of the trial.
        lease_s: the office's lease time; renewed four times within it.
        wait_s: longest wait for a slot.
    """

    def __init__(
        self,
        sampler: Sampler,
        office: Office,
        *,
        trial: str,
        lease_s: float,
        wait_s: float,
    ) -> None:
        self._sampler = sampler
        self._office = office
        self._trial = trial
        self._lease_s = lease_s
        self._wait_s = wait_s
        self._leased: set[str] = set()
        self._leasing = threading.Lock()
        self._room = threading.Condition()
        self._inside = 0
        self._lost = threading.Event()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def info(self) -> EngineInfo:
        return self._sampler.info

    def publish(self, name: str, vector: SteeringVector, version: int) -> str:
        with self._leasing:
            if name not in self._leased:
                self._lease(name)
        self._check()
        return self._sampler.publish(name, vector, version)

    def retire(self, name: str, version: int | None = None) -> None:
        """Drop one version; or all of them, and with them the lease of the name."""
        if version is not None:
            self._sampler.retire(name, version)
            return
        with self._leasing:
            self._leased.discard(name)
            self._office.give_back(self._trial, name)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Rollout]:
        return self._in_turns(requests, self._sampler.generate)

    def logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float]]:
        return self._in_turns(requests, self._sampler.logprobs)

    def end(self, *, keep: bool) -> None:
        """Give the leases back; see `SlotOffice.release`."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=self._lease_s)
        self._office.release(self._trial, keep=keep)
        self._leased.clear()

    def _lease(self, name: str) -> None:
        end = time.monotonic() + self._wait_s
        while not self._office.acquire(self._trial, name, slots_of(name)):
            if time.monotonic() > end:
                raise StageError(
                    f"trial {self._trial} waited {self._wait_s:.0f} s for {slots_of(name)} slot(s) "
                    "of the engines; lower search.concurrent, or raise engine.slots or pool.wait_s"
                )
            time.sleep(min(1.0, self._lease_s / 8))
        self._leased.add(name)
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep_alive, daemon=True)
            self._thread.start()

    def _keep_alive(self) -> None:
        while not self._ended.wait(self._lease_s / 4):
            try:
                alive = self._office.renew(self._trial)
            except SpoError:
                alive = False
            if not alive:
                self._lost.set()
                return

    def _check(self) -> None:
        if self._ended.is_set():
            raise StageError(f"trial {self._trial} has ended; nothing more is sampled for it")
        if self._lost.is_set():
            raise StageError(
                f"trial {self._trial} lost its lease: it gave no sign of life for "
                f"{self._lease_s:.0f} s and its slots were given to others. Nothing unsteered was "
                "used; the trial starts again at its last step"
            )

    def _in_turns(
        self, requests: Sequence[_Request], send: Callable[[Sequence[_Request]], list[Any]]
    ) -> list[Any]:
        results: list[Any] = []
        while len(results) < len(requests):
            part = self._enter(requests[len(results) :])
            try:
                results += send(part)
            finally:
                self._leave(len(part))
        return results

    def _enter(self, requests: Sequence[_Request]) -> Sequence[_Request]:
        """As many of the requests as this trial may send now; waits while it may send none."""
        with self._room:
            while True:
                self._check()
                share = self._office.share(self._trial)
                if self._inside == 0 or self._inside < share:
                    part = requests[: max(1, share - self._inside)]
                    self._inside += len(part)
                    return part
                self._room.wait(timeout=1.0)

    def _leave(self, count: int) -> None:
        with self._room:
            self._inside -= count
            self._room.notify_all()
            if self._inside == 0:
                self._office.rest(self._trial)
