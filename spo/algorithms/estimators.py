"""Stage I: from pooled activations of several contrasts to one direction for each layer.

Shapes: N rows of a side, L layers, D hidden width. Every estimator takes the two sides of one
contrast and returns unit directions (L, D) that point towards harm. Sources are normalised before
they are summed, so that a source with large activations does not outvote the others. At every layer
a source counts as much as its own direction separates its own held-out rows, so a source that the
model does not represent there adds no noise; the weights are reported. Separability is measured on
the same held-out rows, which no direction was fitted to; only those few source weights saw them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spo.algorithms.metrics import auc_interval
from spo.config import EstimateConfig
from spo.errors import DataError
from spo.records import Interval

Floats = NDArray[np.float32]

# Keeps a direction defined at layers where no source separates anything; such layers get weight 0.
_LEAST_RELIABILITY = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contrast:
    """Pooled activations of one source."""

    source: str
    weight: float
    harm: Floats
    """(N, L, D)."""
    safe: Floats
    """(M, L, D)."""
    harm_ids: Sequence[str]
    """(N,) row ids; they decide which rows are held out."""
    safe_ids: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Estimate:
    """What Stage I found."""

    units: Floats
    """(L, D) combined unit direction of every layer read."""
    source_weights: Mapping[str, Sequence[float]]
    """Weight of each source in the combination, per layer: configured weight x reliability."""
    auc: Mapping[str, Sequence[Interval]]
    """Held-out separability by source: projection on the *combined* direction, per layer."""
    mean_auc: Sequence[float]
    """(L,) mean over sources."""
    cosines: Mapping[str, Sequence[float]]
    """Per pair "a|b" of sources: cosine between their own directions, per layer."""
    chosen: tuple[int, ...]
    """Indices of the chosen layers (into L)."""
    weights: Floats
    """(L,) layer weights in 0..1: held-out separability above chance, best chosen layer = 1."""


def mean_difference(harm: Floats, safe: Floats) -> Floats:
    """Unit difference of means, harm minus safe (CAA, arXiv 2312.06681). (N, L, D) -> (L, D)."""
    return unit_rows(harm.mean(axis=0, dtype=np.float64) - safe.mean(axis=0, dtype=np.float64))


def unit_rows(rows: NDArray[np.float64]) -> Floats:
    """Rows scaled to norm 1; a zero row (sides that do not differ) raises DataError."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    if not np.all(norms > 1e-9):
        dead = np.flatnonzero(norms[..., 0] <= 1e-9).tolist()
        raise DataError(
            f"both sides have the same mean activation at layer rows {dead}: no direction; "
            "check that the harmful and the harmless rows are different texts"
        )
    return (rows / norms).astype(np.float32)


ESTIMATORS: dict[str, Callable[[Floats, Floats], Floats]] = {"mean_difference": mean_difference}


def estimate(
    contrasts: Sequence[Contrast], layers: Sequence[int], num_layers: int, config: EstimateConfig
) -> Estimate:
    """Combine sources, measure separability on held-out rows, choose and weigh layers.

    Args:
        contrasts: one for each source, all with the same L and D.
        layers: the decoder block behind each of the L rows.
        num_layers: number of decoder blocks of the model, for the depth window.
        config: method, hold-out share, layer choice.

    Raises:
        DataError: a source has too few rows, or values that are not finite.
    """
    if not contrasts:
        raise DataError("Stage I needs at least one source of contrasts, got none")
    method = ESTIMATORS[config.method]
    directions: dict[str, Floats] = {}
    held: dict[str, tuple[Floats, Floats]] = {}
    for contrast in contrasts:
        fit, test = _split(contrast, config.holdout_fraction)
        directions[contrast.source] = method(*fit)
        held[contrast.source] = test
    trust = {
        c.source: c.weight * _reliability(directions[c.source], *held[c.source]) for c in contrasts
    }
    total = np.sum(
        [w[:, None] * directions[name].astype(np.float64) for name, w in trust.items()], axis=0
    )
    units = unit_rows(total)
    auc = {name: _separability(units, *sides) for name, sides in held.items()}
    mean_auc = [
        math.fsum(a[row].mean for a in auc.values()) / len(auc) for row in range(len(units))
    ]
    chosen = _choose(mean_auc, layers, num_layers, config)
    excess = np.clip(np.array(mean_auc) - 0.5, 0.0, None)
    best = max(excess[list(chosen)].max(), 1e-9)
    return Estimate(
        units=units,
        source_weights={name: weights.tolist() for name, weights in trust.items()},
        auc=auc,
        mean_auc=mean_auc,
        cosines=_cosines(directions),
        chosen=chosen,
        weights=np.clip(excess / best, 0.0, 1.0).astype(np.float32),
    )


def _split(
    contrast: Contrast, holdout: float
) -> tuple[tuple[Floats, Floats], tuple[Floats, Floats]]:
    """((harm, safe) to fit, (harm, safe) to test), by a hash of the row ids."""
    sides = []
    for name, rows, ids in (
        ("harmful", contrast.harm, contrast.harm_ids),
        ("harmless", contrast.safe, contrast.safe_ids),
    ):
        if not np.isfinite(rows).all():
            raise DataError(
                f"source {contrast.source!r} has activations that are not finite; "
                "extract it again in float32"
            )
        out = np.array([is_held_out(row_id, holdout) for row_id in ids], dtype=bool)
        if out.sum() < 2 or (~out).sum() < 2:
            raise DataError(
                f"source {contrast.source!r} has {len(ids)} {name} rows, too few to fit and to "
                "hold out; give at least 10"
            )
        sides.append((rows[~out], rows[out]))
    (harm_fit, harm_test), (safe_fit, safe_test) = sides
    return (harm_fit, safe_fit), (harm_test, safe_test)


def is_held_out(row_id: str, share: float) -> bool:
    """Whether a row belongs to the held-out share; depends on its id alone."""
    digest = hashlib.sha256(row_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def _reliability(own: Floats, harm: Floats, safe: Floats) -> NDArray[np.float64]:
    """(L,) how well a source's own direction separates its held-out rows: 0 at chance, 1 fully."""
    excess = [2.0 * interval.mean - 1.0 for interval in _separability(own, harm, safe)]
    return np.clip(np.array(excess), _LEAST_RELIABILITY, 1.0)


def _separability(units: Floats, harm: Floats, safe: Floats) -> list[Interval]:
    labels = [1] * len(harm) + [0] * len(safe)
    intervals = []
    for row, unit in enumerate(units):
        scores = np.concatenate([harm[:, row] @ unit, safe[:, row] @ unit]).astype(np.float64)
        intervals.append(auc_interval(scores.tolist(), labels, samples=300, seed=0))
    return intervals


def _choose(
    mean_auc: Sequence[float], layers: Sequence[int], num_layers: int, config: EstimateConfig
) -> tuple[int, ...]:
    if config.layers is not None:
        missing = sorted(set(config.layers) - set(layers))
        if missing:
            raise DataError(
                f"estimate.layers asks for blocks {missing}, extracted were {list(layers)}; the "
                f"model has blocks 0..{num_layers - 1}: change estimate.layers or extract.layers"
            )
        return tuple(sorted(layers.index(layer) for layer in config.layers))
    low, high = (share * (num_layers - 1) for share in config.depth_window)
    inside = [row for row, layer in enumerate(layers) if low <= layer <= high]
    if not inside:
        raise DataError(
            f"no extracted layer lies in the depth window {config.depth_window} of {num_layers} "
            f"blocks (extracted: {list(layers)}); widen estimate.depth_window"
        )
    best = sorted(inside, key=lambda row: -mean_auc[row])[: config.num_layers]
    return tuple(sorted(best))


def _cosines(directions: Mapping[str, Floats]) -> dict[str, list[float]]:
    names = sorted(directions)
    return {
        f"{a}|{b}": (directions[a] * directions[b]).sum(axis=1).astype(float).tolist()
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }
