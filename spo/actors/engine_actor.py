"""One engine in a Ray actor: several callers at once, signs of life, leaving when it is dead."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import ray

from spo.config import EngineConfig
from spo.engines.base import Engine, EngineInfo, LogprobRequest
from spo.engines.factory import open_engine
from spo.records import GenerateRequest, Rollout
from spo.vector import SteeringVector

CALLS, CONTROL = "calls", "control"
GROUPS = {CALLS: 128, CONTROL: 8}
"""Concurrency groups of the actor: the model's work, and answers that must never wait for it."""
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineHealth:
    """Sign of life of one engine."""

    node_id: str
    process_id: int
    working: int
    """Calls in progress."""
    finished: int
    """Calls finished since the process started."""


class EngineActor:
    """One engine in its own process, for several callers at once.

    A plain class: `ray.remote(concurrency_groups=...)(EngineActor)` at the call site. An engine
    that cannot take several calls at once gets them one by one. When the engine's own process has
    died, this one leaves too, so that Ray starts both anew.
    """

    def __init__(self, model: str, revision: str | None, config: EngineConfig, seed: int) -> None:
        self._engine: Engine = open_engine(model, revision, config, seed=seed)
        self._turn: AbstractContextManager[Any] = (
            nullcontext() if self._engine.concurrent else threading.Lock()
        )
        self._working = 0
        self._finished = 0
        self._counting = threading.Lock()
        self._closed = threading.Event()
        watch = threading.Thread(target=self._leave_when_dead, args=(config.probe_interval_s,))
        watch.daemon = True
        watch.start()

    def info(self) -> EngineInfo:
        """What the engine holds; answers once the model is loaded."""
        return self._engine.info

    def health(self) -> EngineHealth:
        """Answers while the process is alive, however busy the model is."""
        return EngineHealth(
            node_id=ray.get_runtime_context().get_node_id(),
            process_id=os.getpid(),
            working=self._working,
            finished=self._finished,
        )

    def publish(self, name: str, vector: bytes, version: int) -> str:
        """Install a vector; returns the hash that the engine holds."""
        return self._guarded(
            lambda: self._engine.publish(name, SteeringVector.from_bytes(vector), version)
        )

    def retire(self, name: str, version: int | None) -> None:
        """See `Sampler.retire`."""
        self._guarded(lambda: self._engine.retire(name, version))

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Rollout]:
        """See `Engine.generate`."""
        return self._guarded(lambda: self._engine.generate(requests))

    def logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float]]:
        """See `Engine.logprobs`."""
        return self._guarded(lambda: self._engine.logprobs(requests))

    def close(self) -> None:
        """Give the engine's subprocesses back before the actor is killed."""
        self._closed.set()
        self._engine.close()

    def _guarded(self, call: Callable[[], _Result]) -> _Result:
        with self._counting:
            self._working += 1
        try:
            with self._turn:
                return call()
        except Exception as error:
            if _is_dead(error):
                os._exit(1)
            raise
        finally:
            with self._counting:
                self._working -= 1
                self._finished += 1

    def _leave_when_dead(self, interval_s: float) -> None:
        while not self._closed.wait(interval_s):
            if not self._engine.alive():
                os._exit(1)


def _is_dead(error: BaseException | None) -> bool:
    """Whether vLLM's own report of a dead engine core is behind an error."""
    while error is not None:
        if type(error).__name__ == "EngineDeadError":
            return True
        error = error.__cause__
    return False
