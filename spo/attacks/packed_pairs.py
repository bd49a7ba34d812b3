"""Rows that hold one picture and many (prompt, target) pairs behind it.

What comes up to the picture is in a row once, then follows the rest of every prompt, then every
target. A tree of blocks says which token sees which, so that a forward pass computes the picture
once for all pairs and a prompt once for all its targets. `spo.engines.hf.packing` does the same
with whole prompts and several answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spo.algorithms.positions import Span, select_positions
from spo.engines.forward import SteeringPlan
from spo.records import Prompt

Tokens = tuple[int, ...]
Pair = tuple[Prompt, Tokens]
"""A prompt, its picture in place, with the tokens that the attack wants as its answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """Neighbouring columns of a row that count on from one place."""

    row: int
    column: int
    """First column."""
    place: int
    """Position of the first token in its own prompt and answer."""
    tokens: Tokens
    parent: int
    """Number of the block that comes before it; its own for the first block of a row."""
    prompt_length: int
    """Of the prompt that it belongs to; of the first block: longer than the block."""
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedPairs:
    """Rows of [up to the picture][rest of each prompt][targets of each prompt], and what is wanted.

    Every token sees its own block, the block before it and the first one.
    """

    input_ids: Tensor
    """(rows, width) int64."""
    attention_mask: Tensor
    """(rows, 1, width, width) bool: which token sees which."""
    position_ids: Tensor
    """(rows, width) int64."""
    pictures: Tensor
    """(rows,) int64: number of the picture that each row shows."""
    rows: Tensor
    """(target tokens,) int64: where the state that predicts each target token is."""
    columns: Tensor
    """(target tokens,) int64."""
    wanted: Tensor
    """(target tokens,) int64: the target tokens."""
    blocks: tuple[_Block, ...]

    @classmethod
    def of(
        cls,
        pairs: Sequence[Sequence[Pair]],
        tokens: dict[Prompt, Tokens],
        spans: dict[Prompt, tuple[Span, ...]],
        device: torch.device,
    ) -> PackedPairs | None:
        """Rows for pairs of several pictures; None where a prompt ends with its picture.

        Args:
            pairs: (prompt, target) pairs of each picture.
            tokens: of every prompt.
            spans: of the picture in every prompt.
            device: where the tensors are to be.
        """
        rows: list[_Row] = []
        for picture, several in enumerate(pairs):
            heads: dict[Tokens, dict[Prompt, list[Tokens]]] = {}
            for prompt, target in several:
                end = sum(spans[prompt][-1]) if spans[prompt] else 0
                if not 0 < end < len(tokens[prompt]):
                    return None
                same = heads.setdefault(tokens[prompt][:end], {})
                same.setdefault(prompt, []).append(target)
            for head, by_prompt in heads.items():
                row = _Row(number=len(rows), picture=picture, blocks=[], wanted=[])
                row.fill(head, by_prompt, tokens, spans)
                rows.append(row)
        return cls._joined(rows, device)

    @classmethod
    def _joined(cls, rows: Sequence[_Row], device: torch.device) -> PackedPairs:
        width = max(row.width for row in rows)
        ids, place, block, parent = (np.zeros((len(rows), width), dtype=np.int64) for _ in range(4))
        block -= 1
        for row in rows:
            for number, part in enumerate(row.blocks):
                columns = slice(part.column, part.column + len(part.tokens))
                ids[row.number, columns] = part.tokens
                place[row.number, columns] = np.arange(part.place, part.place + len(part.tokens))
                block[row.number, columns] = number
                parent[row.number, columns] = part.parent
        wanted = np.array([w for row in rows for w in row.wanted], dtype=np.int64)
        on_device = [
            torch.from_numpy(values).to(device) for values in (ids, place, block, parent, wanted)
        ]
        return cls(
            input_ids=on_device[0],
            attention_mask=_tree_mask(on_device[2], on_device[3]),
            position_ids=on_device[1],
            pictures=torch.tensor([row.picture for row in rows], device=device),
            rows=on_device[4][:, 0],
            columns=on_device[4][:, 1],
            wanted=on_device[4][:, 2],
            blocks=tuple(part for row in rows for part in row.blocks),
        )

    def coefficients(self, plan: SteeringPlan, start: int, length: int) -> Tensor:
        """(rows, length) strength of each column from `start`; see `TokenBatch.coefficients`."""
        chosen: NDArray[np.bool_] = np.zeros(self.input_ids.shape, dtype=bool)
        for part in self.blocks:
            end = part.place + len(part.tokens)
            chosen[part.row, part.column : part.column + len(part.tokens)] = select_positions(
                plan.positions,
                np.arange(part.place, end, dtype=np.int64),
                prompt_length=part.prompt_length,
                image_spans=part.spans,
            )
        mask = torch.from_numpy(chosen[:, start : start + length]).to(plan.directions.device)
        return mask.float() * plan.coefficient


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One row while it is built."""

    number: int
    picture: int
    blocks: list[_Block]
    wanted: list[tuple[int, int, int]]
    """Row, column of the state that predicts it, and target token."""

    @property
    def width(self) -> int:
        last = self.blocks[-1]
        return last.column + len(last.tokens)

    def fill(
        self,
        head: Tokens,
        by_prompt: dict[Prompt, list[Tokens]],
        tokens: dict[Prompt, Tokens],
        spans: dict[Prompt, tuple[Span, ...]],
    ) -> None:
        """Lay out what the prompts share, and then each of them with its targets."""
        for prompt, targets in by_prompt.items():
            length, seen = len(tokens[prompt]), spans[prompt]
            if not self.blocks:
                self._add(head, place=0, parent=0, prompt_length=len(head) + 1, spans=seen)
            rest = tokens[prompt][len(head) :]
            asked = self._add(rest, len(head), parent=0, prompt_length=length, spans=seen)
            last = self.width - 1
            for target in targets:
                self.wanted.append((self.number, last, target[0]))
                if len(target) > 1:
                    self._add(target[:-1], length, parent=asked, prompt_length=length, spans=seen)
                    first = self.blocks[-1].column
                    self.wanted.extend(
                        (self.number, first + k, token) for k, token in enumerate(target[1:])
                    )

    def _add(
        self,
        tokens: Tokens,
        place: int,
        *,
        parent: int,
        prompt_length: int,
        spans: tuple[Span, ...],
    ) -> int:
        """Append a block; returns its number."""
        self.blocks.append(
            _Block(
                row=self.number,
                column=self.width if self.blocks else 0,
                place=place,
                tokens=tokens,
                parent=parent,
                prompt_length=prompt_length,
                spans=spans,
            )
        )
        return len(self.blocks) - 1


def _tree_mask(block: Tensor, parent: Tensor) -> Tensor:
    """(rows, 1, width, width) bool from the block of each column (-1: padding) and the one before.

    Padding sees itself, because a row of the mask without any key gives NaN.
    """
    width = block.shape[1]
    index = torch.arange(width, device=block.device)
    earlier = index[:, None] >= index[None, :]
    key, query = block[:, None, :], block[:, :, None]
    seen = (key == query) | (key == parent[:, :, None]) | (key == 0)
    return (earlier[None] & seen)[:, None]
