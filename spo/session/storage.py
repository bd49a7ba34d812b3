"""Run folders on remote storage (S3 and what else pyarrow knows), through a local mirror.

Code reads and writes `config.run_dir` as a folder. When `output_dir` is a URL, `mirrored` copies
what the URL holds into that folder first, copies changed files back while the job runs and again
when it ends; the newer copy of a file wins. Ray Train's checkpoints go to the URL directly, from
whichever node the learner is on, and are never copied. On a cluster of several nodes the local
folder (in `cache_dir`) must be one that all of them mount: they write Parquet into it.
"""

from __future__ import annotations

import functools
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from spo.errors import DataError

_OWNED_BY_RAY = ("train-",)
"""Beginnings of paths, relative to the run, that Ray Train writes to the URL itself."""
_PERIOD_S = 10.0
_CONNECT_S, _REQUEST_S = 5.0, 15.0
_PENDING = ".part"
_CHUNK = 1 << 22


def open_location(location: str) -> tuple[Any, str]:
    """File system and path of a folder or URL.

    S3 reads the standard variables AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, ... and gives
    up after seconds, not minutes, when nothing answers.

    Raises:
        DataError: the scheme is unknown or the URL malformed.
    """
    try:
        found, path = fs.FileSystem.from_uri(location if "://" in location else _absolute(location))
    except (ValueError, OSError) as error:
        raise DataError(
            f"{location!r} is no folder and no URL that can be opened ({error}); expected for "
            "instance s3://bucket/prefix or gs://bucket/prefix"
        ) from error
    if isinstance(found, fs.S3FileSystem):
        found = _impatient_s3(found.region)
    return found, path


def _absolute(folder: str) -> str:
    return str(Path(folder).expanduser().absolute())


@functools.cache
def _impatient_s3(region: str) -> Any:
    """The default client waits minutes for a host that does not answer."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return fs.S3FileSystem(
        region=region,
        endpoint_override=endpoint,
        connect_timeout=_CONNECT_S,
        request_timeout=_REQUEST_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=2),
    )


def check_writable(location: str) -> None:
    """Write, read and delete a small object.

    Raises:
        DataError: one of these failed; says which and what to check.
    """
    system, path = open_location(location)
    name = f"{path.rstrip('/')}/.probe-{uuid.uuid4().hex}"
    done = "written"
    try:
        system.create_dir(path, recursive=True)
        with system.open_output_stream(name) as file:
            file.write(b"spo")
        done = "read back"
        with system.open_input_stream(name) as file:
            same = file.read() == b"spo"
        done = "deleted from"
        system.delete_file(name)
    except (OSError, pa.ArrowInvalid) as error:
        hint = (
            "check that the bucket exists, AWS_ENDPOINT_URL, the credentials and the network"
            if location.startswith("s3://")
            else "check that it exists, is mounted on this node and belongs to this user"
        )
        raise DataError(f"storage {location} cannot be {done}: {error}; {hint}") from error
    if not same:
        raise DataError(f"storage {location} returned other bytes than were written; repair it")


class Mirror:
    """A local folder and the URL that it mirrors.

    Args:
        url: where the run is kept.
        folder: local copy; made if it does not exist.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self._url = url
        self._folder = folder
        self._system, self._path = open_location(url)
        self._seen: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def pull(self) -> list[str]:
        """Fetch what is missing here or newer there; returns the names."""
        self._folder.mkdir(parents=True, exist_ok=True)
        fetched = []
        with self._telling("read"):
            selector = fs.FileSelector(self._path, recursive=True, allow_not_found=True)
            for info in self._system.get_file_info(selector):
                name = info.path.removeprefix(self._path).lstrip("/")
                if info.type is not fs.FileType.File or not _mirrored(name):
                    continue
                target = self._folder / name
                stamp = info.mtime_ns or 0
                if target.is_file() and target.stat().st_mtime_ns >= stamp:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(f".{target.name}.{uuid.uuid4().hex}{_PENDING}")
                with self._system.open_input_stream(info.path) as source, part.open("wb") as file:
                    while chunk := source.read(_CHUNK):
                        file.write(chunk)
                os.utime(part, ns=(stamp, stamp))
                part.replace(target)
                self._seen[name] = _state(target)
                fetched.append(name)
        return fetched

    def push(self) -> list[str]:
        """Send what changed here since the last `pull` or `push`; returns the names.

        A file that this mirror had sent or fetched and that is gone here is deleted there too.
        """
        with self._lock, self._telling("written"):
            files = {name: path for name, path in self._local_files() if _mirrored(name)}
            sent = []
            for name, path in files.items():
                with suppress(FileNotFoundError):  # replaced while we looked: the next push sees it
                    state = _state(path)
                    if self._seen.get(name) != state:
                        self._send(path, name)
                        self._seen[name] = state
                        sent.append(name)
            for name in [name for name in self._seen if name not in files]:
                with suppress(FileNotFoundError):
                    self._system.delete_file(f"{self._path}/{name}")
                del self._seen[name]
        return sent

    def _send(self, path: Path, name: str) -> None:
        there = f"{self._path}/{name}"
        with path.open("rb") as file, self._system.open_output_stream(there) as out:
            while chunk := file.read(_CHUNK):
                out.write(chunk)

    def _local_files(self) -> Iterator[tuple[str, Path]]:
        for path in sorted(self._folder.rglob("*")):
            if path.is_file() and not path.name.endswith(_PENDING):
                yield path.relative_to(self._folder).as_posix(), path

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"storage {self._url} cannot be {what}: {error}; the local copy is complete in "
                f"{self._folder}. Run the same command again when the storage answers"
            ) from error


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def _mirrored(name: str) -> bool:
    return not name.startswith(_OWNED_BY_RAY) and not Path(name).name.startswith(".probe-")


@contextmanager
def mirrored(
    url: str | None, folder: Path, *, warn: Callable[[str], None], period_s: float = _PERIOD_S
) -> Iterator[None]:
    """Keep `folder` and `url` the same around a job; does nothing without a URL.

    Args:
        url: where the run is kept; None when `folder` is the place itself.
        folder: local copy.
        warn: told when a copy made while the job runs fails; the next one tries again.
        period_s: seconds between copies.

    Raises:
        DataError: the storage cannot be written at the start, or at the end.
    """
    if url is None:
        yield
        return
    check_writable(url)
    mirror = Mirror(url, folder)
    mirror.pull()
    stop = threading.Event()

    def keep_pushing() -> None:
        while not stop.wait(period_s):
            try:
                mirror.push()
            except DataError as error:
                warn(str(error))

    thread = threading.Thread(target=keep_pushing, name="mirror", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        mirror.push()
