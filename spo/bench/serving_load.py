"""A closed loop of clients against an OpenAI-compatible endpoint, and what they saw."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
from PIL import Image, ImageDraw


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the clients do."""

    url: str
    """Base URL, ending in /v1."""
    model: str
    key: str = "none"
    clients: int = 64
    seconds: float = 20.0
    tokens: int = 64
    """Length of every answer."""
    picture: int = 224
    """Side of the picture that every second request carries; 0 sends none."""
    timeout_s: float = 300.0


@dataclass(slots=True, kw_only=True)
class ClientRecord:
    """What the clients saw."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    """Seconds of the answered requests."""
    tokens: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    """Answers by status; "lost" where the connection broke."""
    receipts: list[Mapping[str, Any] | None] = field(default_factory=list)
    """`steering` of every answer."""
    problems: Counter[str] = field(default_factory=Counter)
    """Messages of refusals, shortened."""

    def quantile(self, share: float) -> float:
        """Seconds below which a share of the answers stayed."""
        return float(np.quantile(self.latencies, share)) if self.latencies else float("nan")

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all answers over the time."""
        return self.tokens / self.seconds if self.seconds else float("nan")

    def row(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "answers": len(self.latencies),
            "tokens_per_second": round(self.tokens_per_second, 2),
            "p50_s": round(self.quantile(0.5), 4),
            "p99_s": round(self.quantile(0.99), 4),
            "statuses": dict(self.statuses),
            "problems": dict(self.problems),
            "seconds": round(self.seconds, 2),
        }


def drawn_picture(side: int) -> str:
    """A data URL of a simple drawn scene."""
    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)
    pen.rectangle((side // 8, side // 8, side // 2, side // 2), fill="red")
    pen.ellipse((side // 2, side // 2, side - side // 8, side - side // 8), fill="blue")
    data = io.BytesIO()
    image.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


async def run_load(load: Load, seen: ClientRecord | None = None) -> ClientRecord:
    """Keep every client busy for the time; requests under way at its end are waited for.

    Args:
        load: what to do.
        seen: filled in as answers come; a new one if absent.
    """
    seen = seen or ClientRecord()
    numbers = itertools.count()
    picture = drawn_picture(load.picture) if load.picture else ""
    begin = time.monotonic()
    timeout = aiohttp.ClientTimeout(total=load.timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"Authorization": f"Bearer {load.key}"}
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=headers
    ) as session:

        async def client() -> None:
            while time.monotonic() - begin < load.seconds:
                await _ask(session, load, next(numbers), picture, seen)

        await asyncio.gather(*(client() for _ in range(load.clients)))
    seen.seconds = time.monotonic() - begin
    return seen


def _messages(number: int, picture: str) -> list[dict[str, Any]]:
    # The number comes first, so that no prompt is in the prefix cache.
    text = f"{number}: What do you see, and what do you think about it?"
    if not picture or number % 2:
        return [{"role": "user", "content": text}]
    parts: Sequence[dict[str, Any]] = (
        {"type": "text", "text": text},
        {"type": "image_url", "image_url": {"url": picture}},
    )
    return [{"role": "user", "content": list(parts)}]


async def _ask(
    session: aiohttp.ClientSession, load: Load, number: int, picture: str, seen: ClientRecord
) -> None:
    body = {
        "model": load.model,
        "messages": _messages(number, picture),
        "max_tokens": load.tokens,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    begin = time.monotonic()
    try:
        async with session.post(f"{load.url}/chat/completions", json=body) as answer:
            row = await answer.json(content_type=None)
    except (aiohttp.ClientError, TimeoutError, ValueError, OSError) as error:
        seen.statuses["lost"] += 1
        seen.problems[type(error).__name__] += 1
        await asyncio.sleep(0.5)
        return
    seen.statuses[str(answer.status)] += 1
    if answer.status != 200:
        message = str((row.get("error") or {}).get("message", row))
        seen.problems[f"{answer.status}: {message[:120]}"] += 1
        await asyncio.sleep(float(answer.headers.get("Retry-After", 0.5)))
        return
    seen.latencies.append(time.monotonic() - begin)
    seen.tokens += int(row["usage"]["completion_tokens"])
    seen.receipts.append(row.get("steering"))
