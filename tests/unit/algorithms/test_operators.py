"""Operators against numbers worked out by hand, and the identities they promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spo.algorithms.operators import steer
from spo.records import Operator

ZERO = torch.zeros(2)


def apply(
    operator: Operator,
    hidden: Tensor,
    direction: Tensor,
    *,
    coefficient: Tensor | float = 1.0,
    mean_norm: float = 1.0,
    calibration: Tensor | None = None,
) -> Tensor:
    return steer(
        operator,
        hidden,
        direction,
        coefficient=coefficient,
        mean_norm=mean_norm,
        calibration=torch.zeros_like(direction) if calibration is None else calibration,
    )


@pytest.mark.parametrize(
    ("operator", "coefficient", "mean_norm", "calibration", "expected"),
    [
        # h = (3, 4), v = (2, 0), so |h| = 5 and u = (1, 0).
        (Operator.ADD, 0.5, 1.0, [0.0, 0.0], [2.0, 4.0]),
        (Operator.ADD, -1.0, 1.0, [0.0, 0.0], [5.0, 4.0]),
        (Operator.PROJECT, 1.0, 1.0, [0.0, 0.0], [0.0, 4.0]),
        (Operator.PROJECT, 0.5, 1.0, [0.0, 0.0], [1.5, 4.0]),
        # cos = 3/5; removed 3/5 * 5 * v / m = (6, 0) / m.
        (Operator.ADAPTIVE, 1.0, 2.0, [0.0, 0.0], [0.0, 4.0]),
        (Operator.ADAPTIVE, 0.5, 4.0, [0.0, 0.0], [2.25, 4.0]),
        # h - c = (0, 4): no component towards harm.
        (Operator.ADAPTIVE, 1.0, 2.0, [3.0, 0.0], [3.0, 4.0]),
        # h - c = (-1, 4): away from harm, the gate is shut.
        (Operator.ADAPTIVE, 1.0, 2.0, [4.0, 0.0], [3.0, 4.0]),
        # h - c = (3, 4) - (0, 4) = (3, 0): cos = 1, removed 1 * 5 * (2, 0) / 2.
        (Operator.ADAPTIVE, 1.0, 2.0, [0.0, 4.0], [-2.0, 4.0]),
        # component 3 is held at the benign 1.
        (Operator.CLAMP, 1.0, 1.0, [1.0, 9.0], [1.0, 4.0]),
        (Operator.CLAMP, 1.0, 1.0, [5.0, 0.0], [3.0, 4.0]),
    ],
)
def test_by_hand(
    operator: Operator,
    coefficient: float,
    mean_norm: float,
    calibration: list[float],
    expected: list[float],
) -> None:
    result = apply(
        operator,
        torch.tensor([3.0, 4.0]),
        torch.tensor([2.0, 0.0]),
        coefficient=coefficient,
        mean_norm=mean_norm,
        calibration=torch.tensor(calibration),
    )
    torch.testing.assert_close(result, torch.tensor(expected))


def random_case(seed: int, shape: tuple[int, ...] = (3, 5, 8)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(shape, generator=generator) * 10
    direction = torch.randn(shape[-1], generator=generator)
    return hidden, direction, torch.randn(shape[-1], generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operator", list(Operator))
def test_zero_coefficient_is_bit_identical(operator: Operator, dtype: torch.dtype) -> None:
    hidden, direction, calibration = random_case(1)
    hidden = hidden.to(dtype)
    for coefficient in (0.0, torch.zeros(3, 5)):
        result = apply(
            operator, hidden, direction, coefficient=coefficient, calibration=calibration
        )
        assert result.dtype == dtype
        assert torch.equal(bits(result), bits(hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", list(Operator))
def test_zero_vector_is_bit_identical(operator: Operator, dtype: torch.dtype) -> None:
    hidden, _, calibration = random_case(2)
    hidden = hidden.to(dtype)
    result = apply(operator, hidden, torch.zeros(8), coefficient=7.0, calibration=calibration)
    assert torch.equal(bits(result), bits(hidden))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_adaptive_is_astra_where_the_norm_is_the_mean_norm() -> None:
    """ASTRA: h - a max(cos(h - h0, v), 0) |h| v / |v|."""
    hidden, direction, calibration = random_case(3)
    shifted = hidden - calibration
    unit = direction / direction.norm()
    gate = torch.nn.functional.cosine_similarity(shifted, unit, dim=-1).clamp(min=0)
    assert (gate > 0).any()
    assert (gate == 0).any()
    expected = hidden - 1.7 * (gate * hidden.norm(dim=-1)).unsqueeze(-1) * unit
    result = apply(
        Operator.ADAPTIVE,
        hidden,
        direction,
        coefficient=1.7,
        mean_norm=float(direction.norm()),
        calibration=calibration,
    )
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("operator", list(Operator))
def test_a_token_does_not_see_the_batch(operator: Operator) -> None:
    hidden, direction, calibration = random_case(4)
    strengths = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    together = apply(
        operator, hidden, direction, coefficient=strengths, mean_norm=3.0, calibration=calibration
    )
    for row in range(3):
        for token in range(5):
            alone = apply(
                operator,
                hidden[row, token],
                direction,
                coefficient=float(strengths[row, token]),
                mean_norm=3.0,
                calibration=calibration,
            )
            torch.testing.assert_close(together[row, token], alone)


def test_position_strength_zero_leaves_that_token_alone() -> None:
    hidden, direction, _ = random_case(5)
    strengths = torch.zeros(3, 5)
    strengths[1, 2] = 2.0
    result = apply(Operator.ADD, hidden, direction, coefficient=strengths)
    expected = hidden.clone()
    expected[1, 2] -= 2.0 * direction
    assert torch.equal(result, expected)


def test_projection_is_complete_and_idempotent() -> None:
    hidden, direction, _ = random_case(6)
    once = apply(Operator.PROJECT, hidden, direction)
    residue = once @ (direction / direction.norm())
    assert residue.abs().max() < 1e-4
    torch.testing.assert_close(apply(Operator.PROJECT, once, direction), once, atol=1e-4, rtol=0)


def test_clamp_never_exceeds_the_benign_level() -> None:
    hidden, direction, calibration = random_case(7)
    unit = direction / direction.norm()
    result = apply(Operator.CLAMP, hidden, direction, calibration=calibration)
    level, before = calibration @ unit, hidden @ unit
    torch.testing.assert_close(result @ unit, before.clamp(max=float(level)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("operator", [Operator.PROJECT, Operator.CLAMP])
def test_length_of_the_direction_does_not_matter(operator: Operator) -> None:
    hidden, direction, calibration = random_case(8)
    one = apply(operator, hidden, direction, calibration=calibration)
    ten = apply(operator, hidden, direction * 10, calibration=calibration)
    torch.testing.assert_close(one, ten)


@pytest.mark.parametrize("operator", [Operator.ADD, Operator.ADAPTIVE])
def test_effect_grows_with_the_direction(operator: Operator) -> None:
    hidden, direction, calibration = random_case(9)
    one = apply(operator, hidden, direction, mean_norm=2.0, calibration=calibration) - hidden
    ten = apply(operator, hidden, direction * 10, mean_norm=2.0, calibration=calibration) - hidden
    torch.testing.assert_close(ten, one * 10, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("operator", list(Operator))
def test_input_stays_as_it_was(operator: Operator) -> None:
    hidden, direction, calibration = random_case(10)
    copies = hidden.clone(), direction.clone(), calibration.clone()
    result = apply(operator, hidden, direction, calibration=calibration)
    assert result.data_ptr() != hidden.data_ptr()
    assert all(
        torch.equal(a, b) for a, b in zip(copies, (hidden, direction, calibration), strict=True)
    )


@pytest.mark.parametrize("operator", list(Operator))
def test_gradient_in_the_direction(operator: Operator) -> None:
    """Against central differences, in float32: the operator computes in float32 by contract."""
    hidden, direction, calibration = random_case(11, (6, 4))
    hidden = hidden / 5

    def loss(value: Tensor) -> Tensor:
        steered = apply(
            operator, hidden, value, coefficient=0.7, mean_norm=2.0, calibration=calibration
        )
        return (steered * weights).sum()

    weights = torch.randn(6, 4, generator=torch.Generator().manual_seed(12))
    variable = direction.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(variable), variable)
    step = 1e-2
    numeric = torch.stack(
        [
            (loss(direction + step * axis) - loss(direction - step * axis)) / (2 * step)
            for axis in torch.eye(4)
        ]
    )
    assert gradient.abs().max() > 0.05
    torch.testing.assert_close(gradient, numeric, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("operator", list(Operator))
def test_gradient_at_a_zero_vector_is_finite(operator: Operator) -> None:
    hidden, _, calibration = random_case(13)
    variable = torch.zeros(8, requires_grad=True)
    apply(operator, hidden, variable, mean_norm=2.0, calibration=calibration).sum().backward()
    assert variable.grad is not None
    assert torch.isfinite(variable.grad).all()
