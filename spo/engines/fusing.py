"""Decoder blocks whose small operators are fused by `torch.compile`, hooks left outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class FusedBlocks:
    """Compiles blocks at first use: half a minute for a 7B model on a GPU.

    Only inside the context, because generation would compile again for every length.

    Args:
        blocks: decoder blocks of one model.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = list(blocks)
        self._forwards: list[Callable[..., Any]] = []

    @contextmanager
    def used(self, wanted: bool = True) -> Iterator[None]:
        """Run the compiled blocks; if not `wanted`, leave them as they are."""
        if not wanted:
            yield
            return
        if not self._forwards:
            self._forwards = [torch.compile(block.forward, dynamic=True) for block in self._blocks]
        for block, forward in zip(self._blocks, self._forwards, strict=True):
            block.__dict__["forward"] = forward
        try:
            yield
        finally:
            for block in self._blocks:
                del block.__dict__["forward"]  # the class's own is found again
