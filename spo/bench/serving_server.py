"""A server of the serving benchmark, in a process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

import aiohttp
import psutil

from spo.errors import EngineError


class Server:
    """A server process with its log.

    Args:
        name: for messages.
        command: how to start it.
        log: receives its output.
        ready: URL that answers 200 once it serves.
        environment: further variables.
    """

    def __init__(
        self, name: str, command: list[str], log: Path, ready: str, environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self._log = log
        self._ready = ready
        self._file: IO[str] = log.open("w")
        self.process = subprocess.Popen(
            command,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "RAY_AUTH_MODE": "disabled", **environment},
            start_new_session=True,
        )

    async def wait_ready(self, deadline: float) -> float:
        """Seconds until it served; EngineError when it died or took too long."""
        begin = time.monotonic()
        async with aiohttp.ClientSession() as session:
            while time.monotonic() < deadline:
                if self.process.poll() is not None:
                    raise EngineError(f"{self.name} ended at its start; see {self._log}")
                with suppress(aiohttp.ClientError, TimeoutError, OSError):
                    timeout = aiohttp.ClientTimeout(total=10)
                    async with session.get(self._ready, timeout=timeout) as answer:
                        if answer.status == 200:
                            return time.monotonic() - begin
                await asyncio.sleep(1.0)
        raise EngineError(f"{self.name} was not ready in time; see {self._log}")

    def processes(self, what: str) -> list[psutil.Process]:
        """Below this server: vLLM's cores ("engine") or the Serve replicas that own them
        ("replica")."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        cores = [child for child in children if "EngineCore" in _title(child)]
        if what == "engine":
            return cores
        return [owner for core in cores for owner in core.parents() if "Replica" in _title(owner)]

    def stop(self) -> None:
        """End it and everything that it started."""
        below: list[psutil.Process] = []
        with suppress(psutil.Error):
            below = psutil.Process(self.process.pid).children(recursive=True)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
        for child in below:
            with suppress(psutil.Error):
                child.kill()
        self._file.close()


def _title(process: psutil.Process) -> str:
    try:
        return f"{process.name()} {' '.join(process.cmdline())}"
    except psutil.Error:
        return ""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
