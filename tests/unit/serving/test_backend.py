"""What a gateway makes of errors that come back from an engine's replica."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from spo.config.serving import ServeConfig
from spo.engines.base import receipt_for
from spo.engines.chat import ChatAnswer, ChatRequest, Turn
from spo.errors import EngineError, SteeringError
from spo.records import FinishReason, Sampling, SteeringSpec
from spo.serving import backend as serve_backend
from spo.serving.backend import RayBackend
from tests.local_endpoint import fake_artifact
from tests.receipts import WRONG

ANSWER = ChatAnswer(
    text="yes", finish=FinishReason.STOP, prompt_tokens=1, completion_tokens=1, receipt=None
)
REQUEST = ChatRequest(
    request_id="r", turns=(Turn(role="user", parts=("hi",)),), sampling=Sampling(max_tokens=1)
)


class Events:
    """A stream that ends in an error, or in the answer."""

    def __init__(self, error: BaseException | None, answer: ChatAnswer) -> None:
        self._error = error
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[ChatAnswer]:
        if self._error is not None:
            raise self._error
        yield self._answer

    def cancel(self) -> None:
        """Nothing runs."""


class Engines:
    """The handle of engines that answer as told, one error a call."""

    def __init__(self, *errors: BaseException, answer: ChatAnswer = ANSWER) -> None:
        self._errors = list(errors)
        self._answer = answer
        self.complete = SimpleNamespace(remote=self._complete)
        self.stream = SimpleNamespace(remote=lambda _: Events(self._next(), self._answer))

    def options(self, **_: Any) -> Engines:
        return self

    def _next(self) -> BaseException | None:
        return self._errors.pop(0) if self._errors else None

    async def _complete(self, _: ChatRequest) -> ChatAnswer:
        error = self._next()
        if error is not None:
            raise error
        return self._answer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(_: float) -> None:
        return None

    monkeypatch.setattr(serve_backend.asyncio, "sleep", at_once)


def ask(engines: Engines, *, stream: bool, request: ChatRequest = REQUEST) -> Any:
    backend = RayBackend(engines, None, ServeConfig())

    async def whole() -> Any:
        if not stream:
            return await backend.complete(request)
        return [event async for event in backend.stream(request)][-1]

    return asyncio.run(whole())


@pytest.mark.parametrize("stream", [False, True])
def test_a_lost_or_leaving_replica_is_asked_again(stream: bool) -> None:
    assert ask(Engines(ActorDiedError(), asyncio.CancelledError()), stream=stream) == ANSWER


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_was_not_steered_as_asked_does_not_pass(stream: bool, wrong: str) -> None:
    spec = SteeringSpec(vector="polite", version=1, coefficient=0.5)
    vector = fake_artifact(0.5).vector
    right = receipt_for(spec, vector)
    request = replace(REQUEST, steering=spec, sha256=vector.sha256)
    good = replace(ANSWER, receipt=right)
    assert ask(Engines(answer=good), stream=stream, request=request) == good
    bad = replace(ANSWER, receipt=WRONG[wrong](right))
    with pytest.raises(SteeringError, match="the answer is not used"):
        ask(Engines(answer=bad), stream=stream, request=request)
    with pytest.raises(SteeringError, match="asked for no steering"):
        ask(Engines(answer=good), stream=stream)


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_any_kind_becomes_one_of_ours(stream: bool) -> None:
    with pytest.raises(EngineError, match="RuntimeError: out of memory"):
        ask(Engines(RuntimeError("out of memory")), stream=stream)
    with pytest.raises(SteeringError, match="no receipt"):
        ask(Engines(SteeringError("no receipt")), stream=stream)
    with pytest.raises(EngineError, match="no engine answered"):
        ask(Engines(*[ActorDiedError() for _ in range(4)]), stream=stream)


def test_a_caller_that_goes_away_is_not_asked_for_again() -> None:
    engines = Engines()
    started = asyncio.Event()

    async def forever(_: ChatRequest) -> ChatAnswer:
        started.set()
        await asyncio.Event().wait()
        return ANSWER

    engines.complete = SimpleNamespace(remote=forever)
    backend = RayBackend(engines, None, ServeConfig())

    async def leave() -> None:
        asked = asyncio.create_task(backend.complete(REQUEST))
        await started.wait()
        asked.cancel()
        await asked

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(leave())
