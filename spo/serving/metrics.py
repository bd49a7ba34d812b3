"""Figures of the endpoint for Prometheus, exported by Ray (names get the prefix `ray_`)."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge, Histogram

from spo.serving.access_log import AccessRecord

_SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0]
_TAGS = ("vector", "version")


class RayMeter:
    """`spo.serving.access_log.Meter` on Ray's metrics."""

    def __init__(self) -> None:
        self._requests = Counter(
            "spo_serve_requests",
            description="Chat requests by status, cause and vector.",
            tag_keys=("status", "code", *_TAGS),
        )
        self._seconds = Histogram(
            "spo_serve_seconds",
            description="Seconds from a request to its last token.",
            boundaries=_SECONDS,
            tag_keys=_TAGS,
        )
        self._first = Histogram(
            "spo_serve_first_token_seconds",
            description="Seconds to the first piece of a streamed answer.",
            boundaries=_SECONDS,
            tag_keys=_TAGS,
        )
        self._tokens = Counter(
            "spo_serve_tokens",
            description="Tokens of answered requests.",
            tag_keys=("kind", *_TAGS),
        )
        self._in_flight = Gauge(
            "spo_serve_in_flight", description="Requests under way in a gateway."
        )
        self._live = Gauge(
            "spo_serve_live_version",
            description="Version of a vector that requests get.",
            tag_keys=("vector", "role"),
        )

    def finished(self, outcome: AccessRecord) -> None:
        tags = {"vector": outcome.vector, "version": str(outcome.version)}
        self._requests.inc(1, {**tags, "status": str(outcome.status), "code": outcome.code})
        if outcome.status != 200:
            return
        self._seconds.observe(max(outcome.seconds, 1e-6), tags)
        if outcome.first_token_s > 0:
            self._first.observe(outcome.first_token_s, tags)
        for kind, count in (
            ("prompt", outcome.prompt_tokens),
            ("completion", outcome.completion_tokens),
        ):
            if count > 0:
                self._tokens.inc(count, {**tags, "kind": kind})

    def in_flight(self, count: int) -> None:
        self._in_flight.set(count)

    def live(self, vector: str, version: int, canary: int) -> None:
        self._live.set(version, {"vector": vector, "role": "live"})
        self._live.set(canary, {"vector": vector, "role": "canary"})


class EngineGauges:
    """Figures of an engine replica."""

    def __init__(self) -> None:
        self._running = Gauge(
            "spo_serve_engine_requests", description="Requests that an engine replica works on."
        )

    def running(self, count: int) -> None:
        """Requests under way."""
        self._running.set(count)
