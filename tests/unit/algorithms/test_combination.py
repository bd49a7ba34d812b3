"""Sources are combined by what they separate; layers are chosen on held-out rows."""

from __future__ import annotations

import numpy as np
import pytest

from spo.algorithms.combination import estimate, leave_one_out
from spo.algorithms.estimators import Contrast, unit_rows
from spo.config import EstimateConfig
from spo.errors import DataError

LAYERS, HIDDEN = 6, 16
CONFIG = EstimateConfig(num_layers=2, depth_window=(0.0, 1.0))
DIRECTION = unit_rows(np.random.default_rng(99).normal(size=(LAYERS, HIDDEN)))


def planted(
    strengths: list[float],
    *,
    rows: int = 200,
    seed: int = 0,
    scale: float = 1.0,
    direction: np.ndarray = DIRECTION,
) -> Contrast:
    """Sides that differ by `strength * direction` at each layer, plus noise."""
    rng = np.random.default_rng(seed)
    harm = rng.normal(size=(rows, LAYERS, HIDDEN)) + np.array(strengths)[:, None] * direction
    safe = rng.normal(size=(rows, LAYERS, HIDDEN))
    return Contrast.of_arrays(
        f"source{seed}", (scale * harm).astype(np.float32), (scale * safe).astype(np.float32)
    )


def test_layers_with_signal_are_chosen_and_weighted_by_it() -> None:
    result = estimate([planted([0.0, 0.3, 4.0, 0.0, 1.5, 0.0])], range(LAYERS), LAYERS, CONFIG)
    assert result.chosen == (2, 4)
    assert result.weights[2] == pytest.approx(1.0)
    assert 0.5 < result.weights[4] < result.weights[2]
    assert result.mean_auc[2] > 0.95
    assert abs(result.mean_auc[0] - 0.5) < 0.15
    (histogram,) = result.histograms.values()
    assert histogram.layer == 2
    assert sum(histogram.harm) > 30


def test_a_loud_source_does_not_outvote_a_quiet_one() -> None:
    quiet, loud = planted([8.0] * LAYERS), planted([8.0] * LAYERS, seed=1, scale=1000.0)
    result = estimate([quiet, loud], range(LAYERS), LAYERS, CONFIG)
    assert ((result.units * DIRECTION).sum(axis=1) > 0.98).all()
    assert all(value > 0.9 for value in result.cosines["source0|source1"])
    shares = np.array(list(result.source_weights.values()))
    np.testing.assert_allclose(shares.sum(axis=0), 1.0)
    np.testing.assert_allclose(shares, 0.5, atol=0.02)


def test_a_source_that_says_nothing_gets_no_weight_and_shows_in_the_halves() -> None:
    real, noise = planted([6.0] * LAYERS), planted([0.0] * LAYERS, seed=1)
    result = estimate([real, noise], range(LAYERS), LAYERS, CONFIG)
    assert np.mean(result.source_weights["source1"]) < 0.15
    assert ((result.units * DIRECTION).sum(axis=1) > 0.95).all()
    assert min(result.halves["source0"]) > 0.95
    assert np.mean(result.halves["source1"]) < 0.5


def test_separability_is_measured_on_rows_outside_the_fit() -> None:
    """Pure noise in many dimensions separates its own fit perfectly, but not held-out rows."""
    result = estimate([planted([0.0] * LAYERS, rows=24)], range(LAYERS), LAYERS, CONFIG)
    assert all(value < 0.95 for value in result.mean_auc)


def test_depth_window_and_explicit_layers() -> None:
    contrast = planted([4.0] * LAYERS)
    window = EstimateConfig(num_layers=6, depth_window=(0.4, 0.8))
    assert estimate([contrast], range(LAYERS), LAYERS, window).chosen == (2, 3, 4)
    explicit = estimate([contrast], range(LAYERS), LAYERS, EstimateConfig(layers=(5, 1)))
    assert explicit.chosen == (1, 5)
    with pytest.raises(DataError, match=r"asks for blocks \[9\]"):
        estimate([contrast], range(LAYERS), LAYERS, EstimateConfig(layers=(9,)))


def test_too_few_rows_and_no_source_are_refused() -> None:
    with pytest.raises(DataError, match="too few"):
        estimate([planted([1.0] * LAYERS, rows=2)], range(LAYERS), LAYERS, CONFIG)
    with pytest.raises(DataError, match="at least one source"):
        estimate([], range(LAYERS), LAYERS, CONFIG)
    with pytest.raises(DataError, match="at least 3 sources, got 1"):
        leave_one_out([planted([1.0] * LAYERS)], range(LAYERS), LAYERS, CONFIG)


def test_leaving_one_out_uses_nothing_of_the_source_left_out() -> None:
    """Three sources share a weak common direction beside a strong one of their own."""
    rng = np.random.default_rng(3)
    sources = []
    for seed in range(4):
        own = unit_rows(rng.normal(size=(LAYERS, HIDDEN)))
        mixed = unit_rows((DIRECTION + 1.2 * own).astype(np.float64))
        sources.append(planted([4.0] * LAYERS, seed=seed, direction=mixed))
    left = leave_one_out(sources, range(LAYERS), LAYERS, CONFIG)
    assert [item.source for item in left] == [c.source for c in sources]
    for item in left:
        assert item.source not in item.singles
        assert item.picked in item.singles
    assert np.mean([i.combined.mean for i in left]) > np.mean(
        [i.singles[i.picked].mean for i in left]
    )
    # Changing the left-out source moves its test, never the directions that are tested on it.
    turned = [*sources[:3], planted([0.0] * LAYERS, seed=3)]
    again = leave_one_out(turned, range(LAYERS), LAYERS, CONFIG)[3]
    assert again.layer == left[3].layer
    assert again.picked == left[3].picked
    assert abs(again.combined.mean - 0.5) < 0.15
