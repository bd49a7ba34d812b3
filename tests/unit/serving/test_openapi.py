"""Property tests from the OpenAPI document: no request makes the server fail."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from tests.local_endpoint import ALL, local_endpoint

EXAMPLES = 20


def test_no_request_makes_the_server_fail(tmp_path: Path) -> None:
    app, _ = local_endpoint(tmp_path, max_tokens=8, default_max_tokens=4)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    statuses: dict[str, set[int]] = {}
    for found in schema.get_all_operations():
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            operation = found.ok()
            statuses.setdefault(operation.label, set()).update(try_many(operation, mode))
    assert len(statuses) >= 8
    assert 200 in statuses["GET /v1/models"]
    assert 400 in statuses["POST /v1/chat/completions"]


def try_many(operation: Any, mode: GenerationMode) -> set[int]:
    """Statuses of many made-up requests to one operation."""
    seen: set[int] = set()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def try_one(case: schemathesis.Case) -> None:
        answer = case.call(headers={"Authorization": f"Bearer {ALL}"})
        assert answer.status_code < 500, f"{case.as_curl_command()}: {answer.text}"
        kind = answer.headers["content-type"][0]
        assert kind.startswith(("application/json", "text/event-stream"))
        seen.add(answer.status_code)

    with contextlib.suppress(Unsatisfiable):  # nothing in it could be wrong
        try_one()
    return seen
