"""Receipts of many concurrent requests, fetched from the workers in few calls."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from spo.errors import SteeringError


class ReceiptMail:
    """Fetches receipts from the workers; those asked for while a call is out go with the next.

    Args:
        llm: vLLM's asynchronous engine.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._waiting: dict[bool, dict[str, asyncio.Future[list[dict[str, Any]]]]] = {
            False: {},
            True: {},
        }
        self._courier: asyncio.Task[None] | None = None

    async def fetch(self, key: str, keep: bool) -> list[dict[str, Any]]:
        """One request's account, from every rank."""
        future = self._waiting[keep][key] = asyncio.get_running_loop().create_future()
        if self._courier is None or self._courier.done():
            self._courier = asyncio.create_task(self._deliver())
        return await future

    async def _deliver(self) -> None:
        while any(self._waiting.values()):
            for keep in (False, True):
                batch, self._waiting[keep] = self._waiting[keep], {}
                if batch:
                    await self._call(batch, keep)

    async def _call(
        self, batch: dict[str, asyncio.Future[list[dict[str, Any]]]], keep: bool
    ) -> None:
        try:
            texts = await self._llm.collective_rpc("spo_receipts", args=(list(batch), keep))
        except Exception as error:  # noqa: BLE001 every waiting request must hear of it
            reason = SteeringError(f"the workers gave no receipts: {error}; the answer was dropped")
            for future in batch.values():
                if not future.done():
                    future.set_exception(reason)
            return
        ranks = [json.loads(text) for text in texts]
        for place, future in enumerate(batch.values()):
            if not future.done():
                future.set_result([rank[place] for rank in ranks])
