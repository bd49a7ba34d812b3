"""The application as a client sees it: schema, scopes, limits, receipts, refusals. No Ray."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from openai import OpenAI
from PIL import Image

from spo.engines.chat import ChatAnswer, ChatDelta, ChatRequest
from spo.errors import EngineError
from tests.local_endpoint import ALL, MODEL, USE, LocalBackend, fake_artifact, local_endpoint
from tests.receipts import WRONG

STEERED = f"{MODEL}:polite"


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def body(model: str = STEERED, **fields: Any) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": "You are the most"}],
        "max_tokens": 6,
        **fields,
    }


@pytest.fixture
def made(tmp_path: Path) -> Iterator[tuple[TestClient, LocalBackend]]:
    app, backend = local_endpoint(tmp_path, max_body_mib=1.0, max_in_flight=2)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client, backend


@pytest.fixture
def client(made: tuple[TestClient, LocalBackend]) -> TestClient:
    return made[0]


@pytest.fixture
def backend(made: tuple[TestClient, LocalBackend]) -> LocalBackend:
    return made[1]


def ask(client: TestClient, secret: str = ALL, **fields: Any) -> Any:
    return client.post("/v1/chat/completions", json=body(**fields), headers=bearer(secret))


def test_a_steered_answer_carries_its_receipt_in_body_and_header(client: TestClient) -> None:
    answer = ask(client)
    assert answer.status_code == 200, answer.text
    receipt = answer.json()["steering"]
    vector = fake_artifact(0.5).vector
    assert receipt["sha256"] == vector.sha256
    assert (receipt["vector"], receipt["version"], receipt["coefficient"]) == ("polite", 1, 0.5)
    assert receipt["layers"] == [1, 2]
    header = answer.headers["x-spo-steering"]
    assert f"sha256={vector.sha256}" in header
    assert "version=1" in header
    assert answer.json()["model"] == f"{STEERED}@1"
    assert answer.json()["usage"]["completion_tokens"] == 6


def test_unsteered_is_asked_for_by_name_and_needs_its_scope(client: TestClient) -> None:
    answer = ask(client, model=MODEL)
    assert answer.status_code == 200
    assert answer.json()["steering"] is None
    assert answer.headers["x-spo-steering"] == "none"
    refused = ask(client, USE, model=MODEL)
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "unsteered_not_allowed"


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"model": "other"}, 404, "model_not_found"),
        ({"model": f"{MODEL}:"}, 404, "model_not_found"),
        ({"model": f"{MODEL}:rude"}, 404, "vector_not_found"),
        ({"model": f"{STEERED}@9"}, 404, "vector_not_found"),
        ({"model": f"{STEERED}@x"}, 404, "model_not_found"),
        ({"stering": {"vector": "polite"}}, 400, "invalid_request"),
        ({"steering": {"coeficient": 1.0}}, 400, "invalid_request"),
        ({"model": MODEL, "steering": {"coefficient": 0.1}}, 400, "no_vector"),
        ({"steering": {"vector": "other"}}, 400, "contradiction"),
        ({"model": f"{STEERED}@1", "steering": {"version": 2}}, 400, "contradiction"),
        ({"steering": {"coefficient": 4.1}}, 400, "dose_too_large"),
        ({"steering": {"coefficient": "NaN"}}, 400, "invalid_request"),
        ({"steering": {"positions": "nowhere"}}, 400, "invalid_request"),
        ({"max_tokens": 100000}, 400, "too_many_tokens"),
        ({"n": 2}, 400, "invalid_request"),
        ({"messages": []}, 400, "invalid_request"),
        ({"tools": []}, 400, "invalid_request"),
        ({"stop": "end"}, 400, "invalid_request"),
    ],
)
def test_what_cannot_be_served_exactly_is_refused(
    client: TestClient, fields: dict[str, Any], status: int, code: str
) -> None:
    answer = ask(client, **fields)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert "steering" not in answer.json()


def test_keys(client: TestClient) -> None:
    assert client.get("/v1/models").status_code == 401
    assert client.get("/v1/models", headers=bearer("spo-wrong")).status_code == 401
    ids = [m["id"] for m in client.get("/v1/models", headers=bearer(ALL)).json()["data"]]
    assert ids == [MODEL, STEERED]
    ids = [m["id"] for m in client.get("/v1/models", headers=bearer(USE)).json()["data"]]
    assert ids == [STEERED]
    load = {"name": "polite", "artifact": "v2"}
    answer = client.post("/v1/steering/vectors", json=load, headers=bearer(USE))
    assert answer.status_code == 403


def manage(client: TestClient, path: str = "", **fields: Any) -> Any:
    return client.post(f"/v1/steering/vectors{path}", json=fields, headers=bearer(ALL))


def version_of(answer: Any) -> int:
    assert answer.status_code == 200, answer.text
    return int(answer.json()["steering"]["version"])


def test_load_canary_promote_roll_back_unload(client: TestClient) -> None:
    loaded = manage(client, name="polite", artifact="v2", canary_share=0.5)
    assert loaded.status_code == 200, loaded.text
    (row,) = loaded.json()["data"]
    assert (row["live"], row["canary"], row["canary_share"]) == (1, 2, 0.5)
    seen = [version_of(ask(client, user=f"user-{i}")) for i in range(40)]
    assert 8 <= seen.count(2) <= 32, "about half of the users are on the trial"
    assert seen == [version_of(ask(client, user=f"user-{i}")) for i in range(40)], "users stay"
    manage(client, name="polite", artifact="v2")
    assert {version_of(ask(client)) for _ in range(8)} == {2}
    assert version_of(ask(client, model=f"{STEERED}@1")) == 1
    assert manage(client, "/polite/rollback").json()["data"][0]["live"] == 1
    assert {version_of(ask(client)) for _ in range(8)} == {1}
    busy = client.delete("/v1/steering/vectors/polite?version=1", headers=bearer(ALL))
    assert busy.status_code == 409
    gone = client.delete("/v1/steering/vectors/polite", headers=bearer(ALL))
    assert gone.json()["data"] == []
    assert ask(client).status_code == 404, "an unloaded vector is not replaced by nothing"


def test_an_engine_makes_room_for_new_names(
    client: TestClient, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend.host, "_max_names", 2)
    for name in ("a", "b", "c"):
        assert manage(client, name=name, artifact="v2").status_code == 200
        assert ask(client, model=f"{MODEL}:{name}").status_code == 200
    held = [name for name in ("polite", "a", "b", "c") if backend.host.engine.holds(name, 1)]
    assert held == ["b", "c"]
    assert version_of(ask(client)) == 1, "what made room is fetched again when it is asked for"


def test_a_vector_that_does_nothing_is_not_put_into_service(client: TestClient) -> None:
    answer = manage(client, name="polite", artifact="idle")
    assert answer.status_code == 409
    assert "changes nothing" in answer.json()["error"]["message"]
    assert version_of(ask(client)) == 1


@pytest.mark.parametrize(
    "name", ["../state/artifacts", "missing", "/etc", "v2\x00", ".", "v2/../.."]
)
def test_only_artifacts_of_the_folder_can_be_loaded(client: TestClient, name: str) -> None:
    answer = manage(client, name="other", artifact=name)
    assert answer.status_code == 409, answer.text


def stream(client: TestClient, **fields: Any) -> list[Any]:
    answer = ask(client, stream=True, **fields)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line[6:] for line in answer.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_a_stream_ends_with_the_receipt(client: TestClient) -> None:
    events = stream(client, seed=3, stream_options={"include_usage": True})
    assert events[-1] == "[DONE]"
    assert events[-2]["usage"]["completion_tokens"] == 6
    assert events[-2]["choices"] == []
    assert events[-3]["steering"]["sha256"] == fake_artifact(0.5).vector.sha256
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-2])
    assert len(text.split()) == 6


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("streamed", [False, True])
def test_an_engine_that_forgets_to_steer_is_found_out(
    client: TestClient,
    backend: LocalBackend,
    monkeypatch: pytest.MonkeyPatch,
    streamed: bool,
    wrong: str,
) -> None:
    steered = backend.host.engine.complete

    async def complete(request: ChatRequest) -> ChatAnswer:
        answer = await steered(request)
        assert answer.receipt is not None
        return replace(answer, text="rude", receipt=WRONG[wrong](answer.receipt))

    async def streaming(request: ChatRequest) -> AsyncIterator[ChatDelta | ChatAnswer]:
        yield await complete(request)

    monkeypatch.setattr(backend.host.engine, "complete", complete)
    monkeypatch.setattr(backend.host.engine, "stream", streaming)
    answer = ask(client, stream=streamed)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "steering_unconfirmed"
    assert "rude" not in answer.text


def test_a_stream_that_breaks_says_so_and_is_not_done(
    client: TestClient, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def streaming(_: ChatRequest) -> AsyncIterator[ChatDelta | ChatAnswer]:
        yield ChatDelta(text="kind")
        raise EngineError("gone")

    monkeypatch.setattr(backend.host.engine, "stream", streaming)
    events = stream(client)
    assert events[-1]["error"]["code"] == "engine_unavailable"
    assert "[DONE]" not in events


def test_the_deadline_ends_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app, backend = local_endpoint(tmp_path, deadline_s=0.2)

    async def slow(_: ChatRequest) -> ChatAnswer:
        await asyncio.sleep(5)
        raise AssertionError("nobody waits this long")

    monkeypatch.setattr(backend.host.engine, "complete", slow)
    with TestClient(app) as client:
        answer = ask(client)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline")


def test_one_too_many_is_refused_at_once(
    client: TestClient, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    honest = backend.host.engine.complete

    async def slow(request: ChatRequest) -> ChatAnswer:
        await asyncio.sleep(0.5)
        return await honest(request)

    monkeypatch.setattr(backend.host.engine, "complete", slow)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: ask(client), range(6)))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [200, 200, 429, 429, 429, 429]
    assert {a.headers.get("retry-after") for a in answers if a.status_code == 429} == {"1"}
    assert ask(client).status_code == 200, "the places were given back"


def test_a_large_body_is_refused(client: TestClient) -> None:
    big = {"messages": [{"role": "user", "content": "x" * (1 << 20)}]}
    assert ask(client, **big).status_code == 413

    def chunks() -> Iterator[bytes]:
        yield json.dumps(body(**big)).encode()

    answer = client.post("/v1/chat/completions", content=chunks(), headers=bearer(ALL))
    assert answer.status_code == 413


def picture_url(size: tuple[int, int] = (8, 6)) -> str:
    data = io.BytesIO()
    Image.new("RGB", size, "red").save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def test_pictures(client: TestClient) -> None:
    parts = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": picture_url()}},
    ]
    assert ask(client, messages=[{"role": "user", "content": parts}]).status_code == 200
    for url, code in (
        ("https://example.com/a.png", "invalid_image"),
        ("file:///etc/passwd", "invalid_image"),
        ("data:image/png;base64,####", "invalid_image"),
        (picture_url((5000, 5000)), "image_too_large"),
    ):
        bad = [{"type": "image_url", "image_url": {"url": url}}]
        answer = ask(client, messages=[{"role": "user", "content": bad}])
        assert answer.json()["error"]["code"] == code, answer.text


def test_the_log_has_the_receipt_and_neither_text_nor_key(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="spo.serving.access"):
        ask(client, messages=[{"role": "user", "content": "a vile secret question"}])
    row = json.loads(caplog.records[-1].getMessage())
    assert row["sha256"] == fake_artifact(0.5).vector.sha256[:16]
    assert (row["status"], row["key"], row["prompt_chars"]) == (200, "all", 22)
    assert "vile" not in caplog.text
    assert ALL not in caplog.text


def test_the_openai_client_works_unchanged(client: TestClient) -> None:
    openai = OpenAI(base_url="http://testserver/v1", api_key=ALL, http_client=client)
    answer = openai.chat.completions.create(
        model=STEERED,
        messages=[{"role": "user", "content": "You are the most"}],
        max_tokens=6,
        extra_body={"steering": {"coefficient": 0.25}},
    )
    assert answer.choices[0].message.content
    assert answer.model_extra is not None
    assert answer.model_extra["steering"]["coefficient"] == 0.25
    pieces = openai.chat.completions.create(
        model=STEERED, messages=[{"role": "user", "content": "You"}], max_tokens=6, stream=True
    )
    chunks = list(pieces)
    assert len("".join(c.choices[0].delta.content or "" for c in chunks).split()) == 6
    assert (chunks[-1].model_extra or {})["steering"]["vector"] == "polite"
    assert [m.id for m in openai.models.list()] == [MODEL, STEERED]
