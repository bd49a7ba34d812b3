"""Stage I's choice: combine the sources' directions, measure them on held-out rows, pick layers.

Sources are normalised before they are summed, so that a source with large activations does not
outvote the others. At every layer a source counts as much as its own direction separates its own
held-out rows, so a source that the model does not represent there adds no noise; the weights are
reported. Separability is measured on the same held-out rows, which no direction was fitted to; only
those few source weights saw them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spo.algorithms.estimators import (
    Contrast,
    Floats,
    estimator_of,
    in_first_half,
    is_held_out,
    projections,
    unit_rows,
)
from spo.algorithms.metrics import auc_interval
from spo.config import EstimateConfig
from spo.errors import DataError
from spo.records import Interval

# Keeps a direction defined at layers where no source separates anything; such layers get weight 0.
_LEAST_RELIABILITY = 1e-3
_RESAMPLES = 300
_BINS = 40


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Histogram:
    """Held-out projections of one source at one layer on the combined direction."""

    layer: int
    edges: Sequence[float]
    harm: Sequence[int]
    safe: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Estimate:
    """What Stage I found."""

    units: Floats
    """(L, D) combined unit direction of every layer read."""
    source_weights: Mapping[str, Sequence[float]]
    """Share of each source in the combination, per layer; sums to 1 over the sources."""
    auc: Mapping[str, Sequence[Interval]]
    """Held-out separability by source: projection on the *combined* direction, per layer."""
    own_auc: Mapping[str, Sequence[Interval]]
    """The same on the source's own direction."""
    mean_auc: Sequence[float]
    """(L,) mean over sources."""
    cosines: Mapping[str, Sequence[float]]
    """Per pair "a|b" of sources: cosine between their own directions, per layer."""
    halves: Mapping[str, Sequence[float]]
    """Per source: cosine between the directions of two halves of its fitting rows, per layer."""
    histograms: Mapping[str, Histogram]
    """Per source, at the best chosen layer."""
    chosen: tuple[int, ...]
    """Indices of the chosen layers (into L)."""
    weights: Floats
    """(L,) layer weights in 0..1: held-out separability above chance, best chosen layer = 1."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LeftOut:
    """How directions of the other sources separate a source that none of them saw."""

    source: str
    combined: Interval
    """AUC of the combination of all others."""
    singles: Mapping[str, Interval]
    """AUC of each other source's direction alone."""
    picked: str
    """The single source that one would pick without seeing the left-out one: best on itself."""
    layer: int
    """Row of the layer, chosen on the other sources."""


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
    directions = fit_directions(contrasts, config)
    own_auc = {c.source: _separability(c, config, [directions[c.source]])[0] for c in contrasts}
    units, shares = combine(contrasts, directions, own_auc)
    tested = {c.source: _held_out(c, config, [units]) for c in contrasts}
    auc = {name: _intervals(harm, scores[0]) for name, (harm, scores) in tested.items()}
    mean_auc = _mean_auc(auc)
    chosen = choose_layers(mean_auc, layers, num_layers, config)
    excess = np.clip(np.array(mean_auc) - 0.5, 0.0, None)
    best = max(excess[list(chosen)].max(), 1e-9)
    top = max(chosen, key=lambda row: mean_auc[row])
    return Estimate(
        units=units,
        source_weights=shares,
        auc=auc,
        own_auc=own_auc,
        mean_auc=mean_auc,
        cosines=_cosines(directions),
        halves={c.source: _half_cosines(c, config) for c in contrasts},
        histograms={
            name: _histogram(harm, scores[0][:, top], layers[top])
            for name, (harm, scores) in tested.items()
        },
        chosen=chosen,
        weights=np.clip(excess / best, 0.0, 1.0).astype(np.float32),
    )


def leave_one_out(
    contrasts: Sequence[Contrast], layers: Sequence[int], num_layers: int, config: EstimateConfig
) -> list[LeftOut]:
    """For every source: do the others' directions separate it, together and one by one?

    Nothing about the left-out source is used: directions, weights and the layer come from the
    others. The left-out source's held-out rows are the test.
    """
    if len(contrasts) < 3:
        raise DataError(
            f"leaving one source out needs at least 3 sources, got {len(contrasts)}; add some to "
            "extract.sources"
        )
    directions = fit_directions(contrasts, config)
    own_auc = {c.source: _separability(c, config, [directions[c.source]])[0] for c in contrasts}
    found = []
    for left in contrasts:
        others = [c for c in contrasts if c is not left]
        units, _ = combine(others, directions, own_auc)
        mean_auc = _mean_auc({c.source: own_auc[c.source] for c in others})
        chosen = choose_layers(mean_auc, layers, num_layers, config)
        row = max(chosen, key=lambda r: mean_auc[r])
        tried = [units, *(directions[c.source] for c in others)]
        harm, scores = _held_out(left, config, tried)
        combined, *singles = (_interval(harm, score[:, row]) for score in scores)
        names = [c.source for c in others]
        found.append(
            LeftOut(
                source=left.source,
                combined=combined,
                singles=dict(zip(names, singles, strict=True)),
                picked=max(names, key=lambda name: own_auc[name][row].mean),
                layer=layers[row],
            )
        )
    return found


def fit_directions(contrasts: Sequence[Contrast], config: EstimateConfig) -> dict[str, Floats]:
    """Each source's own unit directions (L, D), from its fitting rows."""
    method = estimator_of(config)

    def fitting(row_id: str) -> bool:
        return not is_held_out(row_id, config.holdout_fraction)

    return {c.source: method(c, fitting, config) for c in contrasts}


def combine(
    contrasts: Sequence[Contrast],
    directions: Mapping[str, Floats],
    own_auc: Mapping[str, Sequence[Interval]],
) -> tuple[Floats, dict[str, list[float]]]:
    """(L, D) unit directions of the weighted sum, and each source's share per layer."""
    trust = {
        c.source: c.weight
        * np.clip([2.0 * i.mean - 1.0 for i in own_auc[c.source]], _LEAST_RELIABILITY, 1.0)
        for c in contrasts
    }
    whole = np.sum(list(trust.values()), axis=0)
    if not np.all(whole > 0):
        raise DataError("every source has weight 0; give at least one a positive weight")
    total = np.sum(
        [w[:, None] * directions[name].astype(np.float64) for name, w in trust.items()], axis=0
    )
    return unit_rows(total), {name: (w / whole).tolist() for name, w in trust.items()}


def choose_layers(
    mean_auc: Sequence[float], layers: Sequence[int], num_layers: int, config: EstimateConfig
) -> tuple[int, ...]:
    """Rows of the configured layers, or of the best ones inside the depth window."""
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


def _held_out(
    contrast: Contrast, config: EstimateConfig, directions: Sequence[Floats]
) -> tuple[NDArray[np.bool_], list[Floats]]:
    harm, scores = projections(
        contrast, lambda row_id: is_held_out(row_id, config.holdout_fraction), directions
    )
    if harm.sum() < 2 or (~harm).sum() < 2:
        raise DataError(
            f"source {contrast.source!r} holds out {harm.sum()} harmful and {(~harm).sum()} "
            "harmless rows, too few; give at least 10 of each"
        )
    return harm, scores


def _separability(
    contrast: Contrast, config: EstimateConfig, directions: Sequence[Floats]
) -> list[list[Interval]]:
    harm, scores = _held_out(contrast, config, directions)
    return [_intervals(harm, score) for score in scores]


def _intervals(harm: NDArray[np.bool_], scores: Floats) -> list[Interval]:
    return [_interval(harm, scores[:, row]) for row in range(scores.shape[1])]


def _interval(harm: NDArray[np.bool_], scores: Floats) -> Interval:
    values = scores.astype(np.float64).tolist()
    return auc_interval(values, harm.tolist(), samples=_RESAMPLES, seed=0)


def _mean_auc(auc: Mapping[str, Sequence[Interval]]) -> list[float]:
    rows = len(next(iter(auc.values())))
    return [math.fsum(a[row].mean for a in auc.values()) / len(auc) for row in range(rows)]


def _half_cosines(contrast: Contrast, config: EstimateConfig) -> list[float]:
    """Stability: the method on each half of the fitting rows."""
    method = estimator_of(config)

    def half(first: bool) -> Floats:
        def keep(row_id: str) -> bool:
            fitting = not is_held_out(row_id, config.holdout_fraction)
            return fitting and in_first_half(row_id) == first

        return method(contrast, keep, config)

    try:
        pair = half(True), half(False)
    except DataError:
        return []  # too few rows for two halves
    return (pair[0] * pair[1]).sum(axis=1).astype(float).tolist()


def _cosines(directions: Mapping[str, Floats]) -> dict[str, list[float]]:
    names = sorted(directions)
    return {
        f"{a}|{b}": (directions[a] * directions[b]).sum(axis=1).astype(float).tolist()
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }


def _histogram(harm: NDArray[np.bool_], scores: Floats, layer: int) -> Histogram:
    edges = np.histogram_bin_edges(scores, bins=_BINS)
    return Histogram(
        layer=layer,
        edges=edges.astype(float).tolist(),
        harm=np.histogram(scores[harm], bins=edges)[0].tolist(),
        safe=np.histogram(scores[~harm], bins=edges)[0].tolist(),
    )
