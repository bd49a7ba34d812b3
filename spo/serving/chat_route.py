"""POST /v1/chat/completions: admission, deadline, receipts, server-sent events, one log line."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from spo.engines.chat import ChatAnswer, ChatDelta
from spo.errors import DataError, SpoError, SteeringError
from spo.serving.access_log import AccessRecord, Meter, log_outcome
from spo.serving.keys import Caller, Key
from spo.serving.problems import Problem
from spo.serving.schema import (
    ChatCompletionRequest,
    chunk_json,
    completion_json,
    finish_reason,
    receipt_header,
    receipt_json,
    usage,
)
from spo.serving.service import Admission, Asked, Service, within

_LOG = logging.getLogger(__name__)

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": text,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {
                        "error": {
                            "type": "object",
                            "required": ["message", "type", "code"],
                            "properties": {
                                "message": {"type": "string"},
                                "type": {"type": "string"},
                                "code": {"type": "string"},
                            },
                        }
                    },
                }
            }
        },
    }
    for status, text in {
        400: "The request cannot be answered as it is",
        401: "No key, or an unknown one",
        403: "The key may not do this",
        404: "No such model or vector",
        409: "Not in this state",
        413: "Too large",
        422: "The request cannot be answered as it is",
        429: "All places are taken: ask again after Retry-After seconds",
        503: "No engine answers, or steering could not be confirmed; nothing was answered",
        504: "The deadline has passed",
    }.items()
}


def as_problem(error: Exception) -> Problem:
    """What a client is told about an error of ours."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, TimeoutError):
        return Problem(504, "deadline", "no answer within the server's deadline; ask for less")
    if isinstance(error, DataError):
        return Problem(400, "invalid_request", str(error))
    if isinstance(error, SteeringError):
        message = f"steering could not be confirmed, so there is no answer: {error}"
        return Problem(503, "steering_unconfirmed", message, retry_after_s=2)
    message = "no engine answered; ask again shortly"
    return Problem(503, "engine_unavailable", message, retry_after_s=2)


def chat_route(app: FastAPI, service: Service, meter: Meter) -> None:
    """Add the route to the application."""
    admission = Admission(service.config.max_in_flight, service.config.max_per_key)
    statuses = (400, 401, 403, 404, 413, 429, 503, 504)

    @app.post("/v1/chat/completions", responses={s: ERRORS[s] for s in statuses})
    async def chat(body: ChatCompletionRequest, key: Caller) -> Response:
        """Answer a conversation, steered as the model's name and `steering` say, or refuse."""
        visit = _Visit(service, meter, admission, key)
        return await visit.answer(body)


class _Visit:
    """One chat request from admission to its log line."""

    def __init__(self, service: Service, meter: Meter, admission: Admission, key: Key) -> None:
        self._service = service
        self._meter = meter
        self._admission = admission
        self._key = key
        self._begin = time.monotonic()
        self._inside = False
        self.outcome = AccessRecord(key=key.name)

    async def answer(self, body: ChatCompletionRequest) -> Response:
        self.outcome.streamed = body.stream
        try:
            self._admission.enter(self._key.name)
            self._inside = True
            self._meter.in_flight(self._admission.in_flight)
            asked = await self._service.accept(body, self._key)
            self.outcome.describe(asked.request)
            if body.stream:
                return await self._stream(body, asked)
            answer = await self._whole(asked)
            self._count(answer)
            self.end(200)
            return JSONResponse(
                completion_json(asked.request.request_id, asked.model, answer),
                headers=self._headers(asked, answer),
            )
        except (Problem, SpoError, TimeoutError) as error:
            found = self._refused(error)
            raise found from error
        except BaseException:
            self.end(499, "cancelled")
            raise

    async def _whole(self, asked: Asked) -> ChatAnswer:
        async with asyncio.timeout(self._service.config.deadline_s):
            return await self._service.backend.complete(asked.request)

    async def _stream(self, body: ChatCompletionRequest, asked: Asked) -> Response:
        backend, config = self._service.backend, self._service.config
        events = within(config.deadline_s, backend.stream(asked.request))
        try:
            first = await anext(events)
        except BaseException:
            await events.aclose()
            raise
        self.outcome.first_token_s = time.monotonic() - self._begin
        whole_usage = bool(body.stream_options and body.stream_options.include_usage)
        lines = self._lines(asked, first, events, whole_usage)
        return _EventStream(lines, self._headers(asked, None), self)

    async def _lines(
        self,
        asked: Asked,
        first: ChatDelta | ChatAnswer,
        rest: AsyncGenerator[ChatDelta | ChatAnswer],
        whole_usage: bool,
    ) -> AsyncGenerator[bytes]:
        request_id = asked.request.request_id

        def line(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
            chunk = {**chunk_json(request_id, asked.model, delta, finish), **more}
            return f"data: {json.dumps(chunk)}\n\n".encode()

        async with aclosing(rest):
            yield line({"role": "assistant", "content": ""})
            event = first
            try:
                while isinstance(event, ChatDelta):
                    yield line({"content": event.text})
                    event = await anext(rest)
            except (SpoError, TimeoutError) as error:
                found = self._refused(error)
                yield f"data: {json.dumps(found.body())}\n\n".encode()
                return
            self._count(event)
            yield line({}, finish_reason(event.finish), steering=receipt_json(event.receipt))
            if whole_usage:
                yield line({}, usage=usage(event), choices=[])
            yield b"data: [DONE]\n\n"
            self.end(200)

    def _refused(self, error: Exception) -> Problem:
        found = as_problem(error)
        if found.status >= 500:
            # The client is told what to do; the cause is for whoever runs the server.
            _LOG.warning("%s: %s: %s", self.outcome.request_id, type(error).__name__, error)
        self.end(found.status, found.code)
        return found

    def _headers(self, asked: Asked, answer: ChatAnswer | None) -> dict[str, str]:
        headers = {"X-Request-Id": asked.request.request_id}
        if answer is not None:
            headers["X-SPO-Steering"] = receipt_header(answer.receipt)
        elif asked.request.steering is None:
            headers["X-SPO-Steering"] = "none"
        else:
            # Confirmed by the workers for the first piece; the receipt comes in the last chunk.
            spec = asked.request.steering
            headers["X-SPO-Steering"] = (
                f"vector={spec.vector}; version={spec.version}; sha256={asked.request.sha256}; "
                f"coefficient={spec.coefficient:g}; operator={spec.operator}; "
                f"positions={spec.positions}"
            )
        return headers

    def _count(self, answer: ChatAnswer) -> None:
        self.outcome.prompt_tokens = answer.prompt_tokens
        self.outcome.completion_tokens = answer.completion_tokens

    def end(self, status: int, code: str = "") -> None:
        """Leave, once; whatever comes later does not change the outcome."""
        if self._begin < 0:
            return
        self.outcome.status, self.outcome.code = status, code
        self.outcome.seconds = time.monotonic() - self._begin
        self._begin = -1.0
        if self._inside:
            self._admission.leave(self._key.name)
            self._meter.in_flight(self._admission.in_flight)
        self._meter.finished(self.outcome)
        log_outcome(self.outcome)


class _EventStream(StreamingResponse):
    """Server-sent events; gives the place back however the connection ends."""

    def __init__(
        self, lines: AsyncGenerator[bytes], headers: dict[str, str], visit: _Visit
    ) -> None:
        headers = {**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(lines, media_type="text/event-stream", headers=headers)
        self._lines = lines
        self._visit = visit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._lines.aclose()
            self._visit.end(499, "cancelled")
