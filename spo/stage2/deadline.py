"""A group's deadline: what is there goes on, what is late is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeVar

_Item = TypeVar("_Item")


async def within(
    calls: Sequence[asyncio.Future[list[_Item]]], *, deadline_s: float | None, enough: int
) -> list[_Item]:
    """Items of all calls, or of those that are done at the deadline.

    Args:
        calls: running calls.
        deadline_s: when to go on without the rest; None waits for all.
        enough: items without which the deadline does not hold; it then waits for the next call.

    Raises:
        Exception: whatever one of the calls raised.
    """
    done, waiting = await asyncio.wait(
        calls, timeout=deadline_s, return_when=asyncio.FIRST_EXCEPTION
    )
    while waiting and not any(call.exception() for call in done):
        if sum(len(call.result()) for call in done) >= enough:
            break
        more, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        done |= more
    for call in waiting:
        # Nobody waits for it any more: its error, if it has one, is looked at and forgotten.
        call.add_done_callback(lambda late: late.cancelled() or late.exception())
    return [item for call in done for item in call.result()]
