"""A fair lock: whoever asks first goes first."""

from __future__ import annotations

import threading
from types import TracebackType


class Turns:
    """Lock that serves in order of arrival.

    A plain lock would let a generating thread take it again at once, step after step, and starve a
    publish from another thread.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._next = 0
        self._serving = 0

    def __enter__(self) -> Turns:
        with self._condition:
            ticket = self._next
            self._next += 1
            self._condition.wait_for(lambda: self._serving == ticket)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._condition:
            self._serving += 1
            self._condition.notify_all()
