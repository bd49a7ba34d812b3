"""Artifacts on the hub: the real client against a folder, a cache and a small server."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import spo
from spo.errors import ArtifactError
from spo.records import Operator, Positions

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "somebody/vector"


def make_artifact() -> spo.SteeringArtifact:
    generator = torch.Generator().manual_seed(5)
    vector = spo.SteeringVector(
        layers=(1, 2),
        directions=torch.randn(2, 6, generator=generator),
        mean_norms=torch.tensor([4.0, 5.0]),
        calibration=torch.zeros(2, 6),
        model_id="somebody/model",
    )
    return spo.SteeringArtifact(
        vector=vector,
        operator=Operator.ADAPTIVE,
        coefficient=0.5,
        positions=Positions.ALL,
        method="pca",
    )


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that one upload and one download need; files in memory."""

    files: dict[str, bytes]
    log: list[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.log.append(f"POST {self.path}")
        if self.path.endswith("/repos/create"):
            assert self.headers["Authorization"] == "Bearer a-token"
            self._json({"url": f"http://{self.headers['Host']}/{REPOSITORY}"})
        elif "/preupload/" in self.path:
            paths = [item["path"] for item in json.loads(body)["files"]]
            answers = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
            self._json({"files": answers})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/{REPOSITORY}/commit/{COMMIT}"
            self._json({"commitUrl": url, "commitOid": COMMIT, "success": True})
        elif self.path.endswith("/validate-yaml"):
            self._json({"errors": [], "warnings": []})
        else:
            self.send_error(404)

    def do_HEAD(self) -> None:
        self._file(body=False)

    def do_GET(self) -> None:
        self.log.append(f"GET {self.path}")
        if "/resolve/" in self.path:
            self._file(body=True)
        elif "/tree/" in self.path:
            self._json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": digest(data)}
                    for name, data in self.files.items()
                ]
            )
        elif self.path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in self.files]
            self._json({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings})
        else:
            self.send_error(404)

    def _file(self, *, body: bool) -> None:
        data = self.files.get(self.path.rpartition("/")[2])
        if data is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{digest(data)}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _json(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Tests read `log`."""


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    handler = type("FreshHub", (Hub,), {"files": {}, "log": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()
    thread.join()


def elsewhere(code: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the client reads its environment when it is imported."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**keep, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_folder_in_hub_layout_is_pulled(tmp_path: Path) -> None:
    made = make_artifact()
    made.save(tmp_path)
    assert spo.pull(tmp_path).vector.sha256 == made.vector.sha256
    (tmp_path / "vector.safetensors").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="do not parse"):
        spo.pull(str(tmp_path))


def test_what_was_fetched_before_is_found_without_a_network(tmp_path: Path) -> None:
    made = make_artifact()
    repository = tmp_path / "hub" / "models--somebody--vector"
    made.save(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    code = f"import spo; print(spo.pull({REPOSITORY!r}).vector.sha256)"
    done = elsewhere(code, tmp_path, HF_HUB_OFFLINE="1")
    assert done.stdout.strip() == made.vector.sha256, done.stderr


def test_pushed_in_one_commit_and_pulled_again(tmp_path: Path, hub: tuple[str, type[Hub]]) -> None:
    address, server = hub
    made = make_artifact()
    made.save(tmp_path / "mine")
    code = (
        f"import spo; print(spo.push(spo.load({str(tmp_path / 'mine')!r}), {REPOSITORY!r})); "
        f"print(spo.pull({REPOSITORY!r}).vector.sha256)"
    )
    done = elsewhere(code, tmp_path / "home", HF_ENDPOINT=address, HF_TOKEN="a-token")
    assert done.returncode == 0, done.stderr + str(server.log)
    url, sha256 = done.stdout.split()
    assert url == f"{address}/{REPOSITORY}/commit/{COMMIT}"
    assert sha256 == made.vector.sha256
    assert set(server.files) == {"vector.safetensors", "manifest.json", "README.md"}
    assert sum("/commit/" in line for line in server.log) == 1
    card = server.files["README.md"].decode()
    assert "base_model: somebody/model" in card
    assert made.vector.sha256 in card


@pytest.mark.parametrize(
    "environment",
    [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}],
    ids=["offline", "nobody answers"],
)
def test_without_a_hub_there_is_one_clear_error(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    make_artifact().save(tmp_path / "mine")
    code = f"""
import spo
made = spo.load({str(tmp_path / "mine")!r})
for call in (
    lambda: spo.pull("somebody/vector"),
    lambda: spo.pull("no such folder"),
    lambda: spo.push(made, "somebody/vector"),
    lambda: spo.push(made, "a/b/c"),
):
    try:
        call()
    except spo.SpoError as error:
        print(error)
"""
    done = elsewhere(code, tmp_path / "home", HF_TOKEN="a-token", **environment)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in said] == [
        "cannot pull 'somebody/vector'",
        "cannot pull 'no such folder'",
        "cannot push to 'somebody/vector'",
        "cannot push to 'a/b/c'",
    ]
    assert all("HF_HUB_OFFLINE and your token" in line for line in said)
