"""Answers of a group behind one copy of their prompt, so that the prompt is computed once.

A row holds the prompt (with its picture) and then all answers to it; a block mask lets each answer
see the prompt and itself, and positions count on from the prompt for each. With a picture of 576
tokens and four answers of 64 that is a third of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from spo.engines.forward import SteeringPlan, TokenBatch

_DECODERS = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_MODELS = _DECODERS | {"llava"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedBatch:
    """Groups of answers, a row each. Has the face of a `TokenBatch` towards a forward pass."""

    input_ids: Tensor
    """(groups, prompt_width + answers * answer_width) int64."""
    attention_mask: Tensor
    """(groups, 1, width, width) bool: which token sees which."""
    extras: dict[str, Tensor]
    firsts: TokenBatch
    """The first answer of each group: its prompt stands for the group's."""
    places: Tensor
    """(answers, 2) int64: row and number within the row of each answer."""

    def coefficients(self, plan: SteeringPlan, start: int, length: int) -> Tensor:
        """(groups, length) strength of each column; see `TokenBatch.coefficients`."""
        width, answer = self.firsts.prompt_width, self.firsts.answer_ids.shape[1]
        single = self.firsts.coefficients(plan, 0, width + answer)
        count = (self.input_ids.shape[1] - width) // answer
        whole = torch.cat([single[:, :width], single[:, width:].repeat(1, count)], dim=1)
        return whole[:, start : start + length]

    def answer_states(self, hidden: Tensor) -> Tensor:
        """(answers, answer_width, hidden) states that predict each answer's tokens."""
        width, answer = self.firsts.prompt_width, self.firsts.answer_ids.shape[1]
        offset = torch.arange(answer, device=hidden.device) - 1
        row, number = self.places[:, :1], self.places[:, 1:]
        column = width + number * answer + offset
        # The first token of every answer is predicted by the last token of the prompt.
        column[:, 0] = width - 1
        return hidden[row, column]


def can_pack(model: Any) -> bool:
    """Whether a model takes a block mask and plain positions: full attention, one position each."""
    text = model.config.get_text_config()
    sliding = any(kind != "full_attention" for kind in getattr(text, "layer_types", None) or ())
    return (
        model.config.model_type in _MODELS
        and text.model_type in _DECODERS
        and getattr(text, "_attn_implementation", "") == "sdpa"
        and not sliding
        and not getattr(text, "use_sliding_window", False)
    )


def pack(batch: TokenBatch) -> PackedBatch | None:
    """Pack a batch whose neighbours share prompts; None where nothing would be saved."""
    width, answer = batch.prompt_width, batch.answer_ids.shape[1]
    starts = _group_starts(batch)
    rows = len(batch.pads)
    if answer == 0 or len(starts) == rows:
        return None
    bounds = [*starts, rows]
    sizes = [end - start for start, end in pairwise(bounds)]
    device, most = batch.input_ids.device, max(sizes)
    places = torch.tensor(
        [(g, k) for g, size in enumerate(sizes) for k in range(size)], device=device
    )
    ids = torch.zeros(len(sizes), most, answer, dtype=torch.int64, device=device)
    real = torch.zeros(len(sizes), most, answer, dtype=torch.bool, device=device)
    ids[places[:, 0], places[:, 1]] = batch.answer_ids
    real[places[:, 0], places[:, 1]] = batch.answer_mask
    first = torch.tensor(starts, device=device)
    prompt = batch.input_ids[first, :width]
    prompt_real = batch.attention_mask[first, :width].bool()
    position = torch.cat([torch.arange(width), width + torch.arange(answer).repeat(most)]).to(
        device
    )
    extras = dict(batch.extras)
    if "pixel_values" in extras:
        pictured = [row for row, spans in enumerate(batch.spans) if spans]
        kept = [i for i, row in enumerate(pictured) if row in set(starts)]
        extras["pixel_values"] = extras["pixel_values"][kept]
    return PackedBatch(
        input_ids=torch.cat([prompt, ids.flatten(1)], dim=1),
        attention_mask=_block_mask(torch.cat([prompt_real, real.flatten(1)], dim=1), width, answer),
        extras=extras | {"position_ids": position.expand(len(sizes), -1)},
        firsts=_rows(batch, starts),
        places=places,
    )


def _block_mask(real: Tensor, width: int, answer: int) -> Tensor:
    """(groups, 1, T, T): every token sees the prompt before it and its own answer before it."""
    total = real.shape[1]
    index = torch.arange(total, device=real.device)
    block = torch.where(index < width, 0, 1 + (index - width) // answer)
    earlier = index[:, None] >= index[None, :]
    same = (block[None, :] == 0) | (block[None, :] == block[:, None])
    seen = (earlier & same)[None] & real[:, None, :]
    # Padding sees itself: a row of the mask without any key gives NaN.
    seen |= torch.eye(total, dtype=torch.bool, device=real.device)[None]
    return seen[:, None]


def _group_starts(batch: TokenBatch) -> list[int]:
    """First row of each run of rows with the same prompt and picture."""
    width = batch.prompt_width
    pixels = batch.extras.get("pixel_values")
    picture = -1
    starts: list[int] = []
    previous = -1
    for row in range(len(batch.pads)):
        before = picture
        if batch.spans[row]:
            picture += 1
        same = row > 0 and torch.equal(
            batch.input_ids[row, :width], batch.input_ids[previous, :width]
        )
        if same and batch.spans[row] and pixels is not None:
            same = torch.equal(pixels[picture], pixels[before])
        if not same:
            starts.append(row)
        previous = row
    return starts


def _rows(batch: TokenBatch, rows: Sequence[int]) -> TokenBatch:
    index = torch.tensor(list(rows), device=batch.input_ids.device)
    return TokenBatch(
        input_ids=batch.input_ids[index],
        attention_mask=batch.attention_mask[index],
        extras={},
        prompt_width=batch.prompt_width,
        pads=tuple(batch.pads[row] for row in rows),
        spans=tuple(batch.spans[row] for row in rows),
        answer_ids=batch.answer_ids[index],
        answer_mask=batch.answer_mask[index],
    )
