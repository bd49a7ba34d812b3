"""Estimators recover planted directions, with the right sign, by streaming over blocks."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from spo.algorithms.estimators import (
    ESTIMATORS,
    Block,
    Contrast,
    in_first_half,
    is_held_out,
    mean_difference,
    projections,
    unit_rows,
)
from spo.config import EstimateConfig
from spo.errors import DataError

LAYERS, HIDDEN = 6, 16
CONFIG = EstimateConfig(num_layers=2, depth_window=(0.0, 1.0), passes=24)
DIRECTION = unit_rows(np.random.default_rng(99).normal(size=(LAYERS, HIDDEN)))


def everything(row_id: str) -> bool:
    return True


def sides(rows: int = 600, strength: float = 8.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(2, rows, LAYERS, HIDDEN)) + 3.0  # the common offset is no direction
    harm = noise[0] + strength * DIRECTION
    return harm.astype(np.float32), noise[1].astype(np.float32)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_the_planted_direction_is_recovered_with_its_sign(name: str) -> None:
    harm, safe = sides()
    found = ESTIMATORS[name](Contrast.of_arrays("s", harm, safe), everything, CONFIG)
    assert ((found * DIRECTION).sum(axis=1) > 0.99).all()
    turned = ESTIMATORS[name](Contrast.of_arrays("s", safe, harm), everything, CONFIG)
    np.testing.assert_allclose(turned, -found, atol=1e-4)


def test_streamed_estimators_equal_the_textbook() -> None:
    harm, safe = sides(rows=200, strength=1.0)
    contrast = Contrast.of_arrays("s", harm, safe)
    config = EstimateConfig(passes=60, shrinkage=0.2)
    found = {name: method(contrast, everything, config) for name, method in ESTIMATORS.items()}
    for layer in range(LAYERS):
        h, s = harm[:, layer].astype(np.float64), safe[:, layer].astype(np.float64)
        difference = h.mean(0) - s.mean(0)
        rows = np.concatenate([h, s]) - (h.mean(0) + s.mean(0)) / 2
        _, vectors = np.linalg.eigh(rows.T @ rows)
        within = np.concatenate([h - h.mean(0), s - s.mean(0)])
        covariance = within.T @ within / len(within)
        ridge = 0.2 * np.trace(covariance) / HIDDEN
        probe = np.linalg.solve(covariance + ridge * np.eye(HIDDEN), difference)
        expected = {"mean_difference": difference, "pca": vectors[:, -1], "linear_probe": probe}
        for name, direction in expected.items():
            cosine = direction @ found[name][layer] / np.linalg.norm(direction)
            assert abs(cosine) > 0.9999, (name, layer, cosine)


def test_a_probe_turns_away_from_a_noisy_direction() -> None:
    """What the mean difference cannot do: one loud unit that says nothing about harm."""
    harm, safe = sides(rows=400, strength=1.5)
    rng = np.random.default_rng(5)
    for side in (harm, safe):
        side[:, :, 0] += 40.0 * rng.normal(size=side.shape[:2])
    contrast = Contrast.of_arrays("s", harm, safe)
    clean = DIRECTION.copy()
    clean[:, 0] = 0.0
    clean = unit_rows(clean.astype(np.float64))
    probe = ESTIMATORS["linear_probe"](contrast, everything, CONFIG)
    plain = mean_difference(contrast, everything, CONFIG)
    assert ((probe * clean).sum(axis=1) > 0.9).all()
    assert ((probe * clean).sum(axis=1) > (plain * clean).sum(axis=1)).all()


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_memory_does_not_grow_with_rows(name: str) -> None:
    def peak(rows: int) -> int:
        def blocks() -> Iterator[Block]:
            rng = np.random.default_rng(0)
            for start in range(0, rows, 50):
                harm = np.arange(50) % 2 == 0
                values = rng.normal(size=(50, LAYERS, 64)).astype(np.float32)
                values[harm] += 1.0
                yield Block(ids=[f"{start + i}" for i in range(50)], harm=harm, values=values)

        contrast = Contrast(source="s", weight=1.0, blocks=blocks)
        tracemalloc.start()
        ESTIMATORS[name](contrast, everything, EstimateConfig(passes=2))
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(100)  # what is allocated once
    more = 4500 * LAYERS * 64 * 4  # bytes; other threads of the process allocate a little too
    assert peak(5000) - peak(500) < 0.15 * more


def test_shares_depend_on_the_id_alone() -> None:
    ids = [f"row{i}" for i in range(2000)]
    held = [is_held_out(row_id, 0.3) for row_id in ids]
    assert np.mean(held) == pytest.approx(0.3, abs=0.04)
    halves = [in_first_half(row_id) for row_id, out in zip(ids, held, strict=True) if not out]
    assert np.mean(halves) == pytest.approx(0.5, abs=0.05)


def test_projections_keep_sides_and_rows_together() -> None:
    harm, safe = sides(rows=40)
    contrast = Contrast.of_arrays("s", harm, safe)
    labels, (scores,) = projections(contrast, everything, [DIRECTION])
    assert labels.tolist() == [True] * 40 + [False] * 40
    expected = np.einsum("nld,ld->nl", np.concatenate([harm, safe]), DIRECTION)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_bad_rows_are_refused(name: str) -> None:
    harm, safe = sides(rows=20)
    method = ESTIMATORS[name]
    with pytest.raises(DataError, match="same mean activation"):
        method(Contrast.of_arrays("s", harm, harm), everything, CONFIG)
    with pytest.raises(DataError, match="1 harmful and 20 harmless rows here, too few"):
        method(Contrast.of_arrays("s", harm[:1], safe), everything, CONFIG)
    harm[3, 2, 1] = np.nan
    with pytest.raises(DataError, match="not finite"):
        method(Contrast.of_arrays("s", harm, safe), everything, CONFIG)
