"""What a person sees while a run works: headings, bars, plain lines where there is no screen."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)


class Reporter(Protocol):
    """Where a run tells how far it is."""

    def stage(self, title: str) -> None:
        """A new stage begins."""
        ...

    def step(self, done: int, total: int, what: str) -> None:
        """`done` of `total` parts of the current stage are ready."""
        ...

    def note(self, text: str) -> None:
        """A fact worth a line."""
        ...


class Silent:
    """Reports nothing; for tests and sweeps."""

    def stage(self, title: str) -> None:
        """Nothing."""

    def step(self, done: int, total: int, what: str) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


class ConsoleReporter:
    """Bars on a terminal; on a log, a line for about every tenth of a stage."""

    def __init__(self) -> None:
        self._console = Console()
        self._begin = time.monotonic()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._printed = -1

    def stage(self, title: str) -> None:
        self._stop_bar()
        elapsed = time.monotonic() - self._begin
        self._console.print(f"[bold]{title}[/bold]  [dim]{elapsed:.0f} s[/dim]")

    def note(self, text: str) -> None:
        self._console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)

    def step(self, done: int, total: int, what: str) -> None:
        if self._console.is_terminal:
            self._bar(done, total, what)
            return
        tenth = done * 10 // max(total, 1)
        if tenth != self._printed or done == total:
            self._printed = tenth
            self._console.print(f"  {done}/{total} {what}", highlight=False, markup=False)

    def _bar(self, done: int, total: int, what: str) -> None:
        if self._progress is None:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
            )
            self._progress = Progress(*columns, console=self._console)
            self._progress.start()
            self._task = self._progress.add_task(what, total=total)
        assert self._task is not None
        self._progress.update(self._task, completed=done, total=total, description=what)
        if done >= total:
            self._stop_bar()

    def _stop_bar(self) -> None:
        self._printed = -1
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


@contextmanager
def following(path: Path, on_line: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Call `on_line` with every JSON line that is appended to a file while the block runs."""
    stop = threading.Event()
    position = path.stat().st_size if path.is_file() else 0

    def read_new() -> None:
        nonlocal position
        if not path.is_file():
            return
        with path.open("rb") as file:
            file.seek(position)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                position += len(line)
                on_line(json.loads(line))

    def watch() -> None:
        while not stop.wait(0.5):
            read_new()
        read_new()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)
