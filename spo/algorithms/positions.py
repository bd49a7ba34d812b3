"""Which token positions of a sequence are read or steered.

All functions work on absolute positions, so that they are exact whatever way an engine cuts a
sequence into steps (chunked prefill, preemption, single-token decoding).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spo.records import Positions

Span = tuple[int, int]
"""First position and length of one picture's tokens in the expanded prompt."""


def select_positions(
    positions: Positions,
    index: NDArray[np.int64],
    *,
    prompt_length: int,
    image_spans: Sequence[Span] = (),
) -> NDArray[np.bool_]:
    """Mask of the selected positions.

    Args:
        positions: selector.
        index: (n,) absolute token positions, 0 = first token of the prompt.
        prompt_length: number of prompt tokens, image tokens expanded.
        image_spans: where the image tokens lie.

    Returns:
        (n,) booleans, True where the position is selected.
    """
    if positions is Positions.ALL:
        return np.ones(index.shape, dtype=bool)
    if positions is Positions.PROMPT:
        return index < prompt_length
    if positions is Positions.GENERATED:
        return index >= prompt_length - 1
    if positions is Positions.LAST_PROMPT:
        return index == prompt_length - 1
    image = np.zeros(index.shape, dtype=bool)
    for start, length in image_spans:
        image |= (index >= start) & (index < start + length)
    if positions is Positions.IMAGE:
        return image
    if positions is Positions.TEXT:
        return ~image
    last = max((start + length for start, length in image_spans), default=0)
    return index >= last


def image_spans(token_ids: Sequence[int], image_token_id: int | None) -> tuple[Span, ...]:
    """Runs of the image token in an expanded prompt, as (start, length)."""
    if image_token_id is None:
        return ()
    spans: list[Span] = []
    start: int | None = None
    for position, token in enumerate([*token_ids, None]):
        if token == image_token_id:
            start = position if start is None else start
        elif start is not None:
            spans.append((start, position - start))
            start = None
    return tuple(spans)
