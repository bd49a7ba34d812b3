"""Estimators recover planted directions, with the right sign, and report what they chose."""

from __future__ import annotations

import numpy as np
import pytest

from spo.algorithms.estimators import (
    Contrast,
    estimate,
    is_held_out,
    mean_difference,
    unit_rows,
)
from spo.config import EstimateConfig
from spo.errors import DataError

LAYERS, HIDDEN = 6, 16
CONFIG = EstimateConfig(num_layers=2, depth_window=(0.0, 1.0))


def planted(strengths: list[float], *, rows: int = 200, seed: int = 0, scale: float = 1.0):
    """A contrast whose sides differ by `strength * direction` at each layer, plus noise."""
    rng = np.random.default_rng(seed)
    direction = unit_rows(np.random.default_rng(99).normal(size=(LAYERS, HIDDEN)))
    shift = np.array(strengths)[:, None] * direction
    harm = rng.normal(size=(rows, LAYERS, HIDDEN)) + shift
    safe = rng.normal(size=(rows, LAYERS, HIDDEN))
    contrast = Contrast(
        source=f"source{seed}",
        weight=1.0,
        harm=(scale * harm).astype(np.float32),
        safe=(scale * safe).astype(np.float32),
        harm_ids=[f"{seed}-h{i}" for i in range(rows)],
        safe_ids=[f"{seed}-s{i}" for i in range(rows)],
    )
    return contrast, direction


def test_mean_difference_recovers_the_planted_direction_with_its_sign() -> None:
    contrast, direction = planted([8.0] * LAYERS, rows=400)
    found = mean_difference(contrast.harm, contrast.safe)
    assert ((found * direction).sum(axis=1) > 0.99).all()
    assert np.allclose(mean_difference(contrast.safe, contrast.harm), -found)


def test_layers_with_signal_are_chosen_and_weighted_by_it() -> None:
    contrast, _ = planted([0.0, 0.3, 4.0, 0.0, 1.5, 0.0])
    result = estimate([contrast], range(LAYERS), LAYERS, CONFIG)
    assert result.chosen == (2, 4)
    assert result.weights[2] == pytest.approx(1.0)
    assert 0.5 < result.weights[4] < result.weights[2]
    assert result.mean_auc[2] > 0.95
    assert abs(result.mean_auc[0] - 0.5) < 0.15


def test_a_loud_source_does_not_outvote_a_quiet_one() -> None:
    quiet, direction = planted([8.0] * LAYERS, seed=0)
    loud, _ = planted([8.0] * LAYERS, seed=1, scale=1000.0)
    result = estimate([quiet, loud], range(LAYERS), LAYERS, CONFIG)
    assert ((result.units * direction).sum(axis=1) > 0.98).all()
    assert set(result.auc) == {"source0", "source1"}
    assert all(value > 0.9 for value in result.cosines["source0|source1"])


def test_separability_is_measured_on_rows_outside_the_fit() -> None:
    """Pure noise in many dimensions separates its own fit perfectly, but not held-out rows."""
    contrast, _ = planted([0.0] * LAYERS, rows=12)
    result = estimate([contrast], range(LAYERS), LAYERS, CONFIG)
    assert all(value < 0.95 for value in result.mean_auc)


def test_depth_window_and_explicit_layers() -> None:
    contrast, _ = planted([4.0] * LAYERS)
    inside = estimate(
        [contrast], range(LAYERS), LAYERS, EstimateConfig(num_layers=6, depth_window=(0.4, 0.8))
    )
    assert inside.chosen == (2, 3, 4)
    explicit = estimate([contrast], range(LAYERS), LAYERS, EstimateConfig(layers=(5, 1)))
    assert explicit.chosen == (1, 5)
    with pytest.raises(DataError, match=r"asks for blocks \[9\]"):
        estimate([contrast], range(LAYERS), LAYERS, EstimateConfig(layers=(9,)))


def test_hold_out_share_depends_on_the_id_alone() -> None:
    share = sum(is_held_out(f"row{i}", 0.3) for i in range(2000)) / 2000
    assert share == pytest.approx(0.3, abs=0.04)
    assert is_held_out("row1", 0.3) == is_held_out("row1", 0.3)


def test_too_few_rows_and_equal_sides_are_refused() -> None:
    contrast, _ = planted([1.0] * LAYERS, rows=2)
    with pytest.raises(DataError, match="too few to fit"):
        estimate([contrast], range(LAYERS), LAYERS, CONFIG)
    with pytest.raises(DataError, match="same mean activation"):
        mean_difference(contrast.harm, contrast.harm)
    with pytest.raises(DataError, match="at least one source"):
        estimate([], range(LAYERS), LAYERS, CONFIG)


def test_activations_that_are_not_finite_are_refused() -> None:
    contrast, _ = planted([1.0] * LAYERS)
    contrast.harm[3, 2, 1] = np.nan
    with pytest.raises(DataError, match="not finite"):
        estimate([contrast], range(LAYERS), LAYERS, CONFIG)
