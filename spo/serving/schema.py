"""The part of OpenAI's chat schema that is served, and the `steering` extension.

Unknown fields are refused: a misspelt `steering` must not be answered without it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from spo.engines.chat import ChatAnswer
from spo.records import FinishReason, Positions, SteeringReceipt
from spo.serving.registry import Entry, Snapshot

_Name = Annotated[str, Field(min_length=1, max_length=64)]
_Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Body):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Body):
    """Where a picture is: a data URL, or https where the server allows it."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"
    """Accepted for OpenAI's clients; the model has one resolution."""


class ImagePart(_Body):
    """Picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Body):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ContentPart], Field(min_length=1)]
    name: str | None = None


class Steering(_Body):
    """How to steer, in `extra_body={"steering": {...}}`. What is absent, the model name says."""

    vector: _Name | None = None
    version: Annotated[int, Field(ge=0)] | None = None
    coefficient: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Strength; positive removes harm. Its dose is bounded by the server."""
    positions: Positions | None = None


class StreamOptions(_Body):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class ResponseFormat(_Body):
    """Only plain text is made."""

    type: Literal["text"]


class ChatCompletionRequest(_Body):
    """Body of POST /v1/chat/completions."""

    model: Annotated[str, Field(min_length=1, max_length=300)]
    """MODEL:VECTOR, MODEL:VECTOR@VERSION, or MODEL for the unsteered model."""
    messages: Annotated[list[Message], Field(min_length=1)]
    steering: Steering | None = None
    max_tokens: Annotated[int, Field(gt=0)] | None = None
    max_completion_tokens: Annotated[int, Field(gt=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)]
        | None
    ) = None
    frequency_penalty: _Penalty = 0.0
    presence_penalty: _Penalty = 0.0
    ignore_eos: bool = False
    """As in vLLM: go on to `max_tokens`, for measurements."""
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    """Sticks to one side of a canary share."""


class LoadRequest(_Body):
    """Body of POST /v1/steering/vectors."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    artifact: Annotated[str, Field(min_length=1, max_length=255)]
    """Folder below the server's `serve.artifacts_dir`."""
    canary_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of requests that get the new version; absent: all."""


class RollbackRequest(_Body):
    """Body of POST /v1/steering/vectors/{name}/rollback."""

    version: Annotated[int, Field(ge=0)] | None = None
    """Absent: ends a trial, or goes back to what was live before."""


def receipt_json(receipt: SteeringReceipt | None) -> dict[str, Any] | None:
    """The receipt of an answer; None for the unsteered model."""
    return None if receipt is None else {**asdict(receipt), "layers": list(receipt.layers)}


def receipt_header(receipt: SteeringReceipt | None) -> str:
    """The receipt in one line, for `X-SPO-Steering`."""
    if receipt is None:
        return "none"
    return (
        f"vector={receipt.vector}; version={receipt.version}; sha256={receipt.sha256}; "
        f"coefficient={receipt.coefficient:g}; operator={receipt.operator}; "
        f"positions={receipt.positions}"
    )


def finish_reason(finish: FinishReason) -> str:
    """OpenAI's word."""
    return "length" if finish is FinishReason.LENGTH else "stop"


def usage(answer: ChatAnswer) -> dict[str, int]:
    """Token counts."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }


def completion_json(request_id: str, model: str, answer: ChatAnswer) -> dict[str, Any]:
    """A whole answer."""
    return {
        "id": request_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": answer.text},
                "finish_reason": finish_reason(answer.finish),
                "logprobs": None,
            }
        ],
        "usage": usage(answer),
        "steering": receipt_json(answer.receipt),
    }


def chunk_json(
    request_id: str, model: str, delta: Mapping[str, Any], finish: str | None = None
) -> dict[str, Any]:
    """One piece of a streamed answer."""
    return {
        "id": request_id,
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "delta": dict(delta), "finish_reason": finish, "logprobs": None}],
    }


def vectors_json(snapshot: Snapshot) -> dict[str, Any]:
    """All vectors."""
    rows = [vector_json(name, entry) for name, entry in sorted(snapshot.entries.items())]
    return {"object": "list", "epoch": snapshot.epoch, "data": rows}


def vector_json(name: str, entry: Entry) -> dict[str, Any]:
    """One vector with its versions."""
    return {
        "object": "steering.vector",
        "name": name,
        "live": entry.live,
        "canary": entry.canary,
        "canary_share": entry.canary_share,
        "previous": list(entry.previous),
        "versions": [asdict(v) for _, v in sorted(entry.versions.items())],
    }
