"""Steering operators: how a direction v changes the residual stream h at one layer.

With coefficient a, mean hidden norm m of the layer, unit direction u = v / |v| and calibration
activation c (mean benign activation):

* `add`      h - a v
* `project`  h - a (h.u) u                              removes the component (a = 1: all of it)
* `adaptive` h - a max(cos(h - c, u), 0) |h| v / m      ASTRA (arXiv 2411.16721) with v / m for
                                                        their unit vector, equal where |v| = m
* `clamp`    h - a max((h - c).u, 0) u                  holds the component at its benign level

Norms and cosines are per token, never over a batch. Everything is computed in float32 and cast back
once; a zero coefficient or a zero vector leaves h as it was, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spo.records import Operator

# Below this a norm counts as zero: its direction is noise, and the operator must do nothing.
_TINY = 1e-12
_Gate = Callable[[Tensor], Tensor]


def steer(
    operator: Operator,
    hidden: Tensor,
    direction: Tensor,
    *,
    coefficient: Tensor | float,
    mean_norm: Tensor | float,
    calibration: Tensor,
    straight_through: bool = False,
) -> Tensor:
    """Apply one operator.

    Args:
        operator: which rule.
        hidden: (..., hidden) residual stream, any float dtype.
        direction: (hidden,) float32, activation units, towards harm. May require gradients.
        coefficient: scalar, or (...,) to give each position its own (0 = leave alone).
        mean_norm: mean hidden norm of the layer; only `adaptive` uses it.
        calibration: (hidden,) float32; only `adaptive` and `clamp` use it.
        straight_through: gradients pass a closed gate as if it were open, the values stay the same.
            For attackers: a closed gate otherwise hides how to keep it closed.

    Returns:
        A new tensor, shape and dtype of `hidden`.
    """
    wide = hidden.float()
    rule = _RULES[operator]
    gate = _straight_through_gate if straight_through else _gate
    mean_norm = torch.as_tensor(mean_norm, device=wide.device)
    removed = rule(wide, direction, mean_norm, calibration, gate)
    scale = torch.as_tensor(coefficient, device=wide.device, dtype=torch.float32)
    if scale.ndim:
        scale = scale.unsqueeze(-1)
    return hidden - (scale * removed).to(hidden.dtype)


def _gate(value: Tensor) -> Tensor:
    return value.clamp_min(0.0)


def _straight_through_gate(value: Tensor) -> Tensor:
    # The second term is zero; it only carries the gradient, so the value is exact.
    return value.clamp_min(0.0).detach() + (value - value.detach())


def _unit(direction: Tensor) -> Tensor:
    return direction / direction.norm().clamp_min(_TINY)


def _add(
    hidden: Tensor, direction: Tensor, mean_norm: Tensor, calibration: Tensor, gate: _Gate
) -> Tensor:
    return direction.expand_as(hidden)


def _project(
    hidden: Tensor, direction: Tensor, mean_norm: Tensor, calibration: Tensor, gate: _Gate
) -> Tensor:
    unit = _unit(direction)
    return (hidden @ unit).unsqueeze(-1) * unit


def _adaptive(
    hidden: Tensor, direction: Tensor, mean_norm: Tensor, calibration: Tensor, gate: _Gate
) -> Tensor:
    shifted = hidden - calibration
    length = shifted.norm(dim=-1, keepdim=True).clamp_min(_TINY)
    cosine = (shifted @ _unit(direction)).unsqueeze(-1) / length
    return gate(cosine) * hidden.norm(dim=-1, keepdim=True) * direction / mean_norm


def _clamp(
    hidden: Tensor, direction: Tensor, mean_norm: Tensor, calibration: Tensor, gate: _Gate
) -> Tensor:
    unit = _unit(direction)
    return gate((hidden - calibration) @ unit).unsqueeze(-1) * unit


_Rule = Callable[[Tensor, Tensor, Tensor, Tensor, _Gate], Tensor]
_RULES: dict[Operator, _Rule] = {
    Operator.ADD: _add,
    Operator.PROJECT: _project,
    Operator.ADAPTIVE: _adaptive,
    Operator.CLAMP: _clamp,
}
