"""Reading pooled activations with the Hugging Face engine, fast enough for millions of rows.

Batches hold rows of similar length; the next batch is decoded and tokenised while the model works
on this one; the forward pass ends at the highest layer asked for; pooled figures leave the device
once a batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from spo.engines.base import Capture, CaptureRequest
from spo.engines.batching import chunks, grouped
from spo.engines.plan import TokenBatch, pooled_columns
from spo.errors import EngineError

if TYPE_CHECKING:
    from spo.engines.hf import HfEngine

_AHEAD = 3
"""Batches prepared while the model works; by one thread, tokenizers are not made for more."""


class _EarlyExit(Exception):
    """Stops a forward pass once the highest wanted layer was read."""


def capture(engine: HfEngine, requests: Sequence[CaptureRequest]) -> list[Capture]:
    """Pooled activations, in the order of the requests."""
    plan: list[tuple[tuple[int, ...], list[int]]] = []
    for layers, indices in grouped(requests, lambda request: request.layers):
        outside = [layer for layer in layers if not 0 <= layer < len(engine.blocks)]
        if outside or not layers:
            raise EngineError(
                f"capture layers must lie in 0..{len(engine.blocks) - 1}, got {list(layers)}"
            )
        indices.sort(key=lambda i: _length(requests[i]))
        plan += [(layers, chunk) for chunk in chunks(indices, engine.batch_size)]
    results: dict[int, Capture] = {}

    def prepare(chunk: list[int]) -> TokenBatch:
        return engine.prepare(
            [requests[i].prompt for i in chunk], [requests[i].token_ids for i in chunk]
        )

    for (layers, chunk), batch in zip(
        plan, _prepared_ahead(prepare, [chunk for _, chunk in plan]), strict=True
    ):
        captured = read_pooled(engine, batch, [requests[i] for i in chunk], layers)
        results.update(zip(chunk, captured, strict=True))
    return [results[i] for i in range(len(requests))]


def read_pooled(
    engine: HfEngine,
    batch: TokenBatch,
    requests: Sequence[CaptureRequest],
    layers: tuple[int, ...],
) -> list[Capture]:
    """Pooled activations of one prepared batch."""
    columns = [pooled_columns(batch, row, request) for row, request in enumerate(requests)]
    counts = [len(where) for where in columns]
    lengths = torch.tensor(counts, device=engine.device)
    rows = torch.repeat_interleave(torch.arange(len(requests), device=engine.device), lengths)
    places = torch.tensor([c for where in columns for c in where], device=engine.device)
    means: dict[int, Tensor] = {}
    norms: dict[int, Tensor] = {}

    def read(layer: int) -> Callable[[Tensor, int], None]:
        def at(hidden: Tensor, start: int) -> None:
            chosen = hidden[rows, places].float()
            means[layer] = torch.segment_reduce(chosen, "mean", lengths=lengths, axis=0)
            norms[layer] = _medians(chosen.norm(dim=-1), counts)
            if layer == max(layers):
                raise _EarlyExit

        return at

    hooks = engine.reading({layer: read(layer) for layer in layers})
    with suppress(_EarlyExit), torch.no_grad(), hooks:
        engine.answer_logits(batch)
    mean = torch.stack([means[layer] for layer in layers], dim=1).cpu().numpy()
    norm = torch.stack([norms[layer] for layer in layers], dim=1).cpu().numpy()
    return [
        Capture(
            request_id=request.request_id,
            mean=mean[row].astype(np.float32),
            norm=norm[row].astype(np.float32),
            tokens=counts[row],
        )
        for row, request in enumerate(requests)
    ]


def _medians(values: Tensor, counts: Sequence[int]) -> Tensor:
    """(rows,) median of each run of `counts` values."""
    if max(counts) == 1:
        return values
    padded = values.new_full((len(counts), max(counts)), torch.nan)
    for row, part in enumerate(values.split(list(counts))):
        padded[row, : len(part)] = part
    return padded.nanmedian(dim=1).values


def _length(request: CaptureRequest) -> tuple[bool, int]:
    """Orders rows by likely length without tokenising them: pictures apart, then by text."""
    return request.prompt.image is not None, len(request.prompt.text) + 4 * len(request.token_ids)


def _prepared_ahead(
    prepare: Callable[[list[int]], TokenBatch], batches: Sequence[list[int]]
) -> Iterator[TokenBatch]:
    """Prepare batches in order, a few ahead of their use."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare") as pool:
        waiting: deque[Future[TokenBatch]] = deque()
        todo = iter(batches)
        for batch in todo:
            waiting.append(pool.submit(prepare, batch))
            if len(waiting) > _AHEAD:
                break
        while waiting:
            ready = waiting.popleft().result()
            for batch in todo:
                waiting.append(pool.submit(prepare, batch))
                break
            yield ready
