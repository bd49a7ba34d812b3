"""Tensors of a steered forward pass, shared by engines that give gradients. No Transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from spo.algorithms.positions import Span, select_positions
from spo.engines.base import CaptureRequest, EngineInfo
from spo.errors import DataError
from spo.records import Operator, Positions, Prompt, SteeringSpec
from spo.vector import SteeringVector


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SteeringPlan:
    """Tensors of one steering, ready for the forward pass."""

    layers: tuple[int, ...]
    directions: Tensor
    """(layers, hidden) float32; may require gradients."""
    mean_norms: Tensor
    """(layers,) float32."""
    calibration: Tensor
    """(layers, hidden) float32."""
    operator: Operator
    positions: Positions
    coefficient: float
    straight_through: bool = False
    """Gradients pass a closed gate (adaptive attack); see `spo.algorithms.operators.steer`."""

    @classmethod
    def of(cls, vector: SteeringVector, spec: SteeringSpec, device: torch.device) -> SteeringPlan:
        """The plan for a published vector."""
        return cls(
            layers=vector.layers,
            directions=vector.directions.to(device),
            mean_norms=vector.mean_norms.to(device),
            calibration=vector.calibration.to(device),
            operator=spec.operator,
            positions=spec.positions,
            coefficient=spec.coefficient,
        )


class Steerable(Protocol):
    """Rows of tokens that know which of their columns a plan steers."""

    def coefficients(self, plan: SteeringPlan, start: int, length: int) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenBatch:
    """Prompts (left-padded) with answers (right-padded): every answer starts in the same column."""

    input_ids: Tensor
    """(batch, prompt_width + answer_width) int64."""
    attention_mask: Tensor
    """Same shape; 0 on padding."""
    extras: dict[str, Tensor]
    """Other tensors of the processor, e.g. pixel_values of the rows that have a picture."""
    prompt_width: int
    pads: tuple[int, ...]
    """Left padding of each row."""
    spans: tuple[tuple[Span, ...], ...]
    """Image spans of each row, counted from its first real token."""
    answer_ids: Tensor
    """(batch, answer_width) int64, padded with 0."""
    answer_mask: Tensor
    """(batch, answer_width) bool."""

    def coefficients(self, plan: SteeringPlan, start: int, length: int) -> Tensor:
        """(batch, length) strength of each column from `start`; 0 where nothing is steered."""
        rows = []
        for pad, spans in zip(self.pads, self.spans, strict=True):
            index = np.arange(start, start + length, dtype=np.int64) - pad
            chosen = select_positions(
                plan.positions, index, prompt_length=self.prompt_width - pad, image_spans=spans
            )
            rows.append(chosen & (index >= 0))
        mask = torch.from_numpy(np.stack(rows)).to(plan.directions.device)
        return mask.float() * plan.coefficient


def pad_answers(answers: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded tokens (int64, padded with 0) and their mask (bool), both (batch, width)."""
    width = max((len(answer) for answer in answers), default=0)
    ids = torch.zeros(len(answers), width, dtype=torch.int64)
    mask = torch.zeros(len(answers), width, dtype=torch.bool)
    for row, answer in enumerate(answers):
        ids[row, : len(answer)] = torch.tensor(list(answer), dtype=torch.int64)
        mask[row, : len(answer)] = True
    return ids, mask


def token_logprobs(logits: Tensor, answer_ids: Tensor, answer_mask: Tensor) -> Tensor:
    """(batch, width) log-probability of each answer token from its logits, 0 on padding."""
    chosen = torch.log_softmax(logits, dim=-1).gather(2, answer_ids.unsqueeze(-1)).squeeze(-1)
    return torch.where(answer_mask, chosen, 0.0)


def token_kl(logits: Tensor, reference: Tensor) -> Tensor:
    """(...) KL(steered || unsteered) over the vocabulary, nats, from (..., vocabulary) logits."""
    steered = torch.log_softmax(logits, dim=-1)
    return (steered.exp() * (steered - torch.log_softmax(reference, dim=-1))).sum(dim=-1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AnswerScores:
    """What the learner needs to know of given answers; (batch, answer width), 0 on padding."""

    policy: Tensor
    """Log-probability of each token under the steered model; carries the gradient."""
    reference: Tensor
    """The same under the unsteered model; no gradient."""
    kl: Tensor
    """KL(steered || unsteered) at each token, nats; carries the gradient."""


def pooled_columns(batch: TokenBatch, row: int, request: CaptureRequest) -> list[int]:
    """Columns of one row that its capture pools over."""
    pad = batch.pads[row]
    prompt_length = batch.prompt_width - pad
    index = np.arange(prompt_length + len(request.token_ids), dtype=np.int64)
    chosen = select_positions(
        request.positions, index, prompt_length=prompt_length, image_spans=batch.spans[row]
    )
    chosen[0] = False  # the attention sink would drown every other token
    columns = (index[chosen] + pad).tolist()
    if not columns:
        raise DataError(
            f"capture {request.request_id!r}: no token is left to pool over "
            f"({request.positions.value} of {len(index)} tokens, first one left out)"
        )
    return columns


class DifferentiableEngine(Protocol):
    """What the learner needs of an engine: answer logits with gradients in the directions."""

    @property
    def info(self) -> EngineInfo: ...

    device: torch.device

    def prepare(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]] | None = None
    ) -> TokenBatch: ...

    def answer_logits(self, batch: TokenBatch, plan: SteeringPlan | None = None) -> Tensor: ...

    def answer_scores(
        self,
        batch: TokenBatch,
        plans: Sequence[SteeringPlan],
        *,
        chunk_tokens: int,
        cache_prefix: bool = True,
    ) -> list[AnswerScores]:
        """Scores of the batch's answers under each plan; the unsteered pass is shared.

        Args:
            batch: prompts with answers.
            plans: steerings; gradients flow to their directions and calibrations.
            chunk_tokens: answer tokens whose logits are in memory at once.
            cache_prefix: compute the blocks up to the lowest steered one once for all passes.
        """
        ...
