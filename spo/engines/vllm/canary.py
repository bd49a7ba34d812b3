"""Start-up canary: the engine must show, in the mode it will serve in, that steering works.

A stale compiled graph, a plugin that did not load or a hook that the compiler dropped all look like
a perfectly healthy, unsteered engine. Nothing else finds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from spo.engines.base import EngineInfo
from spo.errors import SteeringError
from spo.records import Operator, SteeringSpec
from spo.vector import SteeringVector

NAME = "spo-canary"
DOSE = 5.0
"""Coefficient of the canary's requests."""
_EFFECT = 2e-4
"""Steering must change some log-probability by more than this."""
_DRIFT = 1e-4
"""Equal unsteered runs may differ by at most this."""

Logprobs = Sequence[Mapping[int, float]]
"""For each new token: token id -> log-probability of the likeliest tokens."""
Probe = Callable[[SteeringSpec | None], Logprobs]


def canary_vector(info: EngineInfo) -> SteeringVector:
    """A fixed random vector on all layers that opens the gate of every operator."""
    generator = torch.Generator().manual_seed(11)
    signs = torch.randn(info.num_layers, info.hidden_size, generator=generator).sign()
    return SteeringVector(
        layers=tuple(range(info.num_layers)),
        directions=signs,
        mean_norms=torch.full((info.num_layers,), math.sqrt(info.hidden_size)),
        calibration=-10.0 * signs,
        model_id=info.model_id,
        model_revision=info.model_revision,
    )


def difference(one: Logprobs, other: Logprobs) -> float:
    """Largest difference of log-probabilities; infinite when other tokens came out."""
    if [set(token) for token in one] != [set(token) for token in other]:
        return math.inf
    gaps = [abs(a[t] - b[t]) for a, b in zip(one, other, strict=True) for t in a]
    return math.inf if any(math.isnan(gap) for gap in gaps) else max(gaps, default=0.0)


def run_canary(probe: Probe, operators: Sequence[Operator]) -> dict[str, float]:
    """Check the engine with the canary vector published as version 0.

    Args:
        probe: generates greedily from one fixed prompt under a spec.
        operators: those compiled in.

    Returns:
        Effect of each operator, and the drift of the unsteered model.

    Raises:
        SteeringError: an operator changes nothing, or the unsteered model changes.
    """
    baseline = probe(None)
    effects: dict[str, float] = {}
    for operator in operators:
        spec = SteeringSpec(vector=NAME, version=0, coefficient=DOSE, operator=operator)
        effects[operator.value] = difference(baseline, probe(spec))
    silent = [name for name, effect in effects.items() if effect <= _EFFECT]
    if silent:
        raise SteeringError(
            f"steering by {silent} changes nothing in this engine (effects {effects}): a stale "
            "compiled graph or a lost hook. Empty vLLM's compile cache (VLLM_CACHE_ROOT) and "
            "start again; the engine was refused"
        )
    zero = SteeringSpec(vector=NAME, version=0, coefficient=0.0, operator=operators[0])
    drift = max(difference(baseline, probe(spec)) for spec in (zero, None))
    if drift > _DRIFT:
        raise SteeringError(
            f"the unsteered model drifts by {drift:.3g} in log-probability after a steered "
            f"request, at most {_DRIFT:g} is allowed; the engine was refused"
        )
    return {**effects, "drift": drift}
