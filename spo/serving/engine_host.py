"""One engine that answers from whatever vectors the registry knows; fetches those it lacks.

An engine that was restarted, or started by autoscaling, comes without vectors: it heals by itself.
A vector goes into service only after a canary has shown that it changes the model's output here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

from spo.artifact import SteeringArtifact
from spo.engines.base import confirm
from spo.engines.chat import ChatAnswer, ChatDelta, ChatEngine, ChatRequest
from spo.errors import SteeringError
from spo.serving.registry import Version

_LOG = logging.getLogger(__name__)
_EFFECT = 1e-6
"""A vector must change some log-probability by more than this."""

Fetch = Callable[[str, int], Awaitable[SteeringArtifact]]


class EngineHost:
    """See the module's text.

    Args:
        engine: the model.
        fetch: gives the artifact of a name and version.
        max_names: vectors that the engine has room for; the longest unused make room for others.
    """

    def __init__(self, engine: ChatEngine, fetch: Fetch, max_names: int) -> None:
        self.engine = engine
        self._fetch = fetch
        self._max_names = max_names
        self._names: dict[str, None] = {}
        self._publishing = asyncio.Lock()
        self._proven: set[tuple[str, int]] = set()

    async def prepare(self, versions: Iterable[Version]) -> None:
        """Publish and prove versions; SteeringError names the first that does nothing."""
        for version in versions:
            await self._ensure(version.name, version.number, version.sha256)

    async def stream(self, request: ChatRequest) -> AsyncIterator[ChatDelta | ChatAnswer]:
        """See `ChatEngine.stream`; the last event's receipt matches the request."""
        await self._ensure_for(request)
        async for event in self.engine.stream(request):
            if isinstance(event, ChatAnswer):
                confirm(event.receipt, request.steering, request.sha256, answer=request.request_id)
            yield event

    async def complete(self, request: ChatRequest) -> ChatAnswer:
        """See `ChatEngine.complete`; the receipt matches the request."""
        await self._ensure_for(request)
        answer = await self.engine.complete(request)
        confirm(answer.receipt, request.steering, request.sha256, answer=request.request_id)
        return answer

    async def _ensure_for(self, request: ChatRequest) -> None:
        spec = request.steering
        if spec is not None:
            self._names[spec.vector] = self._names.pop(spec.vector, None)  # the latest comes last
        if spec is not None and not self._ready(spec.vector, spec.version):
            await self._ensure(spec.vector, spec.version, request.sha256)

    async def _ensure(self, name: str, number: int, sha256: str) -> None:
        async with self._publishing:
            if self._ready(name, number):
                return
            artifact = await self._fetch(name, number)
            if artifact.vector.sha256 != sha256:
                raise SteeringError(
                    f"the registry gives {artifact.vector.sha256[:12]} for {name!r} version "
                    f"{number}, the request wants {sha256[:12]}; nothing was generated"
                )
            self._make_room(name)
            await self.engine.publish(name, artifact.vector, number)
            spec = artifact.spec(name, number)
            effect = await self.engine.effect(spec)
            if not effect > _EFFECT:
                raise SteeringError(
                    f"vector {name!r} version {number} changes nothing in this engine (largest "
                    f"change of a log-probability {effect:.2g}); it was not put into service"
                )
            self._proven.add((name, number))
            _LOG.info("vector %s version %d is live here, effect %.3g", name, number, effect)

    def _make_room(self, name: str) -> None:
        """Retire vectors that were unloaded or not asked for, longest unused first."""
        self._names.setdefault(name)
        for other in [known for known in self._names if known != name]:
            if len(self._names) <= self._max_names:
                return
            try:
                self.engine.retire(other)
            except SteeringError:
                continue  # requests under way still read it
            del self._names[other]

    def _ready(self, name: str, number: int) -> bool:
        return (name, number) in self._proven and self.engine.holds(name, number)
