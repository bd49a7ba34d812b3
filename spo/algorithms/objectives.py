"""Sequence-level preference objectives: one scalar per whole answer, no credit to single tokens.

Each takes the log-probabilities of groups of answers to the same prompt and their rewards, and
returns a loss whose gradient flows through `policy`: a *sum*, together with how many terms a group
adds to it, so that the mean over a batch does not depend on how it is cut into micro-batches or
over workers. Adding one: a function of `Groups` here, its name in `LearnConfig.objective`, a line
in `OBJECTIVES`, a test of its gradient's sign.

Shapes: P prompts, G answers per prompt; `mask` is False where a group has fewer answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.config import LearnConfig


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Groups:
    """Answers in groups."""

    policy: Tensor
    """(P, G) summed log-probability under the steered model; carries the gradient."""
    reference: Tensor
    """(P, G) the same under the unsteered model."""
    rewards: Tensor
    """(P, G)."""
    mask: Tensor
    """(P, G) bool."""


def rloo(groups: Groups, config: LearnConfig) -> Tensor:
    """REINFORCE with the leave-one-out baseline (Ahmadian et al., arXiv 2402.14740).

    Advantage of an answer: its reward minus the mean reward of the *others* in its group. Groups
    with one answer give no signal. Sum over answers.
    """
    del config
    mask = groups.mask.float()
    count = mask.sum(dim=1, keepdim=True)
    total = (groups.rewards * mask).sum(dim=1, keepdim=True)
    others = (total - groups.rewards) / (count - 1).clamp_min(1)
    advantage = torch.where(count > 1, groups.rewards - others, torch.zeros_like(others)) * mask
    return -(advantage.detach() * groups.policy).sum()


def dpo(groups: Groups, config: LearnConfig) -> Tensor:
    """Direct preference optimisation (arXiv 2305.18290) on best against worst of each group.

    Groups whose rewards differ by less than `config.margin` are left out. Sum over the rest.
    """
    low = groups.rewards.masked_fill(~groups.mask, torch.inf)
    high = groups.rewards.masked_fill(~groups.mask, -torch.inf)
    best, worst = high.argmax(dim=1, keepdim=True), low.argmin(dim=1, keepdim=True)
    gap = (groups.rewards.gather(1, best) - groups.rewards.gather(1, worst)).squeeze(1)
    usable = (gap >= config.margin) & (gap > 0)
    ratio = groups.policy - groups.reference
    difference = (ratio.gather(1, best) - ratio.gather(1, worst)).squeeze(1)
    losses = -logsigmoid(config.beta * difference)
    return (losses * usable).sum()


def _answers(rewards: Sequence[float], config: LearnConfig) -> int:
    del config
    return len(rewards)


def _informative(rewards: Sequence[float], config: LearnConfig) -> int:
    gap = max(rewards) - min(rewards)
    return int(gap >= config.margin and gap > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A loss summed over groups, and what it is a sum of."""

    loss: Callable[[Groups, LearnConfig], Tensor]
    units: Callable[[Sequence[float], LearnConfig], int]
    """Rewards of one group -> how many terms it adds to the sum."""


OBJECTIVES: dict[str, Objective] = {
    "dpo": Objective(loss=dpo, units=_informative),
    "rloo": Objective(loss=rloo, units=_answers),
}
