"""The dashboards that the field already uses, on a sweep's files: Optuna's, TensorBoard, Ray's."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from spo.errors import DataError, StageError
from spo.sweep.plan import SweepFolder

HOST = "127.0.0.1"
_START_S = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """A running dashboard."""

    name: str
    url: str
    process: subprocess.Popen[bytes]

    def wait(self, seconds: float) -> None:
        """Until it ends, at most so long."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=seconds)


@contextmanager
def dashboards(
    folder: SweepFolder, *, optuna_port: int = 8080, tensorboard_port: int = 6006
) -> Iterator[list[Board]]:
    """Optuna's dashboard and TensorBoard on a sweep, running or finished; ended with the block.

    They listen on this machine only; reach them from elsewhere by a tunnel. A port that is taken is
    replaced by a free one.

    Raises:
        DataError: there is no sweep.
        StageError: a dashboard does not answer; the message names its log.
    """
    if not folder.storage.is_file():
        raise DataError(f"{folder.path} holds no sweep; run jobs.sweep on it first")
    folder.tensorboard.mkdir(exist_ok=True)
    boards: list[Board] = []
    try:
        port = _free_port(optuna_port)
        command = ["-c", "from optuna_dashboard._cli import main; main()"]
        arguments = [f"sqlite:///{folder.storage}", "--host", HOST, "--port", str(port), "--quiet"]
        boards.append(_start("Optuna dashboard", [*command, *arguments], port, folder.path))
        port = _free_port(tensorboard_port)
        arguments = ["--logdir", str(folder.tensorboard), "--host", HOST, "--port", str(port)]
        boards.append(
            _start("TensorBoard", ["-m", "tensorboard.main", *arguments], port, folder.path)
        )
        for board in boards:
            _wait(board, folder.path)
        yield boards
    finally:
        for board in boards:
            board.process.terminate()
        for board in boards:
            try:
                board.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                board.process.kill()
                board.process.wait(timeout=10)


def links(boards: list[Board], folder: SweepFolder, ray_url: str | None) -> str:
    """What to open, one line each."""
    lines = [f"{board.name}: {board.url}" for board in boards]
    lines = [f"{line}#timeseries" if "TensorBoard" in line else line for line in lines]
    if boards:
        lines.append(f"TensorBoard, settings against objectives: {boards[-1].url}#hparams")
    if ray_url:
        lines.append(f"Ray dashboard: http://{ray_url}")
    if folder.report.is_file():
        lines.append(f"report: {folder.report}")
    return "\n".join(lines)


def _start(name: str, command: list[str], port: int, folder: Path) -> Board:
    with _log(name, folder).open("wb") as log:
        process = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log)
    return Board(name=name, url=f"http://{HOST}:{port}/", process=process)


def _log(name: str, folder: Path) -> Path:
    return folder / f"{name.lower().replace(' ', '-')}.log"


def _wait(board: Board, folder: Path) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and board.process.poll() is None:
        try:
            with urllib.request.urlopen(board.url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise StageError(
        f"{board.name} does not answer at {board.url} within {_START_S} s; see "
        f"{_log(board.name, folder)}"
    )


def _free_port(wanted: int) -> int:
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise StageError(f"no port is free on {HOST}; end a program that listens there")
