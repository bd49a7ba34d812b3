"""Figures with their uncertainty: bootstrap intervals over prompts, paired differences, AUC, rates.

The independent unit is the prompt, not the sample: several answers to one prompt are averaged
first, then prompts are resampled. A missing value (None, an empty or an absent unit) is left out
and shows in `Interval.count`; it is never scored 0. NaN and infinity raise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, rankdata, t

from spo.errors import DataError
from spo.records import Interval

UnitValues = Mapping[str, Sequence[float | None]]
"""Values of every unit (prompt id), one for each sample; None where a sample has no value."""

# Bounds the memory of one block of resampled indices to a few megabytes.
_BLOCK = 1 << 20


def bootstrap_interval(
    values_by_unit: UnitValues, *, samples: int, seed: int, level: float = 0.95
) -> Interval:
    """Mean over units with a percentile bootstrap interval.

    Args:
        values_by_unit: values of each unit; averaged within the unit.
        samples: number of bootstrap resamples.
        seed: seed of the resampling.
        level: coverage, between 0 and 1.

    Raises:
        DataError: a value is not finite, or no unit has a value.
    """
    means = np.array(list(unit_means(values_by_unit).values()))
    return _percentile_interval(means, samples=samples, seed=seed, level=level)


def paired_interval(
    a: UnitValues, b: UnitValues, *, samples: int, seed: int, level: float = 0.95
) -> Interval:
    """Mean of a - b over the units that have a value on both sides, with bootstrap interval.

    Raises:
        DataError: a value is not finite, or the two sides share no unit.
    """
    return _percentile_interval(_paired_means(a, b), samples=samples, seed=seed, level=level)


def runs_interval(
    pairs: Sequence[tuple[UnitValues, UnitValues]], *, level: float = 0.95
) -> Interval:
    """Mean of a - b over independent runs (training seeds, say), with Student's t interval.

    A run is one draw, however many prompts it was evaluated on: its mean difference is the datum.
    Prompts that all runs share are given, not drawn: the interval does not hold their noise.

    Args:
        pairs: (a, b) of each run; only units that both sides have count.
        level: coverage, between 0 and 1.

    Returns:
        `count` is the number of runs.

    Raises:
        DataError: fewer than two runs, a value is not finite, or the sides of a run share no unit.
    """
    _check_level(level)
    runs = [_paired_means(a, b) for a, b in pairs]
    if len(runs) < 2 or any(len(run) == 0 for run in runs):
        raise DataError(
            "expected at least two runs whose sides share units, got runs of "
            f"{[len(run) for run in runs]} shared units"
        )
    means = np.array([run.mean() for run in runs])
    mean, error = float(means.mean()), float(means.std(ddof=1)) / math.sqrt(len(means))
    half = float(t.ppf(0.5 + level / 2, len(means) - 1)) * error
    return Interval(mean=mean, low=mean - half, high=mean + half, count=len(runs))


def _paired_means(a: UnitValues, b: UnitValues) -> NDArray[np.float64]:
    left, right = unit_means(a), unit_means(b)
    return np.array([left[unit] - right[unit] for unit in left if unit in right])


def unit_means(values_by_unit: UnitValues) -> dict[str, float]:
    """Mean of each unit's values; units without any value are absent."""
    means = {}
    for unit, values in values_by_unit.items():
        present = [value for value in values if value is not None]
        if not all(map(math.isfinite, present)):
            raise DataError(
                f"unit {unit!r}: expected finite values, got {present}; leave a value out (None) "
                "where nothing was measured"
            )
        if present:
            means[unit] = math.fsum(present) / len(present)
    return means


def auc(scores: Sequence[float], labels: Sequence[bool | int]) -> float:
    """Probability that a positive scores higher than a negative, ties counted half.

    Args:
        scores: (n,) finite scores.
        labels: (n,) 1 or True for positives.

    Raises:
        DataError: lengths differ, a score is not finite, or one class is empty.
    """
    positives, negatives = _classes(scores, labels)
    return float(_auc_rows(positives[None], negatives[None])[0])


def auc_interval(
    scores: Sequence[float],
    labels: Sequence[bool | int],
    *,
    samples: int,
    seed: int,
    level: float = 0.95,
) -> Interval:
    """AUC with a bootstrap interval; each class is resampled by itself, so none can vanish.

    `count` is the number of scores. Raises as `auc` does.
    """
    positives, negatives = _classes(scores, labels)
    rng = np.random.default_rng(seed)
    count = len(positives) + len(negatives)
    resampled = []
    for rows in _blocks(samples, count):
        up = positives[rng.integers(len(positives), size=(rows, len(positives)))]
        down = negatives[rng.integers(len(negatives), size=(rows, len(negatives)))]
        resampled.append(_auc_rows(up, down))
    low, high = _quantiles(np.concatenate(resampled), level)
    return Interval(mean=auc(scores, labels), low=low, high=high, count=count)


def rate_interval(successes: int, trials: int, *, level: float = 0.95) -> Interval:
    """Share of successes in independent trials, with the Wilson score interval.

    Unlike the bootstrap it stays honest at 0 and at 1: nought of ten is [0, .28], not [0, 0].

    Raises:
        DataError: no trials, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise DataError(
            f"expected 0 <= successes <= trials and at least one trial, got {successes} of "
            f"{trials}; count only rows that were judged"
        )
    _check_level(level)
    z = float(norm.ppf(0.5 + level / 2))
    share, weight = successes / trials, z * z / trials
    centre = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / trials + weight / (4 * trials))
    # Clamped against the last bit of rounding: the bounds always enclose the share.
    low, high = max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
    return Interval(mean=share, low=low, high=high, count=trials)


def _percentile_interval(
    means: NDArray[np.float64], *, samples: int, seed: int, level: float
) -> Interval:
    if len(means) == 0:
        raise DataError(
            "expected at least one unit with a value, got none; leave the figure out of the table "
            "where nothing was measured"
        )
    if samples < 1:
        raise DataError(f"expected at least one bootstrap sample, got {samples}")
    rng = np.random.default_rng(seed)
    resampled = np.concatenate(
        [
            means[rng.integers(len(means), size=(rows, len(means)))].mean(axis=1)
            for rows in _blocks(samples, len(means))
        ]
    )
    low, high = _quantiles(resampled, level)
    mean = math.fsum(means) / len(means)
    return Interval(mean=mean, low=min(low, mean), high=max(high, mean), count=len(means))


def _classes(
    scores: Sequence[float], labels: Sequence[bool | int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    values, marks = np.asarray(scores, dtype=np.float64), np.asarray(labels).astype(bool)
    if values.ndim != 1 or values.shape != marks.shape:
        raise DataError(
            f"expected one label for each score, got {values.shape} scores and {marks.shape} labels"
        )
    if not np.isfinite(values).all():
        raise DataError(
            f"expected finite scores, got {int((~np.isfinite(values)).sum())} that are not; "
            "leave those rows out"
        )
    if marks.all() or not marks.any():
        raise DataError(
            f"AUC needs positives and negatives, got {int(marks.sum())} positives of {len(marks)}"
        )
    return values[marks], values[~marks]


def _auc_rows(
    positives: NDArray[np.float64], negatives: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(rows,) AUC of each row of (rows, p) positives and (rows, n) negatives, from rank sums."""
    up, down = positives.shape[1], negatives.shape[1]
    ranks: NDArray[np.float64] = rankdata(np.concatenate([positives, negatives], axis=1), axis=1)
    return np.asarray((ranks[:, :up].sum(axis=1) - up * (up + 1) / 2) / (up * down))


def _quantiles(values: NDArray[np.float64], level: float) -> tuple[float, float]:
    _check_level(level)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise DataError(f"expected a level between 0 and 1, e.g. 0.95, got {level}")


def _blocks(rows: int, width: int) -> list[int]:
    """Cut `rows` resamples of `width` values into blocks of bounded size."""
    size = max(1, _BLOCK // width)
    return [min(size, rows - start) for start in range(0, rows, size)]
