"""Conversations on an engine, for serving: asynchronous, streaming, several turns and pictures.

`VllmChatEngine` is the real one; `PlainChatEngine` puts any `Engine` behind the same protocol, one
turn at a time. As everywhere: steered as asked and confirmed by a receipt, or an error.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from PIL import Image

from spo.engines.base import Engine, EngineInfo
from spo.errors import DataError
from spo.records import (
    FinishReason,
    GenerateRequest,
    Prompt,
    PromptKind,
    Sampling,
    SteeringReceipt,
    SteeringSpec,
)
from spo.vector import SteeringVector


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A decoded picture."""

    width: int
    height: int
    rgb: bytes = field(repr=False)
    """height x width x 3 bytes."""

    def open(self) -> Image.Image:
        """As a PIL image."""
        return Image.frombytes("RGB", (self.width, self.height), self.rgb)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One message of a conversation."""

    role: str
    """"system", "user" or "assistant"."""
    parts: tuple[str | Picture, ...] = field(repr=False)
    """Text and pictures in the order in which they were given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """One answer to a conversation."""

    request_id: str
    turns: tuple[Turn, ...]
    sampling: Sampling
    stop: tuple[str, ...] = ()
    """Strings that end the answer; left out of it."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    ignore_eos: bool = False
    """Go on to the token limit, for measurements."""
    steering: SteeringSpec | None = None
    """None asks for the unsteered model."""
    sha256: str = ""
    """Content that the vector of `steering` must have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatDelta:
    """The next piece of an answer under way; steering is confirmed up to here."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatAnswer:
    """A finished answer."""

    text: str
    """The whole text; when streaming, the deltas before it put together."""
    finish: FinishReason
    prompt_tokens: int
    completion_tokens: int
    receipt: SteeringReceipt | None
    """None only where no steering was asked for."""


class ChatEngine(Protocol):
    """A frozen model that answers conversations, steered as each request asks."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def dead(self) -> bool:
        """Whether the engine's own process is gone, so that only a new engine helps."""
        ...

    async def publish(self, name: str, vector: SteeringVector, version: int) -> str:
        """Install a vector; see `Sampler.publish`."""
        ...

    def holds(self, name: str, version: int) -> bool:
        """Whether requests may name that version."""
        ...

    def retire(self, name: str) -> None:
        """Drop all versions of a vector; SteeringError while one is in use."""
        ...

    def stream(self, request: ChatRequest) -> AsyncIterator[ChatDelta | ChatAnswer]:
        """Pieces, then the whole answer. Closing the iterator aborts the request."""
        ...

    async def complete(self, request: ChatRequest) -> ChatAnswer:
        """The whole answer at once."""
        ...

    async def effect(self, spec: SteeringSpec) -> float:
        """Largest change of a log-probability that steering makes on a fixed prompt."""
        ...

    async def check(self, timeout_s: float) -> None:
        """Make one token within the time; EngineError when the engine is dead or stuck."""
        ...

    def close(self) -> None:
        """Give the model's memory and processes back."""
        ...


class PlainChatEngine:
    """Any `Engine` as a chat engine; one user turn with at most one picture, no stop strings.

    Args:
        engine: does one call at a time, in a thread of its own.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._turn = asyncio.Lock()
        self._held: set[tuple[str, int]] = set()

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def dead(self) -> bool:
        return False

    async def publish(self, name: str, vector: SteeringVector, version: int) -> str:
        async with self._turn:
            sha256 = await asyncio.to_thread(self._engine.publish, name, vector, version)
        self._held.add((name, version))
        return sha256

    def holds(self, name: str, version: int) -> bool:
        return (name, version) in self._held

    def retire(self, name: str) -> None:
        self._held = {held for held in self._held if held[0] != name}

    async def stream(self, request: ChatRequest) -> AsyncIterator[ChatDelta | ChatAnswer]:
        answer = await self.complete(request)
        words = answer.text.split(" ")
        for i, word in enumerate(words):
            yield ChatDelta(text=word if i == 0 else f" {word}")
        yield answer

    async def complete(self, request: ChatRequest) -> ChatAnswer:
        with tempfile.TemporaryDirectory(prefix="spo-chat-") as folder:
            prompt = _single_turn(request, Path(folder))
            ask = GenerateRequest(
                request_id=request.request_id,
                prompt=prompt,
                sampling=request.sampling,
                steering=request.steering,
            )
            async with self._turn:
                (rollout,) = await asyncio.to_thread(self._engine.generate, [ask])
        return ChatAnswer(
            text=rollout.text,
            finish=rollout.finish,
            prompt_tokens=len(rollout.prompt_token_ids),
            completion_tokens=len(rollout.token_ids),
            receipt=rollout.receipt,
        )

    async def effect(self, spec: SteeringSpec) -> float:
        from spo.engines.base import LogprobRequest

        prompt = Prompt(prompt_id="canary", text="a b c", kind=PromptKind.HARM)
        asks = [
            LogprobRequest(request_id="canary", prompt=prompt, token_ids=(1, 2), steering=s)
            for s in (None, spec)
        ]
        async with self._turn:
            plain, steered = await asyncio.to_thread(self._engine.logprobs, asks)
        return max(abs(one - other) for one, other in zip(plain, steered, strict=True))

    async def check(self, timeout_s: float) -> None:
        """Nothing but the process itself can die here."""

    def close(self) -> None:
        self._engine.close()


def _single_turn(request: ChatRequest, folder: Path) -> Prompt:
    texts = [p for turn in request.turns for p in turn.parts if isinstance(p, str)]
    pictures = [p for turn in request.turns for p in turn.parts if isinstance(p, Picture)]
    if len(request.turns) != 1 or request.turns[0].role != "user" or len(pictures) > 1:
        raise DataError(
            "this backend answers one user message with at most one picture, got "
            f"{len(request.turns)} messages and {len(pictures)} pictures; serve with "
            "engine.backend=vllm for conversations"
        )
    if request.stop or request.frequency_penalty or request.presence_penalty:
        raise DataError(
            "this backend knows neither stop strings nor penalties; leave them out, or serve with "
            "engine.backend=vllm"
        )
    path = None
    if pictures:
        path = str(folder / "picture.png")
        pictures[0].open().save(path)
    return Prompt(
        prompt_id=request.request_id, text="\n".join(texts), kind=PromptKind.HARM, image=path
    )
