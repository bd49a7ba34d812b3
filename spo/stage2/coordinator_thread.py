"""An event loop in its own thread, for a coordinator whose learner runs in the same process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from spo.errors import StageError

_Result = TypeVar("_Result")


class BackgroundLoop:
    """Runs coroutines for a thread that waits for them, and what they start beyond that.

    Args:
        timeout_s: longest wait for one of them.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def wait(self, coroutine: Coroutine[Any, Any, _Result], what: str) -> _Result:
        """Its result; StageError naming `what` when it takes too long."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout=self._timeout_s)
        except TimeoutError as error:
            raise StageError(
                f"waited {self._timeout_s:.0f} s for {what}; the engines or scorers hang: see "
                "their logs, or raise engine.request_timeout_s"
            ) from error

    def close(self) -> None:
        """Cancel what is still under way; calls that were handed to threads run to their end."""

        async def cancel() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.wait(cancel(), "what is under way to be cancelled")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=self._timeout_s)
        self._loop.close()
