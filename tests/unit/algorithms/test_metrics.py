"""Metrics against hand-computed examples."""

from __future__ import annotations

import numpy as np
import pytest

from spo.algorithms.metrics import (
    auc,
    auc_interval,
    bootstrap_interval,
    paired_interval,
    rate_interval,
    runs_interval,
    unit_means,
)
from spo.errors import DataError

NAN, INF = float("nan"), float("inf")


def test_samples_are_averaged_within_the_prompt_first() -> None:
    # Prompt means are 0.5 and 0.25; the mean over all four samples would be 0.4375.
    values = {"a": [0.0, 1.0, 0.5], "b": [0.25]}
    assert unit_means(values) == {"a": 0.5, "b": 0.25}
    interval = bootstrap_interval(values, samples=500, seed=0)
    assert interval.mean == 0.375
    assert interval.count == 2
    assert (interval.low, interval.high) == (0.25, 0.5)


def test_bootstrap_of_four_zeros_and_ones_has_the_binomial_quantiles() -> None:
    # The mean of n resampled {0, 1} units is Binomial(n, 1/2) / n. For n = 16 the 2.5 % and
    # 97.5 % quantiles are 4/16 (P(X <= 3) = .011, P(X <= 4) = .038) and 12/16.
    values = {f"p{i}": [float(i % 2)] for i in range(16)}
    interval = bootstrap_interval(values, samples=20_000, seed=3)
    assert (interval.mean, interval.low, interval.high) == (0.5, 0.25, 0.75)
    # At 50 %: P(X <= 6) = .227, P(X <= 7) = .402, so 7/16 and 9/16.
    half = bootstrap_interval(values, samples=20_000, seed=3, level=0.5)
    assert (half.low, half.high) == (7 / 16, 9 / 16)


def test_bootstrap_covers_the_truth_at_its_level() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        values = {str(i): [v] for i, v in enumerate(rng.normal(1.0, 2.0, size=40))}
        interval = bootstrap_interval(values, samples=400, seed=trial)
        hits += interval.low <= 1.0 <= interval.high
    assert 0.90 <= hits / 300 <= 0.98


def test_intervals_repeat_with_the_seed_and_move_with_it() -> None:
    values = {str(i): [i / 7] for i in range(30)}
    first = bootstrap_interval(values, samples=200, seed=1)
    assert first == bootstrap_interval(values, samples=200, seed=1)
    assert first != bootstrap_interval(values, samples=200, seed=2)


def test_block_size_does_not_change_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {str(i): [float(i)] for i in range(50)}
    whole = bootstrap_interval(values, samples=999, seed=4)
    monkeypatch.setattr("spo.algorithms.metrics._BLOCK", 120)
    blocks = bootstrap_interval(values, samples=999, seed=4)
    assert blocks == whole


def test_missing_values_are_left_out_and_counted() -> None:
    values = {"a": [0.2, None], "b": [None], "c": [], "d": [0.4]}
    interval = bootstrap_interval(values, samples=100, seed=0)
    assert interval.mean == pytest.approx(0.3)
    assert interval.count == 2


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_values_that_are_not_finite_raise(bad: float) -> None:
    with pytest.raises(DataError, match=r"'a'.*finite"):
        bootstrap_interval({"a": [0.1, bad]}, samples=10, seed=0)
    with pytest.raises(DataError, match="finite"):
        paired_interval({"a": [0.1]}, {"a": [bad]}, samples=10, seed=0)
    with pytest.raises(DataError, match="finite"):
        auc([0.1, bad], [0, 1])


def test_nothing_measured_raises_instead_of_scoring_zero() -> None:
    for nothing in ({}, {"a": []}, {"a": [None]}):
        with pytest.raises(DataError, match="at least one unit"):
            bootstrap_interval(nothing, samples=10, seed=0)
    with pytest.raises(DataError, match="at least one unit"):
        paired_interval({"a": [1.0]}, {"b": [1.0]}, samples=10, seed=0)


def test_paired_difference_uses_only_shared_prompts() -> None:
    a = {"p": [0.1, 0.3], "q": [0.5], "only a": [9.0]}
    b = {"p": [0.4], "q": [0.9], "only b": [-9.0]}
    interval = paired_interval(a, b, samples=1000, seed=0)
    # p: .2 - .4 = -.2, q: .5 - .9 = -.4
    assert interval.mean == pytest.approx(-0.3)
    assert interval.count == 2
    assert interval.low == pytest.approx(-0.4)
    assert interval.high == pytest.approx(-0.2)


def test_pairing_removes_the_spread_between_prompts() -> None:
    base = {str(i): [float(i)] for i in range(20)}
    lower = {unit: [values[0] - 0.5] for unit, values in base.items()}
    interval = paired_interval(lower, base, samples=500, seed=0)
    assert (interval.mean, interval.low, interval.high) == (-0.5, -0.5, -0.5)
    alone = bootstrap_interval(base, samples=500, seed=0)
    assert alone.high - alone.low > 4.0


def test_auc_by_hand() -> None:
    # Pairs (positive, negative): .8>.4, .8>.6, .5>.4, .5<.6 -> 3 of 4.
    assert auc([0.8, 0.5, 0.4, 0.6], [1, 1, 0, 0]) == 0.75
    # A tie counts half: .5=.5, .9>.5 -> 1.5 of 2.
    assert auc([0.5, 0.9, 0.5], [True, True, False]) == 0.75
    assert auc([1.0, 2.0], [1, 0]) == 0.0


def test_auc_interval_encloses_auc_and_shrinks_with_data() -> None:
    rng = np.random.default_rng(0)

    def width(n: int) -> float:
        labels = [i % 2 for i in range(n)]
        scores = [float(rng.normal(label)) for label in labels]
        interval = auc_interval(scores, labels, samples=400, seed=0)
        assert interval.mean == auc(scores, labels)
        assert interval.low < interval.mean < interval.high
        assert interval.count == n
        return interval.high - interval.low

    # The error of a mean-like figure falls as 1/sqrt(n): 16 times the data, a quarter the width.
    assert width(640) / width(40) == pytest.approx(0.25, abs=0.08)


def test_auc_interval_of_separated_classes_is_a_point() -> None:
    interval = auc_interval([1.0, 2.0, 3.0, 4.0], [0, 0, 1, 1], samples=50, seed=0)
    assert (interval.mean, interval.low, interval.high, interval.count) == (1.0, 1.0, 1.0, 4)


def test_auc_needs_both_classes_and_equal_lengths() -> None:
    with pytest.raises(DataError, match="0 positives of 2"):
        auc([0.1, 0.2], [0, 0])
    with pytest.raises(DataError, match="2 positives of 2"):
        auc([0.1, 0.2], [1, 1])
    with pytest.raises(DataError, match="one label for each score"):
        auc([0.1, 0.2], [1])


def test_rate_interval_is_wilsons() -> None:
    # Wilson by hand for 1 of 10, z = 1.959964: centre (.1 + .192073)/(1.384146) = .211013,
    # half 1.959964/1.384146 * sqrt(.009 + .0096036) = .193136.
    interval = rate_interval(1, 10)
    assert interval.mean == 0.1
    assert interval.low == pytest.approx(0.017877, abs=1e-5)
    assert interval.high == pytest.approx(0.404150, abs=1e-5)
    assert interval.count == 10
    nought = rate_interval(0, 10)
    assert nought.low == 0.0
    assert nought.high == pytest.approx(0.277533, abs=1e-5)
    assert rate_interval(10, 10).high == 1.0


def test_rates_refuse_impossible_counts() -> None:
    with pytest.raises(DataError, match="0 of 0"):
        rate_interval(0, 0)
    with pytest.raises(DataError, match="3 of 2"):
        rate_interval(3, 2)
    with pytest.raises(DataError, match="between 0 and 1"):
        rate_interval(1, 2, level=95)


def test_runs_weigh_the_same_and_their_spread_is_the_interval() -> None:
    many = ({str(i): [0.3] for i in range(100)}, {str(i): [0.1] for i in range(100)})
    few = ({"a": [0.0], "only here": [9.0]}, {"a": [0.4]})
    change = runs_interval([many, few])
    # (0.2 - 0.4) / 2; standard error 0.3, t with one degree of freedom: 12.706.
    assert change.mean == pytest.approx(-0.1)
    assert change.high - change.mean == pytest.approx(12.706 * 0.3, rel=1e-4)
    assert change.mean - change.low == pytest.approx(12.706 * 0.3, rel=1e-4)
    assert change.count == 2
    three = runs_interval([many, many, few])
    # Mean 0, standard error 0.2, two degrees of freedom: 4.303.
    assert (three.low, three.high) == (
        pytest.approx(-4.303 * 0.2, rel=1e-3),
        pytest.approx(4.303 * 0.2, rel=1e-3),
    )
    with pytest.raises(DataError, match=r"at least two runs .* got runs of \[100\] shared"):
        runs_interval([many])
    with pytest.raises(DataError, match=r"got runs of \[100, 0\] shared"):
        runs_interval([many, ({"a": [1.0]}, {"b": [1.0]})])
