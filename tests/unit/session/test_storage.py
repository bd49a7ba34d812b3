"""Run folders on a real S3 server (moto's) and in folders."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spo.errors import DataError
from spo.session import storage
from tests.object_store import BUCKET, s3_server


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with s3_server() as settings:
        storage._impatient_s3.cache_clear()
        yield settings
    storage._impatient_s3.cache_clear()


def contents(url: str) -> dict[str, bytes]:
    """Every object under a URL, by its name relative to it."""
    system, path = storage.open_location(url)
    selector = storage.fs.FileSelector(path, recursive=True, allow_not_found=True)
    return {
        info.path.removeprefix(path).lstrip("/"): system.open_input_stream(info.path).read()
        for info in system.get_file_info(selector)
        if info.type is storage.fs.FileType.File
    }


@pytest.mark.usefixtures("s3")
def test_a_run_moves_to_another_machine(tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/moves/run"
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    (here / "stage1").mkdir()
    (here / "stage1" / "manifest.json").write_text("{}")
    (here / "history.jsonl").write_text('{"step": 0}\n')
    first = storage.Mirror(url, here)
    assert first.push() == ["history.jsonl", "stage1/manifest.json"]
    assert first.push() == []
    second = storage.Mirror(url, there)
    assert second.pull() == ["history.jsonl", "stage1/manifest.json"]
    with (there / "history.jsonl").open("a") as file:
        file.write('{"step": 1}\n')
    (there / "stage1" / "manifest.json").unlink()
    assert second.push() == ["history.jsonl"]
    assert contents(url) == {"history.jsonl": b'{"step": 0}\n{"step": 1}\n'}


@pytest.mark.usefixtures("s3")
def test_what_was_not_sent_before_a_kill_is_kept(tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/killed/run"
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "history.jsonl").write_text("old\n")
    storage.Mirror(url, folder).push()
    time.sleep(1.1)  # object times are whole seconds
    (folder / "history.jsonl").write_text("old\nnew\n")
    after = storage.Mirror(url, folder)
    assert after.pull() == []
    assert (folder / "history.jsonl").read_text() == "old\nnew\n"
    assert after.push() == ["history.jsonl"]


@pytest.mark.usefixtures("s3")
def test_what_ray_wrote_to_the_url_is_left_there(tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/direct/run"
    system, path = storage.open_location(url)
    for name in ("train-1/checkpoint_0/state.json", "x.json"):
        with system.open_output_stream(f"{path}/{name}") as file:
            file.write(b"1")
    mirror = storage.Mirror(url, tmp_path / "run")
    assert mirror.pull() == ["x.json"]
    mirror.push()
    assert set(contents(url)) == {"train-1/checkpoint_0/state.json", "x.json"}


@pytest.mark.usefixtures("s3")
def test_a_job_sends_while_it_runs_and_when_it_fails(tmp_path: Path) -> None:
    url, folder = f"s3://{BUCKET}/fails/run", tmp_path / "run"

    def work() -> None:
        (folder / "early").write_text("1")
        deadline = time.monotonic() + 10
        while "early" not in contents(url):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (folder / "late").write_text("2")
        raise RuntimeError("the job failed")

    with (
        pytest.raises(RuntimeError, match="the job failed"),
        storage.mirrored(url, folder, warn=pytest.fail, period_s=0.1),
    ):
        work()
    assert contents(url) == {"early": b"1", "late": b"2"}


@pytest.mark.usefixtures("s3")
def test_a_missing_bucket_is_said_before_anything_starts(tmp_path: Path) -> None:
    with (
        pytest.raises(
            DataError, match=r"s3://nowhere/run cannot be written.*check that the bucket"
        ),
        storage.mirrored("s3://nowhere/run", tmp_path / "run", warn=print),
    ):
        pytest.fail("the job must not begin")


def test_a_server_that_does_not_answer_is_given_up_within_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    storage._impatient_s3.cache_clear()
    begin = time.monotonic()
    with pytest.raises(DataError, match="AWS_ENDPOINT_URL"):
        storage.check_writable(f"s3://{BUCKET}/run")
    assert time.monotonic() - begin < 30
    storage._impatient_s3.cache_clear()


def test_a_url_that_nobody_knows() -> None:
    with pytest.raises(DataError, match=r"expected for instance s3://bucket/prefix"):
        storage.open_location("ftp://host/runs")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        storage.check_writable(str(tmp_path / "file" / "run"))
    storage.check_writable(str(tmp_path / "new" / "run"))
    assert list((tmp_path / "new" / "run").iterdir()) == []


def test_a_folder_needs_no_mirror(tmp_path: Path) -> None:
    with storage.mirrored(None, tmp_path / "run", warn=print):
        pass
    assert not (tmp_path / "run").exists()
    assert os.listdir(tmp_path) == []
