"""Property tests from the OpenAPI document: no request makes the server fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from tests.local_endpoint import ALL, local_endpoint


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> schemathesis.schemas.BaseSchema:
    folder: Path = tmp_path_factory.mktemp("endpoint")
    app, _ = local_endpoint(folder, max_tokens=8, default_max_tokens=4)
    return schemathesis.openapi.from_asgi("/openapi.json", app)


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_makes_the_server_fail(case: schemathesis.Case) -> None:
    answer = case.call(headers={"Authorization": f"Bearer {ALL}"})
    assert answer.status_code < 500, answer.text
    case.validate_response(
        answer,
        checks=[
            schemathesis.checks.not_a_server_error,
            *schemathesis.checks.CHECKS.get_by_names(
                ["status_code_conformance", "content_type_conformance"]
            ),
        ],
    )
