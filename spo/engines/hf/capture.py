"""Reading pooled activations with the Hugging Face engine, fast enough for millions of rows.

Batches hold rows of similar length; the next batches are decoded and tokenised, on a GPU by several
threads, while the model works on this one; the forward pass ends at the highest layer asked for;
pooled figures leave the device once a batch.
"""

from __future__ import annotations

import copy
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from spo.engines.base import Capture, CaptureRequest
from spo.engines.batching import chunks, grouped
from spo.engines.forward import TokenBatch, pooled_columns
from spo.engines.hf.compiled import FusedBlocks
from spo.engines.processing import PromptProcessor
from spo.errors import EngineError
from spo.records import Prompt

_AHEAD = 3
"""Batches prepared while the model works."""
_PREPARERS = 2
"""Threads that prepare for a GPU, at most. One makes 100 prompts/s and a 7B model on an H100 takes
50; six share one interpreter and together made half as many (H100, 16 cores)."""


class _EarlyExit(Exception):
    """Stops a forward pass once the highest wanted layer was read."""


class HookedModel(Protocol):
    """What reading needs of an engine (`HfEngine`)."""

    prompts: PromptProcessor
    device: torch.device
    batch_size: int
    compiled_capture: bool
    blocks: nn.ModuleList
    fused: FusedBlocks
    turn: threading.Lock

    def prepare(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[int]] | None = None,
        *,
        processor: PromptProcessor | None = None,
    ) -> TokenBatch: ...

    def reading(
        self, hooks: dict[int, Callable[[Tensor, int], Tensor | None]]
    ) -> AbstractContextManager[None]: ...

    def answer_logits(self, batch: TokenBatch) -> Tensor: ...


class PooledReader:
    """Reads for one engine; threads may call it at once: one prepares while another computes.

    Args:
        engine: whose model is read.
    """

    def __init__(self, engine: HookedModel) -> None:
        self._engine = engine
        self._own = threading.local()
        self._threads = preparers(engine.device)
        self._pool: ThreadPoolExecutor | None = None

    def read(self, requests: Sequence[CaptureRequest]) -> list[Capture]:
        """Pooled activations, in the order of the requests."""
        plan: list[tuple[tuple[int, ...], list[int]]] = []
        for layers, indices in grouped(requests, lambda request: request.layers):
            blocks = len(self._engine.blocks)
            outside = [layer for layer in layers if not 0 <= layer < blocks]
            if outside or not layers:
                raise EngineError(f"capture layers must lie in 0..{blocks - 1}, got {list(layers)}")
            indices.sort(key=lambda i: _length(requests[i]))
            plan += [(layers, chunk) for chunk in chunks(indices, self._engine.batch_size)]
        parts = [[requests[i] for i in chunk] for _, chunk in plan]
        results: dict[int, Capture] = {}
        for (layers, chunk), part, batch in zip(plan, parts, self._prepared(parts), strict=True):
            compiled = self._engine.compiled_capture and self._engine.device.type == "cuda"
            with self._engine.turn, self._engine.fused.used(compiled):
                captured = read_pooled(self._engine, batch, part, layers)
            results.update(zip(chunk, captured, strict=True))
        return [results[i] for i in range(len(requests))]

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _prepared(self, parts: Sequence[Sequence[CaptureRequest]]) -> Iterator[TokenBatch]:
        """Batches in order, some prepared ahead of their use."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, "prepare", initializer=self._start)
        todo = iter(parts)
        ahead = islice(todo, self._threads + _AHEAD)
        waiting = deque(self._pool.submit(self._prepare, part) for part in ahead)
        try:
            while waiting:
                ready = waiting.popleft().result()
                waiting.extend(self._pool.submit(self._prepare, p) for p in islice(todo, 1))
                yield ready
        finally:
            for future in waiting:
                future.cancel()

    def _start(self) -> None:
        # A tokenizer is not made for two threads; threads with every core each slow one another.
        self._own.prompts = copy.deepcopy(self._engine.prompts)
        if self._engine.device.type == "cuda":
            torch.set_num_threads(1)

    def _prepare(self, part: Sequence[CaptureRequest]) -> TokenBatch:
        prompts, answers = [r.prompt for r in part], [r.token_ids for r in part]
        return self._engine.prepare(prompts, answers, processor=self._own.prompts)


def read_pooled(
    engine: HookedModel,
    batch: TokenBatch,
    requests: Sequence[CaptureRequest],
    layers: tuple[int, ...],
) -> list[Capture]:
    """Pooled activations of one prepared batch."""
    columns = [pooled_columns(batch, row, request) for row, request in enumerate(requests)]
    mean, norm = (part.cpu().numpy() for part in pooled(engine, batch, columns, layers))
    return [
        Capture(
            request_id=request.request_id,
            mean=mean[row].astype(np.float32),
            norm=norm[row].astype(np.float32),
            tokens=len(columns[row]),
        )
        for row, request in enumerate(requests)
    ]


def pooled(
    engine: HookedModel,
    batch: TokenBatch,
    columns: Sequence[Sequence[int]],
    layers: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """(rows, layers, hidden) means and (rows, layers) median norms over columns of each row.

    The forward pass ends at the highest layer.
    """
    counts = [len(where) for where in columns]
    tokens = [(row, c) for row, where in enumerate(columns) for c in where]

    def table(card: torch.device) -> tuple[Tensor, Tensor]:
        return torch.tensor(tokens, device=card), torch.tensor(counts, device=card)

    # Before the pass, because it waits for the device; of several cards only the others' are late.
    tables = {engine.device: table(engine.device)}
    means: dict[int, Tensor] = {}
    norms: dict[int, Tensor] = {}

    def read(layer: int) -> Callable[[Tensor, int], None]:
        def at(hidden: Tensor, start: int) -> None:
            card = hidden.device  # of several, each holds some of the layers
            if card not in tables:
                tables[card] = table(card)
            where, lengths = tables[card]
            chosen = hidden[where[:, 0], where[:, 1]].float()
            mean = torch.segment_reduce(chosen, "mean", lengths=lengths, axis=0)
            means[layer] = mean.to(engine.device)
            norms[layer] = _medians(chosen.norm(dim=-1), counts).to(engine.device)
            if layer == max(layers):
                raise _EarlyExit

        return at

    hooks = engine.reading({layer: read(layer) for layer in layers})
    with suppress(_EarlyExit), torch.no_grad(), hooks:
        engine.answer_logits(batch)
    return (
        torch.stack([means[layer] for layer in layers], dim=1),
        torch.stack([norms[layer] for layer in layers], dim=1),
    )


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


def preparers(device: torch.device) -> int:
    """Threads that decode and tokenise: on a CPU the model needs the cores itself."""
    cores = len(os.sched_getaffinity(0))
    return min(_PREPARERS, max(1, cores // 2)) if device.type == "cuda" else 1
