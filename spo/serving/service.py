"""From a client's request to the engine's: names, limits, doses, pictures, routing, deadlines."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from spo.config.serving import ServeConfig
from spo.engines.chat import ChatAnswer, ChatDelta, ChatRequest, Picture, Turn
from spo.errors import SteeringError
from spo.records import Sampling
from spo.serving.keys import Key, Scope
from spo.serving.pictures import PictureLimits, open_picture
from spo.serving.problems import Problem
from spo.serving.registry import Snapshot, Version
from spo.serving.schema import ChatCompletionRequest, ImagePart, Message, Steering

_MIB = 1 << 20


class Backend(Protocol):
    """The engines and the registry behind the application."""

    @property
    def snapshot(self) -> Snapshot:
        """What to route by."""
        ...

    async def ready(self) -> str:
        """ "" when an engine has passed its canary and answers, else what is missing."""
        ...

    async def complete(self, request: ChatRequest) -> ChatAnswer:
        """The whole answer, its receipt checked."""
        ...

    def stream(self, request: ChatRequest) -> AsyncIterator[ChatDelta | ChatAnswer]:
        """The answer in pieces, the last one with its checked receipt."""
        ...

    async def load(self, name: str, folder: Path, share: float | None) -> Snapshot:
        """Prove an artifact on an engine, then route requests to it."""
        ...

    async def rollback(self, name: str, number: int | None) -> Snapshot:
        """See `VectorRegistry.rollback`."""
        ...

    async def unload(self, name: str, number: int | None) -> Snapshot:
        """See `VectorRegistry.unload`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request that may go to an engine."""

    request: ChatRequest
    model: str
    """Name that the answer carries."""


class Service:
    """See the module's text.

    Args:
        config: names and limits.
        model: name of the unsteered model.
        backend: routes and answers.
    """

    def __init__(self, config: ServeConfig, model: str, backend: Backend) -> None:
        self.config = config
        self.model = model
        self.backend = backend
        self.pictures = PictureLimits(
            max_bytes=int(config.max_image_mib * _MIB),
            max_pixels=config.max_pixels,
            hosts=tuple(host.lower() for host in config.image_hosts),
            timeout_s=config.image_timeout_s,
        )

    def models(self, key: Key) -> list[str]:
        """Names that a key may ask for: the unsteered model first, then one for each vector."""
        base = [self.model] if self._may_ask_unsteered(key) else []
        if Scope.USE not in key.scopes:
            return base
        return base + [f"{self.model}:{name}" for name in sorted(self.backend.snapshot.entries)]

    def _may_ask_unsteered(self, key: Key) -> bool:
        return self.config.unsteered and Scope.UNSTEERED in key.scopes

    async def accept(self, body: ChatCompletionRequest, key: Key) -> Asked:
        """Check everything about a request that can be checked here; Problem names the fault."""
        request_id = f"chatcmpl-{uuid.uuid4().hex}"
        version, steering = self._steered_by(body, key, body.user or request_id)
        tokens = body.max_completion_tokens or body.max_tokens or self.config.default_max_tokens
        if tokens > self.config.max_tokens:
            raise Problem(
                400,
                "too_many_tokens",
                f"at most {self.config.max_tokens} tokens may be asked for, got {tokens}",
            )
        if len(body.messages) > self.config.max_messages:
            raise Problem(
                400, "too_many_messages", f"at most {self.config.max_messages} messages are taken"
            )
        turns = await self._turns(body.messages)
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        request = ChatRequest(
            request_id=request_id,
            turns=turns,
            sampling=Sampling(
                max_tokens=tokens,
                temperature=body.temperature,
                top_p=body.top_p,
                seed=body.seed,
            ),
            stop=stop,
            frequency_penalty=body.frequency_penalty,
            presence_penalty=body.presence_penalty,
            ignore_eos=body.ignore_eos,
            steering=version.spec(steering.coefficient, steering.positions) if version else None,
            sha256=version.sha256 if version else "",
        )
        name = f"{self.model}:{version.name}@{version.number}" if version else self.model
        return Asked(request=request, model=name)

    def _steered_by(
        self, body: ChatCompletionRequest, key: Key, ticket: str
    ) -> tuple[Version | None, Steering]:
        base, colon, rest = body.model.partition(":")
        name, _, number = rest.partition("@")
        if base != self.model or (colon and not name) or (number and not number.isdecimal()):
            raise self._unknown(body.model, key)
        steering = body.steering or Steering()
        if steering.vector is not None and name and steering.vector != name:
            raise Problem(
                400,
                "contradiction",
                f"the model name says vector {name!r} and steering says {steering.vector!r}; "
                "name one",
            )
        name = steering.vector or name
        if not name:
            if body.steering is not None:
                raise Problem(
                    400,
                    "no_vector",
                    f"steering names no vector; ask for {self.model}:VECTOR or set steering.vector",
                )
            if not self._may_ask_unsteered(key):
                raise Problem(
                    403,
                    "unsteered_not_allowed",
                    f"{self.model!r} is the unsteered model and this key may not ask for it; it "
                    f"may ask for {self.models(key)}",
                )
            return None, steering
        if Scope.USE not in key.scopes:
            raise Problem(403, "not_allowed", "this key has no scope 'use'")
        pinned = int(number) if number else None
        wanted = pinned if steering.version is None else steering.version
        if pinned is not None and wanted != pinned:
            raise Problem(400, "contradiction", "the model name and steering name two versions")
        try:
            version = self.backend.snapshot.route(name, wanted, ticket)
        except SteeringError as error:
            raise Problem(404, "vector_not_found", f"{error}") from error
        self._check_dose(version, steering.coefficient)
        return version, steering

    def _unknown(self, model: str, key: Key) -> Problem:
        return Problem(
            404,
            "model_not_found",
            f"no model {model[:100]!r}; this key may ask for {self.models(key)}",
        )

    def _check_dose(self, version: Version, coefficient: float | None) -> None:
        if coefficient is None:
            return
        dose = version.dose(coefficient)
        if dose > self.config.max_dose:
            raise Problem(
                400,
                "dose_too_large",
                f"coefficient {coefficient:g} of {version.name!r} is a dose of {dose:.3g} times "
                f"the hidden norm, at most {self.config.max_dose:g} is allowed",
            )

    async def _turns(self, messages: list[Message]) -> tuple[Turn, ...]:
        count = sum(
            isinstance(part, ImagePart)
            for m in messages
            if isinstance(m.content, list)
            for part in m.content
        )
        if count > self.config.max_images:
            raise Problem(
                400, "too_many_images", f"at most {self.config.max_images} pictures, got {count}"
            )
        turns = []
        for message in messages:
            role = "system" if message.role == "developer" else message.role
            parts: list[str | Picture] = []
            if isinstance(message.content, str):
                parts.append(message.content)
            else:
                for part in message.content:
                    if isinstance(part, ImagePart):
                        parts.append(await open_picture(part.image_url.url, self.pictures))
                    else:
                        parts.append(part.text)
            turns.append(Turn(role=role, parts=tuple(parts)))
        return tuple(turns)


class Admission:
    """Counts requests under way; one too many is refused at once instead of queued.

    Args:
        limit: of all keys together.
        per_key: of one key.
    """

    def __init__(self, limit: int, per_key: int) -> None:
        self._limit = limit
        self._per_key = per_key
        self._of: dict[str, int] = {}
        self.in_flight = 0

    def enter(self, key: str) -> None:
        """Take a place, or Problem 429."""
        if self.in_flight >= self._limit or self._of.get(key, 0) >= self._per_key:
            whose = "this key's" if self.in_flight < self._limit else "all"
            raise Problem(
                429, "overloaded", f"{whose} places are taken; ask again shortly", retry_after_s=1
            )
        self.in_flight += 1
        self._of[key] = self._of.get(key, 0) + 1

    def leave(self, key: str) -> None:
        """Give the place back."""
        self.in_flight -= 1
        self._of[key] -= 1
        if not self._of[key]:
            del self._of[key]


async def within(
    deadline_s: float, events: AsyncIterator[ChatDelta | ChatAnswer]
) -> AsyncGenerator[ChatDelta | ChatAnswer]:
    """The events, or TimeoutError once the deadline has passed."""
    end = asyncio.get_running_loop().time() + deadline_s
    try:
        while True:
            async with asyncio.timeout_at(end):
                try:
                    event = await anext(events)
                except StopAsyncIteration:
                    return
            yield event
    finally:
        close = getattr(events, "aclose", None)
        if close is not None:
            await close()
