"""Triton kernel of steering, for CUDA. Same formulas as `op.removed`, one program for each token.

A token that is not steered costs one load of its plan row; `add` never reads the hidden state.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from spo.engines.vllm.plugin.wire import OPERATOR_CODES
from spo.errors import SteeringError
from spo.records import Operator

_ADD = tl.constexpr(OPERATOR_CODES[Operator.ADD])
_PROJECT = tl.constexpr(OPERATOR_CODES[Operator.PROJECT])
_ADAPTIVE = tl.constexpr(OPERATOR_CODES[Operator.ADAPTIVE])
_TINY = tl.constexpr(1e-12)


@triton.jit
def _gate(x, direction, calibration, inverse_norm, inverse_mean, code):  # type: ignore[no-untyped-def]
    """Factor of `direction` for one token, by operator; see `op._gate`."""
    shifted = x - tl.where(code == _PROJECT, 0.0, 1.0) * calibration
    along = tl.sum(shifted * direction, axis=0) * inverse_norm
    length = tl.maximum(tl.sqrt(tl.sum(shifted * shifted, axis=0)), _TINY)
    size = tl.sqrt(tl.sum(x * x, axis=0))
    adaptive = tl.maximum(along / length, 0.0) * size * inverse_mean
    clamped = tl.maximum(along, 0.0) * inverse_norm
    gated = tl.where(code == _ADAPTIVE, adaptive, clamped)
    return tl.where(code == _PROJECT, along * inverse_norm, gated)


@triton.jit  # type: ignore[untyped-decorator]
def steer_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    hidden,
    residual,
    directions,
    calibration,
    scales,
    plan,
    size,
    hidden_stride,
    residual_stride,
    HAS_HIDDEN: tl.constexpr,
    GATED: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row_plan = plan + token * (3 * LANES)
    live = tl.load(row_plan)
    for lane in tl.static_range(1, LANES):
        live = live | tl.load(row_plan + lane)
    if live != 0:
        columns = tl.arange(0, BLOCK)
        inside = columns < size
        place = residual + token * residual_stride + columns
        state = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        removed = tl.zeros((BLOCK,), tl.float32)
        for lane in tl.static_range(LANES):
            row = tl.load(row_plan + lane).to(tl.int64)
            if row != 0:
                strength = tl.load(row_plan + LANES + lane).to(tl.float32, bitcast=True)
                direction = tl.load(directions + row * size + columns, mask=inside, other=0.0)
                if GATED:
                    code = tl.load(row_plan + 2 * LANES + lane)
                    # A zero coefficient must give zero even where the gate is not finite.
                    if (code != _ADD) & (strength != 0.0):
                        x = state
                        if HAS_HIDDEN:
                            other = hidden + token * hidden_stride + columns
                            x += tl.load(other, mask=inside, other=0.0).to(tl.float32)
                        centre = tl.load(calibration + row * size + columns, mask=inside, other=0.0)
                        inverse_norm = tl.load(scales + 2 * row)
                        inverse_mean = tl.load(scales + 2 * row + 1)
                        strength *= _gate(x, direction, centre, inverse_norm, inverse_mean, code)
                removed += strength * direction
        tl.store(place, (state - removed).to(residual.dtype.element_ty), mask=inside)


def launch(
    hidden: Tensor | None,
    residual: Tensor,
    tables: tuple[Tensor, Tensor, Tensor],
    plan: Tensor,
    gated: bool,
) -> None:
    """Steer the rows of `residual` in place.

    Args:
        hidden: (n, hidden) the other summand of the residual stream, or None if there is none.
        residual: (n, hidden), changed in place.
        tables: directions (rows, hidden), calibration (rows, hidden), scales (rows, 2), float32,
            contiguous.
        plan: (at least n, 3, lanes) int32, contiguous.
        gated: whether an operator other than `add` may occur.

    Raises:
        SteeringError: a layout that the kernel does not read.
    """
    tokens, size = residual.shape
    if residual.stride(1) != 1 or (hidden is not None and hidden.stride(1) != 1):
        raise SteeringError(
            f"the kernel needs contiguous rows, got strides {residual.stride()} for the residual; "
            "start the engine with body='traced'"
        )
    if not tokens:
        return
    steer_kernel[(tokens,)](
        residual if hidden is None else hidden,
        residual,
        *tables,
        plan,
        size,
        0 if hidden is None else hidden.stride(0),
        residual.stride(0),
        **specialise(size, plan.shape[2], gated, hidden is not None),
    )


def specialise(size: int, lanes: int, gated: bool, has_hidden: bool) -> dict[str, Any]:
    """Compile-time arguments."""
    block = triton.next_power_of_2(size)
    return {
        "HAS_HIDDEN": has_hidden,
        "GATED": gated,
        "LANES": lanes,
        "BLOCK": block,
        "num_warps": max(1, min(16, block // 512)),
    }
