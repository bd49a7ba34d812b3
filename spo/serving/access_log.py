"""What is told about each request: a JSON log line and figures; never a secret, never the text."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from typing import Protocol

from spo.engines.chat import ChatRequest

_LOG = logging.getLogger("spo.serving.access")


@dataclass(slots=True, kw_only=True)
class AccessRecord:
    """One chat request, filled in as it goes on."""

    request_id: str = ""
    key: str = ""
    """Name of the key, not its secret."""
    vector: str = "none"
    """"none" for the unsteered model."""
    version: int = 0
    sha256: str = ""
    status: int = 500
    code: str = ""
    """Cause of a refusal."""
    streamed: bool = False
    seconds: float = 0.0
    first_token_s: float = 0.0
    """0 unless streamed."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    pictures: int = 0
    prompt_chars: int = 0
    prompt_sha256: str = ""
    """First 16 digits of the hash of the conversation's text, to find repeats."""

    def describe(self, request: ChatRequest) -> None:
        """Take over what may be known of a request."""
        texts = [part for turn in request.turns for part in turn.parts if isinstance(part, str)]
        whole = "\n".join(texts)
        self.request_id = request.request_id
        self.pictures = sum(len(turn.parts) for turn in request.turns) - len(texts)
        self.prompt_chars = len(whole)
        self.prompt_sha256 = hashlib.sha256(whole.encode(errors="replace")).hexdigest()[:16]
        if request.steering is not None:
            self.vector, self.version = request.steering.vector, request.steering.version
            self.sha256 = request.sha256[:16]


def log_to_stderr() -> None:
    """Write the line of each request to this process's log; Ray's workers drop it otherwise."""
    if not _LOG.handlers:
        _LOG.addHandler(logging.StreamHandler())
    _LOG.setLevel(logging.INFO)
    _LOG.propagate = False


class Meter(Protocol):
    """Where figures go."""

    def finished(self, outcome: AccessRecord) -> None:
        """A chat request ended, one way or the other."""
        ...

    def in_flight(self, count: int) -> None:
        """Requests under way in this gateway."""
        ...

    def live(self, vector: str, version: int, canary: int) -> None:
        """The version of a vector that requests get; `canary` is 0 without a trial."""
        ...


class LogMeter:
    """Figures nowhere but in the log."""

    def finished(self, outcome: AccessRecord) -> None:
        """Nothing more."""

    def in_flight(self, count: int) -> None:
        """Nothing more."""

    def live(self, vector: str, version: int, canary: int) -> None:
        """Nothing more."""


def log_outcome(outcome: AccessRecord) -> None:
    """One JSON line."""
    row = asdict(outcome)
    row["seconds"] = round(outcome.seconds, 4)
    row["first_token_s"] = round(outcome.first_token_s, 4)
    level = logging.INFO if outcome.status < 500 else logging.WARNING
    _LOG.log(level, "%s", json.dumps({"event": "chat", **row}))
