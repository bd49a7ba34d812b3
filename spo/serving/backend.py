"""What a gateway does with the handles of the engines and of the registry."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)

from spo.config.serving import ServeConfig
from spo.engines.base import confirm
from spo.engines.chat import ChatAnswer, ChatDelta, ChatRequest
from spo.errors import EngineError, SpoError
from spo.serving.metrics import RayMeter
from spo.serving.problems import Problem
from spo.serving.registry import Snapshot

_LOST = (
    ActorDiedError,
    ActorUnavailableError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
_TRIES = 4
_LOG = logging.getLogger(__name__)


class RayBackend:
    """`spo.serving.service.Backend` over the handles of the deployments."""

    def __init__(self, engines: Any, registry: Any, limits: ServeConfig) -> None:
        self._engines = engines
        self._streams = engines.options(stream=True)
        self._registry = registry
        self._limits = limits
        self._snapshot = Snapshot(epoch=-1, entries={})
        self._ready_until = 0.0
        self._meter: RayMeter | None = None

    @property
    def snapshot(self) -> Snapshot:
        return self._snapshot

    async def follow(self, meter: RayMeter) -> asyncio.Task[None]:
        """Read the registry once, then keep up with it in the background."""
        self._meter = meter
        self._take(await self._registry.snapshot.remote())
        return asyncio.create_task(self._keep_up())

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(self._limits.sync_s)
            try:
                self._take(await self._registry.snapshot.remote())
            except Exception as error:  # noqa: BLE001 or this gateway would see no vector again
                # The last snapshot stays in force; the registry restarts from its files.
                _LOG.warning("the registry does not answer: %s", type(error).__name__)

    def _take(self, snapshot: Snapshot) -> None:
        if snapshot.epoch > self._snapshot.epoch:
            self._snapshot = snapshot
            for name, entry in snapshot.entries.items():
                if self._meter is not None:
                    self._meter.live(name, entry.live, entry.canary or 0)

    async def ready(self) -> str:
        loop = asyncio.get_running_loop()
        if loop.time() > self._ready_until:
            try:
                async with asyncio.timeout(5):
                    await self._engines.processes.remote()
            except Exception:  # noqa: BLE001 whatever it is, no engine answered
                return "no engine has passed its canary and answers"
            self._ready_until = loop.time() + 2.0
        return ""

    async def complete(self, request: ChatRequest) -> ChatAnswer:
        for attempt in range(1, _TRIES + 1):
            try:
                answer: ChatAnswer = await self._engines.complete.remote(request)
            except (*_LOST, asyncio.CancelledError) as error:
                await self._pause(attempt, error)
            except Exception as error:
                raise cause_of(error) from error
            else:
                confirm(answer.receipt, request.steering, request.sha256, answer=request.request_id)
                return answer
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def stream(self, request: ChatRequest) -> AsyncIterator[ChatDelta | ChatAnswer]:
        for attempt in range(1, _TRIES + 1):
            started = False
            events = self._streams.stream.remote(request)
            try:
                async for event in events:
                    started = True
                    if isinstance(event, ChatAnswer):
                        confirm(
                            event.receipt,
                            request.steering,
                            request.sha256,
                            answer=request.request_id,
                        )
                    yield event
                return
            except (*_LOST, asyncio.CancelledError) as error:
                if started and not _cancelled_here(error):
                    raise EngineError("the engine was lost in the middle of the answer") from error
                await self._pause(attempt, error)
            except Exception as error:
                raise cause_of(error) from error
            finally:
                events.cancel()

    async def _pause(self, attempt: int, error: BaseException) -> None:
        if _cancelled_here(error):
            raise error
        _LOG.warning("attempt %d: %s; asking another engine", attempt, type(error).__name__)
        if attempt == _TRIES:
            raise EngineError("no engine answered") from error
        await asyncio.sleep(0.25 * 2**attempt)

    async def load(self, name: str, folder: Path, share: float | None) -> Snapshot:
        try:
            version = await self._registry.stage.remote(name, str(folder))
            await self._engines.prove.remote(version)
            self._take(await self._registry.commit.remote(version, share))
        except Exception as error:
            raise cause_of(error) from error
        return self._snapshot

    async def rollback(self, name: str, number: int | None) -> Snapshot:
        return await self._change(self._registry.rollback, name, number)

    async def unload(self, name: str, number: int | None) -> Snapshot:
        return await self._change(self._registry.unload, name, number)

    async def _change(self, method: Any, *args: Any) -> Snapshot:
        try:
            self._take(await method.remote(*args))
        except Exception as error:
            raise cause_of(error) from error
        return self._snapshot


def _cancelled_here(error: BaseException) -> bool:
    """Whether this task itself is being cancelled, not the request in a replica that leaves."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


def cause_of(error: Exception) -> Exception:
    """What was raised on the other side, as this side's own kind of error."""
    if isinstance(error, BackPressureError):
        return Problem(429, "overloaded", "all engines are busy; ask again", retry_after_s=1)
    cause = getattr(error, "cause", error)
    if isinstance(cause, SpoError):
        return cause
    return EngineError(f"the engine failed: {type(cause).__name__}: {cause}")
