"""Objectives: hand-computed values, gradient signs, and what gives no signal."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spo.algorithms.objectives import (
    OBJECTIVES,
    Groups,
    dpo,
    inverse_temperature,
    is_informative,
    rloo,
)
from spo.config import LearnConfig

CONFIG = LearnConfig(beta=0.5, margin=0.1)


def groups(
    policy: Tensor, rewards: list[list[float]], mask: list[list[bool]] | None = None
) -> Groups:
    shape = policy.shape
    return Groups(
        policy=policy,
        reference=torch.full(shape, -2.0),
        behaviour=policy.detach().clone(),
        lengths=torch.full(shape, 2.0),
        nulled=torch.full(shape, -2.0),
        rewards=torch.tensor(rewards),
        mask=torch.tensor(mask) if mask else torch.ones(shape, dtype=torch.bool),
    )


def test_rloo_by_hand() -> None:
    policy = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    loss = rloo(groups(policy, [[1.0, 0.0, 0.5]]), CONFIG)
    # Advantages: 1 - .25, 0 - .75, .5 - .5.
    assert loss.item() == pytest.approx(-(0.75 * -1.0 + -0.75 * -2.0 + 0.0))
    loss.backward()
    assert policy.grad is not None
    assert policy.grad.tolist()[0] == pytest.approx([-0.75, 0.75, 0.0])


def test_dpo_by_hand() -> None:
    policy = torch.tensor([[-1.0, -2.5, -3.0]])
    loss = dpo(groups(policy, [[0.9, 0.5, 0.1]]), CONFIG)
    assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.5 * 2.0))))


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_descent_raises_the_better_answer_and_a_swap_reverses_it(name: str) -> None:
    gradients = []
    for rewards in ([[1.0, 0.0]], [[0.0, 1.0]]):
        policy = torch.tensor([[-1.5, -1.5]], requires_grad=True)
        OBJECTIVES[name].loss(groups(policy, rewards), CONFIG).backward()
        assert policy.grad is not None
        gradients.append(policy.grad.clone())
    assert gradients[0][0, 0] < 0 < gradients[0][0, 1]
    assert torch.allclose(gradients[0], gradients[1].flip(1))


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_equal_rewards_give_no_gradient(name: str) -> None:
    policy = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    OBJECTIVES[name].loss(groups(policy, [[0.3, 0.3]]), CONFIG).backward()
    assert policy.grad is not None
    assert policy.grad.abs().max() == 0


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_masked_answers_do_not_count(name: str) -> None:
    """A padded third answer with the best reward must change nothing."""
    short = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    OBJECTIVES[name].loss(groups(short, [[1.0, 0.0]]), CONFIG).backward()
    padded = torch.tensor([[-1.0, -2.0, -9.0]], requires_grad=True)
    OBJECTIVES[name].loss(
        groups(padded, [[1.0, 0.0, 5.0]], [[True, True, False]]), CONFIG
    ).backward()
    assert short.grad is not None
    assert padded.grad is not None
    assert padded.grad[0, 2] == 0
    assert torch.allclose(padded.grad[0, :2], short.grad[0])


def test_dpo_leaves_out_pairs_below_the_margin() -> None:
    policy = torch.tensor([[-1.0, -2.0], [-1.0, -2.0]], requires_grad=True)
    dpo(groups(policy, [[0.05, 0.0], [1.0, 0.0]]), CONFIG).backward()
    assert policy.grad is not None
    assert policy.grad[0].abs().max() == 0
    assert policy.grad[1].abs().max() > 0


def test_units_are_what_the_sums_are_made_of() -> None:
    assert OBJECTIVES["rloo"].units([0.1, 0.2, 0.3], CONFIG) == 3
    assert OBJECTIVES["dpo"].units([0.1, 0.15], CONFIG) == 0
    assert OBJECTIVES["dpo"].units([0.1, 0.9], CONFIG) == 1


def test_facts_of_the_configured_objective_are_used() -> None:
    temperatures = {
        name: inverse_temperature(LearnConfig(objective=name)) for name in ("dpo", "simpo", "reps")
    }
    assert temperatures == {"dpo": 0.1, "simpo": 2.5, "reps": 1.0}
    assert inverse_temperature(LearnConfig(objective="simpo", beta=0.3)) == 0.3
    assert {name for name, o in OBJECTIVES.items() if o.on_policy} == {"rloo", "gspo"}
    close = [0.1, 0.12]
    assert is_informative(close, LearnConfig(objective="rloo"))
    assert not is_informative(close, LearnConfig(objective="dpo"))
    assert is_informative(close, LearnConfig(objective="dpo", margin=0.01))
    assert not is_informative([0.1, 0.1], LearnConfig(objective="dpo", margin=0.0))
