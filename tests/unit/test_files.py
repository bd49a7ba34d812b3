"""Files are there whole or not at all."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from spo.errors import ArtifactError
from spo.files import replaced, write_atomic


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, b"old")

    def fail() -> None:
        with replaced(path) as part:
            part.write_bytes(b"ne")
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        fail()
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot write .*none/a\.json"):
        write_atomic(tmp_path / "none" / "a.json", b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match=r"cannot write .*folder"):
        write_atomic(tmp_path / "folder", b"x")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_permissions_are_those_asked_for(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        write_atomic(tmp_path / "open", b"x")
        write_atomic(tmp_path / "secret", b"x", mode=0o600)
    finally:
        os.umask(mask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"open": 0o644, "secret": 0o600}


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "picture"
    contents = [bytes([i]) * 100_000 for i in range(8)]
    threads = [threading.Thread(target=write_atomic, args=(path, c)) for c in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]
