"""A coordinator in a thread of its own, for a learner that runs in the same process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from spo.errors import StageError
from spo.records import Batch
from spo.stage2.coordinator import Coordinator
from spo.vector import SteeringVector

_Result = TypeVar("_Result")


class CoordinatorThread:
    """A coordinator on an event loop of its own, for a thread that waits for it.

    Rollouts go on while nobody waits.

    Args:
        coordinator: used by nobody else.
        timeout_s: longest wait for one answer.
    """

    def __init__(self, coordinator: Coordinator, timeout_s: float) -> None:
        self.inner = coordinator
        self._timeout_s = timeout_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def batch(self, step: int, vector: SteeringVector, rank: int = 0) -> Batch:
        """See `Coordinator.batch`; StageError when it takes too long."""
        made = self.inner.batch(step, vector, rank=rank)
        return self._wait(made, f"the rollouts of step {step}")

    def record(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """See `Coordinator.record`."""

        async def call() -> dict[str, Any]:
            return self.inner.record(figures)

        return self._wait(call(), "the coordinator")

    def close(self) -> None:
        """Cancel what is still under way; calls that were handed to threads run to their end."""

        async def cancel() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._wait(cancel(), "what is under way to be cancelled")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=self._timeout_s)
        self._loop.close()

    def _wait(self, coroutine: Coroutine[Any, Any, _Result], what: str) -> _Result:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout=self._timeout_s)
        except TimeoutError as error:
            raise StageError(
                f"waited {self._timeout_s:.0f} s for {what}; the engines or scorers hang: see "
                "their logs, or raise engine.request_timeout_s"
            ) from error
