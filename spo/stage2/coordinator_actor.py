"""The coordinator as a Ray actor, and a learner's line to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from spo.actors.engine_pool import EnginePool
from spo.actors.restarts import await_back
from spo.actors.reward_pool import RewardPool
from spo.config import EngineConfig
from spo.errors import StageError
from spo.records import Batch, Prompt, QuarantinedRow
from spo.stage2.coordinator import (
    Coordinator,
    CoordinatorFiles,
    CoordinatorSettings,
    make_coordinator,
)
from spo.vector import SteeringVector

_MAX_TRIES = 3


class CoordinatorActor:
    """Async actor shell of `Coordinator`; finds its pools by name, so that it can be restarted."""

    def __init__(self, build: Callable[..., Coordinator], arguments: Mapping[str, Any]) -> None:
        self._coordinator = build(**arguments)

    async def batch(self, step: int, vector: bytes, rank: int = 0) -> Batch:
        """See `Coordinator.batch`."""
        return await self._coordinator.batch(step, SteeringVector.from_bytes(vector), rank=rank)

    async def record(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """See `Coordinator.record`."""
        return self._coordinator.record(figures)

    async def restore(self, snapshot: Mapping[str, Any]) -> None:
        """See `Coordinator.restore`."""
        self._coordinator.restore(snapshot)

    async def ready(self) -> bool:
        """Answers once it is connected to its pools."""
        return True

    async def quarantined(self) -> list[QuarantinedRow]:
        """Rows set aside so far, with reasons."""
        return self._coordinator.ledger.quarantined


class CoordinatorLink:
    """A worker's line to the coordinator; one that was restarted is told where the run stands."""

    def __init__(self, name: str, namespace: str, *, rank: int, timeout_s: float) -> None:
        self._actor = ray.get_actor(name, namespace=namespace)
        self._rank = rank
        self._timeout_s = timeout_s
        self.snapshot: Mapping[str, Any] | None = None
        """State of the coordinator at the last step that was taken."""

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Tell a new coordinator where the run stands; one that knows better ignores it."""
        self.snapshot = snapshot
        self._ask(lambda: self._actor.restore.remote(snapshot), "the coordinator")

    def batch(self, step: int, vector: SteeringVector) -> Batch:
        """Batch `step`; waits for its rollouts."""
        data = vector.to_bytes()
        batch: Batch = self._ask(
            lambda: self._actor.batch.remote(step, data, self._rank), f"the rollouts of step {step}"
        )
        return batch

    def record(self, figures: Mapping[str, Any]) -> Mapping[str, Any]:
        """Commit a step; returns the coordinator's state after it."""
        snapshot: Mapping[str, Any] = self._ask(
            lambda: self._actor.record.remote(figures), "the coordinator"
        )
        return snapshot

    def _ask(self, send: Callable[[], Any], what: str) -> Any:
        for _ in range(_MAX_TRIES):
            try:
                return ray.get(send(), timeout=self._timeout_s)
            except GetTimeoutError as error:
                raise StageError(
                    f"waited {self._timeout_s:.0f} s for {what}; the engines or "
                    "scorers hang: see their logs, or raise engine.request_timeout_s"
                ) from error
            except RayActorError:
                await_back(
                    self._actor.ready.remote,
                    timeout_s=self._timeout_s,
                    what="the coordinator",
                    error_type=StageError,
                )
                if self.snapshot is not None:
                    ray.get(self._actor.restore.remote(self.snapshot))
        raise StageError(f"the coordinator was lost {_MAX_TRIES} times in a row; see its log")


def start_coordinator(
    prompts: list[Prompt],
    settings: CoordinatorSettings,
    engine: EngineConfig,
    prefix: str,
    files: Callable[[], CoordinatorFiles],
) -> Any:
    """The coordinator as a named actor, which Ray restarts; `files` opens what it writes, there."""
    placed = ray.remote(CoordinatorActor).options(
        name=f"{prefix}-coordinator", num_cpus=0, max_restarts=3
    )
    arguments = {"prompts": prompts, "settings": settings, "engine": engine}
    return placed.remote(_connected_coordinator, {**arguments, "prefix": prefix, "files": files})


def _connected_coordinator(
    prompts: list[Prompt],
    settings: CoordinatorSettings,
    engine: EngineConfig,
    prefix: str,
    files: Callable[[], CoordinatorFiles],
) -> Coordinator:
    """Built inside the coordinator's own process, which finds the pools by name."""
    return make_coordinator(
        prompts,
        EnginePool.connect(prefix, engine),
        RewardPool.connect(prefix, settings.reward),
        settings,
        files(),
    )
