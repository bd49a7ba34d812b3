"""The tensor code of steering and capturing, as it is compiled into vLLM's graph. No vLLM.

One buffer `plan` (tokens, 3, lanes) int32 says for every token of a step and every lane which row
of the tables to use (0: none), with which coefficient (float32 bits) and which operator. Formulas
are those of `spo.algorithms.operators`, in float32, per token. Lanes read the same hidden state and
their changes are added up.

Two bodies of the same formula (`wire.PluginConfig.body`):

* `kernel`: one opaque operator that changes the residual in place and touches steered tokens only.
  While `SWITCH` is off it launches nothing at all, so a CUDA graph that was captured then is plain
  vLLM's own; see `graphs`.
* `traced`: plain operations, which Inductor fuses into the next layer norm. Every step pays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spo.engines.vllm.plugin.wire import OPERATOR_CODES
from spo.errors import SteeringError
from spo.records import Operator
from spo.vector import SteeringVector

_TINY = 1e-12
_PROJECT = OPERATOR_CODES[Operator.PROJECT]
_ADAPTIVE = OPERATOR_CODES[Operator.ADAPTIVE]
_ADD = OPERATOR_CODES[Operator.ADD]


def removed(x: Tensor | None, tables: tuple[Tensor, Tensor, Tensor], plan: Tensor) -> Tensor:
    """What steering takes away from the hidden state of each token.

    Args:
        x: (n, hidden) float32 hidden state, or None when only `add` is compiled in.
        tables: directions (rows, hidden), calibration (rows, hidden), scales (rows, 2), float32.
        plan: (n, 3, lanes) int32.

    Returns:
        (n, hidden) float32.
    """
    directions, calibration, scales = tables
    coefficients = plan[:, 1, :].view(torch.float32)
    total = None
    for lane in range(plan.shape[2]):
        rows = plan[:, 0, lane].long()
        strength = coefficients[:, lane]
        direction = directions[rows]
        if x is not None:
            gate = _gate(x, direction, calibration[rows], scales[rows], plan[:, 2, lane])
            # A zero coefficient must give zero even where the gate is not finite.
            strength = torch.where(strength == 0.0, 0.0, strength * gate)
        part = strength.unsqueeze(-1) * direction
        total = part if total is None else total + part
    assert total is not None
    return total


def _gate(
    x: Tensor, direction: Tensor, calibration: Tensor, scales: Tensor, code: Tensor
) -> Tensor:
    """(n,) factor of `direction`, by operator."""
    inverse_norm, inverse_mean = scales[:, 0], scales[:, 1]
    centre = torch.where((code == _PROJECT).unsqueeze(-1), 0.0, calibration)
    shifted = x - centre
    along = (shifted * direction).sum(dim=-1) * inverse_norm
    length = shifted.square().sum(dim=-1).sqrt().clamp_min(_TINY)
    size = x.square().sum(dim=-1).sqrt()
    adaptive = (along / length).clamp_min(0.0) * size * inverse_mean
    clamped = along.clamp_min(0.0) * inverse_norm
    gated = torch.where(code == _ADAPTIVE, adaptive, clamped)
    gated = torch.where(code == _PROJECT, along * inverse_norm, gated)
    return torch.where(code == _ADD, 1.0, gated)


def steer_traced(
    hidden: Tensor | None,
    residual: Tensor,
    tables: tuple[Tensor, Tensor, Tensor],
    plan: Tensor,
    gated: bool,
) -> Tensor:
    """Steered `residual`, in plain operations for the compiler to fuse."""
    plan = plan[: residual.shape[0]]
    x = None
    if gated:
        x = residual.float() if hidden is None else hidden.float() + residual.float()
    return residual - removed(x, tables, plan).to(residual.dtype)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Selection:
    """The steered tokens of one step; the same for every layer."""

    rows: Tensor
    """(k,) which tokens, int64."""
    plan: Tensor
    """(k, 3, lanes) int32."""
    gated: bool
    """Whether any of them reads the hidden state."""

    @classmethod
    def of(cls, plan: Tensor) -> Selection:
        """Those that `plan` (n, 3, lanes) steers."""
        rows = plan[:, 0, :].any(dim=-1).nonzero()[:, 0]
        chosen = plan[rows]
        return cls(rows=rows, plan=chosen, gated=bool((chosen[:, 2] != _ADD).any()))


class Switch:
    """Whether the coming forward pass steers or captures any token. One for each process.

    The worker sets it before every step; an engine whose step needs it and finds it off refuses to
    run (`WorkerSteering.step`).
    """

    def __init__(self) -> None:
        self.on = False
        self.launches = 0
        """Calls of the steering operator while on; CUDA graph replays are not calls."""
        self.selection: Selection | None = None
        """CPU only: worked out once by the worker, so that not every layer has to."""


SWITCH = Switch()


def _steer_cpu(
    hidden: Tensor | None,
    residual: Tensor,
    directions: Tensor,
    calibration: Tensor,
    scales: Tensor,
    plan: Tensor,
    gated: bool,
) -> None:
    if not SWITCH.on:
        return
    SWITCH.launches += 1
    chosen = SWITCH.selection or Selection.of(plan[: residual.shape[0]])
    if chosen.rows.numel():
        gated = gated and chosen.gated
        residual[chosen.rows] = steer_traced(
            hidden[chosen.rows] if gated and hidden is not None else None,
            residual[chosen.rows],
            (directions, calibration, scales),
            chosen.plan,
            gated,
        )


def _steer_cuda(
    hidden: Tensor | None,
    residual: Tensor,
    directions: Tensor,
    calibration: Tensor,
    scales: Tensor,
    plan: Tensor,
    gated: bool,
) -> None:
    if not SWITCH.on:
        return
    from spo.engines.vllm.plugin.kernel import launch

    SWITCH.launches += 1
    launch(hidden, residual, (directions, calibration, scales), plan, gated)


def _capture(hidden: Tensor | None, residual: Tensor, segments: Tensor, pool: Tensor) -> None:
    if not SWITCH.on:
        return
    segments = segments[: residual.shape[0]]
    if residual.device.type == "cpu":
        live = segments.nonzero()[:, 0]
        if not live.numel():
            return
        residual, segments = residual[live], segments[live]
        hidden = None if hidden is None else hidden[live]
    x = residual.float() if hidden is None else hidden.float() + residual.float()
    sample = torch.cat([x, x.norm(dim=-1, keepdim=True)], dim=-1)
    pool.index_add_(0, segments.long(), sample)


_LIBRARY = torch.library.Library("spo", "FRAGMENT")
_LIBRARY.define(
    "steer(Tensor? hidden, Tensor(a!) residual, Tensor directions, Tensor calibration, "
    "Tensor scales, Tensor plan, bool gated) -> ()"
)
_LIBRARY.define("capture(Tensor? hidden, Tensor residual, Tensor segments, Tensor(a!) pool) -> ()")
_LIBRARY.impl("steer", _steer_cpu, "CPU")
_LIBRARY.impl("steer", _steer_cuda, "CUDA")
_LIBRARY.impl("capture", _capture, "CPU")
_LIBRARY.impl("capture", _capture, "CUDA")


def _no_fake(*_: object) -> None:
    """Both operators only write in place."""


torch.library.register_fake("spo::steer", _no_fake, lib=_LIBRARY)
torch.library.register_fake("spo::capture", _no_fake, lib=_LIBRARY)


def after_layer(module: nn.Module, args: object, output: object) -> object:
    """Forward hook of a decoder layer: capture, then steer its output.

    A layer gives `(hidden, residual)`, whose sum is the residual stream, or one tensor that is it.
    The residual is the part that changes: a sum of `hidden` with anything would break vLLM's
    fusion of all-reduce and layer norm.
    """
    if isinstance(output, tuple) and len(output) >= 2 and isinstance(output[1], Tensor):
        hidden, residual = output[0], output[1]
        return (hidden, _apply(module, hidden, residual), *output[2:])
    if isinstance(output, Tensor):
        return _apply(module, None, output)
    raise SteeringError(
        f"{type(module).__name__} gives {type(output).__name__}, expected (hidden, residual) or a "
        "tensor; this architecture cannot be steered"
    )


def _apply(module: Any, hidden: Tensor | None, residual: Tensor) -> Tensor:
    if module.spo_capture:
        torch.ops.spo.capture(hidden, residual, module.spo_segments, module.spo_pool)
    tables = (module.spo_directions, module.spo_calibration, module.spo_scales)
    if module.spo_traced:
        return steer_traced(hidden, residual, tables, module.spo_plan, module.spo_gated)
    if not torch.compiler.is_compiling() and SWITCH.on:
        # Without a compiler that knows what else reads this tensor, change a copy.
        residual = residual.clone()
    torch.ops.spo.steer(hidden, residual, *tables, module.spo_plan, module.spo_gated)
    return residual


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerTables:
    """The persistent tensors of all layers; row 0 stays zero."""

    directions: Tensor
    """(layers, slots + 1, hidden) float32."""
    calibration: Tensor
    """(layers, slots + 1, hidden) float32; (layers, 1, 1) when no operator reads it."""
    scales: Tensor
    """(layers, slots + 1, 2) float32: 1 / norm of the direction, 1 / mean hidden norm."""

    def write(self, slot: int, vector: SteeringVector) -> None:
        """Put a vector into a slot, in place; layers that it does not steer become zero."""
        rows = len(self.directions)
        index = torch.tensor(vector.layers)
        directions = torch.zeros(rows, vector.hidden_size)
        directions[index] = vector.directions
        scales = torch.zeros(rows, 2)
        scales[index, 0] = 1.0 / vector.norms.clamp_min(_TINY)
        scales[index, 1] = 1.0 / vector.mean_norms
        self.directions[:, slot].copy_(directions)
        self.scales[:, slot].copy_(scales)
        if self.calibration.shape[1] > 1:
            calibration = torch.zeros(rows, vector.hidden_size)
            calibration[index] = vector.calibration
            self.calibration[:, slot].copy_(calibration)
