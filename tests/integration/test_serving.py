"""The whole endpoint: `jobs.serve`, Ray Serve, real vLLM; swapped and killed under load."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from PIL import Image

from spo.bench.serving import PRESETS, Bench
from spo.bench.serving_load import Load
from spo.bench.serving_server import Server
from spo.bench.serving_table import Result

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow]
START_S = 300.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A running server."""

    bench: Bench
    server: Server
    load: Load
    result: Result

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=self.load.url, api_key=self.load.key, max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def endpoint(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("serving")
    # The shape is not written anew; its name only says which presets have real weights.
    sizes = {**PRESETS["tiny"], "shape": "", "clients": 8, "tokens": 8, "picture": 32}
    bench = Bench(sizes, tiny_llava, folder, START_S, print)
    server, load = bench.steered()
    try:
        asyncio.run(server.wait_ready(time.monotonic() + START_S))
        result = Result(preset="test", path=folder / "results.json")
        yield Endpoint(bench, server, replace(load, seconds=6.0), result)
    finally:
        server.stop()


def picture() -> str:
    data = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def test_curl(endpoint: Endpoint) -> None:
    curl = shutil.which("curl")
    assert curl, "install curl"
    body = {"model": "model:bench", "messages": [{"role": "user", "content": "Hello"}]}
    done = subprocess.run(
        [
            *(curl, "-sS", "-i", f"{endpoint.load.url}/chat/completions"),
            *("-H", f"Authorization: Bearer {endpoint.load.key}"),
            *("-H", "Content-Type: application/json"),
            *("-d", json.dumps({**body, "max_tokens": 4})),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    head, _, text = done.stdout.replace("\r", "").partition("\n\n")
    sha256 = endpoint.bench.versions[1]
    assert f"x-spo-steering: vector=bench; version=1; sha256={sha256}" in head.lower()
    assert json.loads(text)["steering"]["sha256"] == sha256


def test_the_openai_client_with_pictures_turns_and_a_stream(endpoint: Endpoint) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": picture()}},
                {"type": "text", "text": "and"},
                {"type": "image_url", "image_url": {"url": picture()}},
                {"type": "text", "text": "What are these?"},
            ],
        },
    ]
    options = {"messages": messages, "max_tokens": 12, "temperature": 0.0}
    extra = {"ignore_eos": True}
    strong = {**extra, "steering": {"coefficient": 1.5}}
    client = endpoint.client
    plain = client.chat.completions.create(model="model", extra_body=extra, **options)
    steered = client.chat.completions.create(model="model:bench", extra_body=strong, **options)
    assert plain.model_extra is not None
    assert plain.model_extra["steering"] is None
    assert steered.model_extra is not None
    assert steered.model_extra["steering"]["sha256"] == endpoint.bench.versions[1]
    assert plain.choices[0].message.content != steered.choices[0].message.content
    assert plain.usage is not None
    assert plain.usage.prompt_tokens > 2 * 16, "both pictures are in the prompt"
    chunks = list(
        client.chat.completions.create(
            model="model:bench", extra_body=strong, stream=True, **options
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == steered.choices[0].message.content
    assert len(chunks) >= 3
    assert (chunks[-1].model_extra or {})["steering"]["sha256"] == endpoint.bench.versions[1]
    again = client.chat.completions.create(
        model="model:bench",
        extra_body={**extra, "steering": {"coefficient": 0.0}},
        **options,
    )
    assert again.choices[0].message.content == plain.choices[0].message.content


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"messages": [{"role": "user", "content": "<image>"}]}, 400),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, 400),
        ({"steering": {"coefficient": 2.5}}, 400),
        ({"steering": {"version": 7}}, 404),
    ],
    ids=["placeholder", "too long", "dose", "version"],
)
def test_refusals_leave_the_engine_alone(
    endpoint: Endpoint, fields: dict[str, object], status: int
) -> None:
    body = {"model": "model:bench", "messages": [{"role": "user", "content": "Hi"}], **fields}
    answer = httpx.post(
        f"{endpoint.load.url}/chat/completions",
        json={**body, "max_tokens": 4},
        headers={"Authorization": f"Bearer {endpoint.load.key}"},
        timeout=120,
    )
    assert answer.status_code == status, answer.text
    assert endpoint.client.chat.completions.create(
        model="model:bench", messages=[{"role": "user", "content": "Hi"}], max_tokens=4
    ).choices


def test_fifty_swaps_under_load(endpoint: Endpoint) -> None:
    asyncio.run(endpoint.bench.swap(endpoint.load, 50, endpoint.result))
    (row,) = endpoint.result.phases["swapping"]
    assert set(row["statuses"]) == {"200"}, row
    assert (row["checks"]["wrong"], row["checks"]["unsteered"]) == (0, 0)
    assert row["checks"]["versions"] == 2


def test_the_engine_killed_under_load(endpoint: Endpoint) -> None:
    assert endpoint.server.processes("engine"), "vLLM's core is a process of its own"
    endpoint.bench.deadline = time.monotonic() + 240
    asyncio.run(endpoint.bench.kill(endpoint.server, endpoint.load, endpoint.result))
    (row,) = endpoint.result.phases["engine killed"]
    assert (row["checks"]["wrong"], row["checks"]["unsteered"]) == (0, 0)
    assert row["checks"]["answered_after"] > 0, row
    assert set(row["statuses"]) <= {"200", "503", "504"}, row
