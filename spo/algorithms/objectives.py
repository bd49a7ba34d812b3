"""Sequence-level preference objectives: one scalar per whole answer, no credit to single tokens.

Each takes the log-probabilities of groups of answers to the same prompt and their rewards, and
returns a loss whose gradient flows through `policy`: a *sum*, together with how many terms a group
adds to it, so that the mean over a batch does not depend on how it is cut into micro-batches or
over workers. Adding one: a function of `Groups` here, a line in `OBJECTIVES` with what the rest of
the system has to know about it, a test of its gradient's sign. Another package adds an `Objective`
by an entry point of group `spo.objectives`.

`rloo` and `gspo` estimate the gradient of the expected reward of the *current* vector, so samples
of an older one are weighed by the likelihood ratio of the whole answer. The pairwise objectives fit
preferences and need no correction.

Shapes: P prompts, G answers per prompt; `mask` is False where a group has fewer answers. The
configuration asks here for names and facts, so importing this module does not load torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from spo import plugins

if TYPE_CHECKING:
    from torch import Tensor

    from spo.config import LearnConfig


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Groups:
    """Answers in groups."""

    policy: Tensor
    """(P, G) summed log-probability under the steered model; carries the gradient."""
    reference: Tensor
    """(P, G) the same under the unsteered model."""
    behaviour: Tensor
    """(P, G) the same under the vector that sampled the answer, as the engine gave it."""
    lengths: Tensor
    """(P, G) tokens of each answer."""
    rewards: Tensor
    """(P, G)."""
    mask: Tensor
    """(P, G) bool."""
    sign: float = 1.0
    """Direction in which the vector was applied for `policy`; -1 only for `bipo`."""
    nulled: Tensor | None = None
    """(P, G) with what the vector adds taken out instead; only for `reps`."""


def rloo(groups: Groups, config: LearnConfig) -> Tensor:
    """REINFORCE with the leave-one-out baseline (Ahmadian et al., arXiv 2402.14740).

    Advantage of an answer: its reward minus the mean reward of the *others* in its group. Groups
    with one answer give no signal. Samples are weighed by the truncated likelihood ratio
    min(pi / pi_sampled, importance_clip) of the whole answer. Sum over answers.
    """
    mask = groups.mask.float()
    count = mask.sum(dim=1, keepdim=True)
    total = (groups.rewards * mask).sum(dim=1, keepdim=True)
    others = (total - groups.rewards) / (count - 1).clamp_min(1)
    advantage = (groups.rewards - others).masked_fill(count <= 1, 0.0) * mask
    ratio = (groups.policy - groups.behaviour).detach().exp().clamp_max(config.importance_clip)
    return -((ratio * advantage).detach() * groups.policy).sum()


def gspo(groups: Groups, config: LearnConfig) -> Tensor:
    """Group sequence policy optimisation (arXiv 2507.18071).

    s = (pi / pi_sampled)^(1 / length), A = (reward - mean) / standard deviation of its group; loss
    -min(s A, clip(s, 1 - clip, 1 + clip) A). Sum over answers.
    """
    mask = groups.mask.float()
    count = mask.sum(dim=1, keepdim=True).clamp_min(1)
    centred = (groups.rewards - (groups.rewards * mask).sum(dim=1, keepdim=True) / count) * mask
    deviation = ((centred**2).sum(dim=1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
    advantage = centred / (deviation + 1e-4)
    ratio = ((groups.policy - groups.behaviour) / groups.lengths.clamp_min(1)).exp()
    clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
    return -((ratio * advantage).minimum(clipped * advantage) * mask).sum()


def dpo(groups: Groups, config: LearnConfig) -> Tensor:
    """Direct preference optimisation (arXiv 2305.18290) on best against worst of each group.

    Groups whose rewards differ by less than `config.margin` are left out. Sum over the rest.
    """
    pairs = _pairs(groups, config)
    difference = pairs.of(groups.policy - groups.reference)
    return (-_log_sigmoid(inverse_temperature(config) * difference) * pairs.usable).sum()


def bipo(groups: Groups, config: LearnConfig) -> Tensor:
    """Bi-directional preference optimisation (arXiv 2406.00045): `dpo` with a random sign d.

    The vector is applied with d = +1 or -1 and preferred and rejected change places with it, so
    that both directions of the vector mean something. Sum over groups.
    """
    pairs = _pairs(groups, config)
    difference = groups.sign * pairs.of(groups.policy - groups.reference)
    return (-_log_sigmoid(inverse_temperature(config) * difference) * pairs.usable).sum()


def simpo(groups: Groups, config: LearnConfig) -> Tensor:
    """SimPO (arXiv 2405.14734): mean log-probabilities, no reference, a target margin."""
    pairs = _pairs(groups, config)
    difference = pairs.of(groups.policy / groups.lengths.clamp_min(1))
    return (
        -_log_sigmoid(inverse_temperature(config) * difference - config.gamma) * pairs.usable
    ).sum()


def reps(groups: Groups, config: LearnConfig) -> Tensor:
    """Reference-free preference steering (arXiv 2505.20809), with the run's own strength as factor.

    Steered, the preferred answer c must be likelier than the rejected one r; with what the vector
    adds taken out, less likely. Mean log-probabilities; the side that the unsteered model finds
    unlikely is weighed up:

        D+ = max(ref(r) - ref(c), 1) policy(c) / |c| - policy(r) / |r|
        D- = max(ref(c) - ref(r), 1) nulled(r) / |r| - nulled(c) / |c|
        loss = -log sigmoid(D+) - log sigmoid(D-)
    """
    assert groups.nulled is not None
    pairs = _pairs(groups, config)
    lengths = groups.lengths.clamp_min(1)
    gap = pairs.of(groups.reference).detach()
    policy, nulled = groups.policy / lengths, groups.nulled / lengths
    plus = (-gap).clamp_min(1) * pairs.best_of(policy) - pairs.worst_of(policy)
    minus = gap.clamp_min(1) * pairs.worst_of(nulled) - pairs.best_of(nulled)
    beta = inverse_temperature(config)
    return (-(_log_sigmoid(beta * plus) + _log_sigmoid(beta * minus)) * pairs.usable).sum()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Pairs:
    """Best and worst answer of each group."""

    best: Tensor
    worst: Tensor
    usable: Tensor
    """(P,) whether their rewards differ enough."""

    def best_of(self, values: Tensor) -> Tensor:
        return values.gather(1, self.best).squeeze(1)

    def worst_of(self, values: Tensor) -> Tensor:
        return values.gather(1, self.worst).squeeze(1)

    def of(self, values: Tensor) -> Tensor:
        """(P,) value of the best minus value of the worst."""
        return self.best_of(values) - self.worst_of(values)


def _pairs(groups: Groups, config: LearnConfig) -> _Pairs:
    low = groups.rewards.masked_fill(~groups.mask, inf)
    high = groups.rewards.masked_fill(~groups.mask, -inf)
    best, worst = high.argmax(dim=1, keepdim=True), low.argmin(dim=1, keepdim=True)
    gap = (groups.rewards.gather(1, best) - groups.rewards.gather(1, worst)).squeeze(1)
    return _Pairs(best=best, worst=worst, usable=(gap >= config.margin) & (gap > 0))


def _log_sigmoid(values: Tensor) -> Tensor:
    from torch.nn.functional import logsigmoid

    return logsigmoid(values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A loss summed over groups, and everything that the rest of the system has to know about it.

    Example:
        Objective(loss=simpo, temperature=2.5)
    """

    loss: Callable[[Groups, LearnConfig], Tensor]
    per_answer: bool = False
    """Whether every answer adds a term to the sum; else every informative group adds one, its pair
    of best and worst answer."""
    on_policy: bool = False
    """Whether it needs answers of the vector that it improves, so `rollout.static` cannot go."""
    temperature: float = 0.1
    """Inverse temperature of a pair where `learn.beta` is not given."""
    smallest_gap: float | None = None
    """Smallest difference of rewards in a group that it learns from; None: `learn.margin`."""
    random_sign: bool = False
    """Whether the vector is applied with a random sign."""
    nulled: bool = False
    """Whether it needs `Groups.nulled`."""

    def is_informative(self, rewards: Sequence[float], config: LearnConfig) -> bool:
        """Whether it can learn anything from a group with these rewards."""
        least = config.margin if self.smallest_gap is None else self.smallest_gap
        gap = max(rewards) - min(rewards)
        return gap > 0 and gap >= least

    def units(self, rewards: Sequence[float], config: LearnConfig) -> int:
        """How many terms a group with these rewards adds to the sum."""
        return len(rewards) if self.per_answer else int(self.is_informative(rewards, config))


OBJECTIVES: dict[str, Objective] = {
    "dpo": Objective(loss=dpo),
    "simpo": Objective(loss=simpo, temperature=2.5),
    "bipo": Objective(loss=bipo, random_sign=True),
    "reps": Objective(loss=reps, temperature=1.0, nulled=True),
    "rloo": Objective(loss=rloo, per_answer=True, on_policy=True, smallest_gap=1e-6),
    "gspo": Objective(loss=gspo, per_answer=True, on_policy=True, smallest_gap=1e-6),
}


def objective_of(config: LearnConfig) -> Objective:
    """The configured objective, built in or added by another package."""
    found: Objective = plugins.find(plugins.OBJECTIVES, config.objective)
    return found


def inverse_temperature(config: LearnConfig) -> float:
    """`learn.beta`, or the objective's own."""
    return config.beta or objective_of(config).temperature


def is_informative(rewards: Sequence[float], config: LearnConfig) -> bool:
    """Whether the configured objective can learn anything from a group with these rewards."""
    return objective_of(config).is_informative(rewards, config)
