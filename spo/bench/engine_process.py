"""The parent's end of one benchmarked engine: a child process that speaks JSON lines."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from spo.errors import EngineError

COMMAND = (sys.executable, "-m", "spo.bench.engine_child")


class EngineProcess:
    """A process that holds one engine.

    Args:
        settings: what `bench_engine.BenchEngine` reads.
        log: file for everything that vLLM prints.
        environment: variables on top of this process's own.
    """

    def __init__(
        self, settings: Mapping[str, Any], log: Path, environment: Mapping[str, str]
    ) -> None:
        self.settings = settings
        self.card = environment.get("CUDA_VISIBLE_DEVICES", "")
        with log.open("w") as file:
            self._process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**os.environ, **environment},
                # A group of its own: vLLM's processes outlive one that is killed while it starts.
                start_new_session=True,
            )
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self.send({"start": dict(settings)})

    def send(self, message: Mapping[str, Any]) -> None:
        """One request."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@"):
                self._answers.put(line[1:])
        self._answers.put(None)

    def receive(self, timeout: float) -> dict[str, Any]:
        """The next answer; EngineError when the child died, is late, or reports an error."""
        name = f"{self.settings['shape']} {self.settings['engine']}"
        try:
            line = self._answers.get(timeout=max(timeout, 1.0))
        except queue.Empty:
            raise EngineError(f"{name} gave no answer within {timeout:.0f} s") from None
        if line is None:
            raise EngineError(f"the engine process of {name} died; see its log")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{name}: {answer['error']}")
        return answer

    def stop(self) -> None:
        """End the process and what it started."""
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(20)
