"""Rollout engines as Ray actors, and the pool that spreads requests over them.

A request carries the vector and the version it wants. The pool keeps the published vectors, so an
engine that was restarted by Ray and came back empty is told again and the request repeated: it
heals by itself. Waits have a deadline and say what they wait for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayTaskError

from spo.config import EngineConfig
from spo.engines.base import Engine, EngineInfo, LogprobRequest
from spo.engines.factory import open_engine
from spo.errors import EngineError, SpoError, StageError, SteeringError
from spo.records import GenerateRequest, Rollout
from spo.stages.restarts import await_back
from spo.vector import SteeringVector

_MAX_TRIES = 3
_Request = TypeVar("_Request", GenerateRequest, LogprobRequest)
_Result = TypeVar("_Result")


class EngineActor:
    """One engine in its own process. A plain class: `ray.remote(EngineActor)` at the call site."""

    def __init__(self, model: str, revision: str | None, config: EngineConfig, seed: int) -> None:
        self._engine: Engine = open_engine(model, revision, config, seed=seed)

    def info(self) -> EngineInfo:
        """What the engine holds; answers once the model is loaded."""
        return self._engine.info

    def publish(self, name: str, vector: bytes, version: int) -> str:
        """Install a vector; returns the hash that the engine holds."""
        return self._engine.publish(name, SteeringVector.from_bytes(vector), version)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Rollout]:
        """See `Engine.generate`."""
        return self._guarded(lambda: self._engine.generate(requests))

    def logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float]]:
        """See `Engine.logprobs`."""
        return self._guarded(lambda: self._engine.logprobs(requests))

    def process_id(self) -> int:
        """Process of the actor, for fault tests."""
        return os.getpid()

    def close(self) -> None:
        """Give the engine's subprocesses back before the actor is killed."""
        self._engine.close()

    @staticmethod
    def _guarded(call: Callable[[], _Result]) -> _Result:
        """Leave the process when the engine's subprocess is dead, so that Ray starts a new one."""
        try:
            return call()
        except SpoError:
            raise
        except RuntimeError as error:
            if type(error).__name__ == "EngineDeadError":
                os._exit(1)
            raise


class RolloutPool:
    """Spreads requests over engine actors; implements `spo.engines.base.Sampler`.

    Args:
        actors: handles of `EngineActor`s.
        request_timeout_s: longest wait for one engine's share of a call.
        start_timeout_s: longest wait for an engine to load its model, also after a restart.
    """

    def __init__(
        self, actors: Sequence[Any], *, request_timeout_s: float, start_timeout_s: float
    ) -> None:
        if not actors:
            raise StageError("a rollout pool needs at least one engine, got none")
        self._actors = list(actors)
        self._timeout_s = request_timeout_s
        self._start_timeout_s = start_timeout_s
        self._published: dict[tuple[str, int], bytes] = {}

    @classmethod
    def start(
        cls, model: str, revision: str | None, config: EngineConfig, *, prefix: str, seed: int
    ) -> RolloutPool:
        """Start the configured replicas as named actors and wait until each model is loaded."""
        remote = ray.remote(EngineActor)
        actors = [
            remote.options(
                name=f"{prefix}-engine-{i}",
                num_cpus=1,
                num_gpus=config.num_gpus,
                label_selector=config.labels,
                max_restarts=3,
                max_task_retries=0,
            ).remote(model, revision, config, seed + i)
            for i in range(config.replicas)
        ]
        pool = cls._of(actors, config)
        pool.wait_ready()
        return pool

    @classmethod
    def connect(cls, prefix: str, config: EngineConfig) -> RolloutPool:
        """A pool over engines that another process of the same job started."""
        actors = [ray.get_actor(f"{prefix}-engine-{i}") for i in range(config.replicas)]
        return cls._of(actors, config)

    @classmethod
    def _of(cls, actors: Sequence[Any], config: EngineConfig) -> RolloutPool:
        return cls(
            actors,
            request_timeout_s=config.request_timeout_s,
            start_timeout_s=config.start_timeout_s,
        )

    @property
    def info(self) -> EngineInfo:
        info: EngineInfo = ray.get(self._actors[0].info.remote(), timeout=self._timeout_s)
        return info

    def wait_ready(self) -> None:
        """Wait for every engine to load its model."""
        timeout_s = self._start_timeout_s
        waiting = [actor.info.remote() for actor in self._actors]
        try:
            ray.get(waiting, timeout=timeout_s)
        except GetTimeoutError as error:
            raise StageError(
                f"waited {timeout_s:.0f} s for {len(waiting)} engine(s) to load the model; "
                f"cluster resources: {ray.cluster_resources()}, free: {ray.available_resources()}. "
                "Free resources, lower engine.replicas, or raise engine.start_timeout_s"
            ) from error
        except (ActorDiedError, ActorUnavailableError) as error:
            raise EngineError(f"an engine died while it started: {error}") from error

    def publish(self, name: str, vector: SteeringVector, version: int) -> str:
        """Install a vector on every engine; SteeringError unless all confirm the same hash."""
        data = vector.to_bytes()
        self._published[(name, version)] = data
        for old in sorted(key for key in self._published if key[0] == name)[:-4]:
            del self._published[old]
        hashes = [
            self._call(i, lambda actor: actor.publish.remote(name, data, version))
            for i in range(len(self._actors))
        ]
        if set(hashes) != {vector.sha256}:
            raise SteeringError(
                f"vector {name!r} version {version} is {vector.sha256[:12]} and engines confirmed "
                f"{sorted({h[:12] for h in hashes})}; nothing is generated with it"
            )
        return vector.sha256

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Rollout]:
        """Answers in the order of the requests; each engine works on one share."""
        return self._spread(requests, lambda actor, share: actor.generate.remote(share))

    def logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float]]:
        """See `Engine.logprobs`."""
        return self._spread(requests, lambda actor, share: actor.logprobs.remote(share))

    def close(self) -> None:
        """End the engines of this pool."""
        for actor in self._actors:
            # An engine that is already gone cannot be closed; ray.kill ends it for certain.
            with suppress(ActorDiedError, ActorUnavailableError, GetTimeoutError, RayTaskError):
                ray.get(actor.close.remote(), timeout=30)
            ray.kill(actor)

    def _spread(
        self, requests: Sequence[_Request], call: Callable[[Any, list[_Request]], Any]
    ) -> list[Any]:
        count = len(self._actors)
        shares = [list(requests[i::count]) for i in range(count)]
        pending = {i: call(self._actors[i], share) for i, share in enumerate(shares) if share}
        results: list[Any] = [None] * len(requests)
        for i, reference in pending.items():
            answers = self._finish(i, reference, partial(_send_share, call, shares[i]))
            for position, answer in zip(range(i, len(requests), count), answers, strict=True):
                results[position] = answer
        return results

    def _call(self, i: int, send: Callable[[Any], Any]) -> Any:
        return self._finish(i, send(self._actors[i]), send)

    def _finish(self, i: int, reference: Any, send: Callable[[Any], Any]) -> Any:
        """Result of a call; a lost engine is waited for, told the vectors again and asked again."""
        for attempt in range(1, _MAX_TRIES + 1):
            try:
                return ray.get(reference, timeout=self._timeout_s)
            except GetTimeoutError as error:
                raise StageError(
                    f"waited {self._timeout_s:.0f} s for engine {i}; it hangs or is too slow: see "
                    "its log, or raise engine.request_timeout_s"
                ) from error
            except (ActorDiedError, ActorUnavailableError, SteeringError) as error:
                if attempt == _MAX_TRIES:
                    raise EngineError(
                        f"engine {i} failed {attempt} times, last: {error}"
                    ) from error
                await_back(
                    self._actors[i].info.remote,
                    timeout_s=self._start_timeout_s,
                    what=f"engine {i} (engine.start_timeout_s)",
                    error_type=EngineError,
                )
                self._republish(i)
                reference = send(self._actors[i])
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _republish(self, i: int) -> None:
        for (name, version), data in self._published.items():
            reference = self._actors[i].publish.remote(name, data, version)
            ray.get(reference, timeout=self._timeout_s)


def _send_share(
    call: Callable[[Any, list[_Request]], Any], share: list[_Request], actor: Any
) -> Any:
    return call(actor, share)
