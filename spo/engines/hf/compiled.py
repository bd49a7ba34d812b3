"""Decoder blocks that compute by another function for a while: compiled, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_FORMS = 64
"""Forms of input that may be compiled in one process. Torch's own limit of 8, for all engines of a
process together, is soon reached, and what comes after it runs uncompiled without an error."""


@contextmanager
def forwards(
    blocks: Sequence[nn.Module], functions: Sequence[Callable[..., Any]]
) -> Iterator[None]:
    """Blocks whose `forward` is another function within the context; their hooks stay.

    For one thread: others that use the blocks meanwhile get the same functions.
    """
    own = [block.__dict__ for block in blocks]
    before = [attributes.get("forward") for attributes in own]
    for attributes, function in zip(own, functions, strict=True):
        attributes["forward"] = function
    try:
        yield
    finally:
        for attributes, earlier in zip(own, before, strict=True):
            del attributes["forward"]  # the class's own is found again
            if earlier is not None:
                attributes["forward"] = earlier


class FusedBlocks:
    """Decoder blocks whose small operators `torch.compile` fuses, hooks left outside.

    A form of input is compiled when it first comes, which takes half a minute for a 7B model on a
    GPU: with and without gradients, with and without a mask, one row and several. Lengths are no
    forms. Only inside the context, because generation would compile for its cache as well.

    Args:
        blocks: decoder blocks of one model.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = list(blocks)
        self._compiled: list[Callable[..., Any]] = []

    @contextmanager
    def used(self, wanted: bool) -> Iterator[None]:
        """Run the compiled blocks; if not `wanted`, leave them as they are."""
        if not wanted:
            yield
            return
        if not self._compiled:
            self._compiled = [torch.compile(block.forward, dynamic=True) for block in self._blocks]
        limit = torch._dynamo.config.patch(recompile_limit=_FORMS)
        with limit, forwards(self._blocks, self._compiled):
            yield
