"""ASHA by our own step: who goes on, and that the bar outlives the process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from spo.errors import DataError
from spo.sweep.rungs import Rungs, RungScheduler, dominates
from spo.sweep.trial import rung_steps

OBJECTIVES = ["toxicity", "utility"]


def test_domination_knows_the_better_direction() -> None:
    good, bad = {"toxicity": 0.1, "utility": 0.9}, {"toxicity": 0.2, "utility": 0.8}
    traded = {"toxicity": 0.05, "utility": 0.5}
    assert dominates(good, bad, OBJECTIVES)
    assert not dominates(bad, good, OBJECTIVES)
    assert not dominates(good, traded, OBJECTIVES)
    assert not dominates(traded, good, OBJECTIVES)
    assert not dominates(good, dict(good), OBJECTIVES)


def test_about_one_in_the_factor_goes_on(tmp_path: Path) -> None:
    rungs = Rungs(tmp_path / "rungs.json", OBJECTIVES, 3)
    # Worst first, so that every newcomer is the best so far; then worse and worse.
    rising = [rungs.goes_on(2, f"a{i}", {"toxicity": 0.9 - i / 10, "utility": 0.5}) for i in (0, 1)]
    assert rising == [True, True]
    falling = [
        rungs.goes_on(2, f"b{i}", {"toxicity": 0.9 + i / 100, "utility": 0.4}) for i in range(7)
    ]
    # Nine at the rung, three places: the two above hold two of them once nine are there.
    assert falling == [False] * 7 or sum(falling) <= 3
    assert not falling[-1]


def test_a_trade_off_is_not_stopped_by_one_objective_alone(tmp_path: Path) -> None:
    rungs = Rungs(tmp_path / "rungs.json", OBJECTIVES, 2)
    assert rungs.goes_on(2, "safe", {"toxicity": 0.0, "utility": 0.3})
    assert rungs.goes_on(2, "useful", {"toxicity": 0.5, "utility": 0.9})
    assert not rungs.goes_on(2, "neither", {"toxicity": 0.6, "utility": 0.2})


def test_a_resumed_sweep_keeps_the_bar(tmp_path: Path) -> None:
    path = tmp_path / "rungs.json"
    first = Rungs(path, OBJECTIVES, 2)
    for i in range(4):
        first.goes_on(2, f"good{i}", {"toxicity": 0.1, "utility": 0.9})
    bad = {"toxicity": 0.9, "utility": 0.1}
    assert Rungs(tmp_path / "fresh.json", OBJECTIVES, 2).goes_on(2, "bad", bad)
    assert not Rungs(path, OBJECTIVES, 2).goes_on(2, "bad", bad)
    again = Rungs(path, OBJECTIVES, 2)
    assert again.goes_on(2, "good0", {"toxicity": 0.1, "utility": 0.9}), "counted once, replayed"


def test_a_damaged_rung_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "rungs.json").write_text("{half")
    with pytest.raises(DataError, match="is not the rung file"):
        Rungs(tmp_path / "rungs.json", OBJECTIVES, 2)


def test_the_scheduler_stops_by_our_step_and_never_the_base(tmp_path: Path) -> None:
    stopped: set[str] = set()
    rungs = Rungs(tmp_path / "rungs.json", OBJECTIVES, 2)
    scheduler = RungScheduler(rungs, stopped)
    for i in range(4):
        rungs.goes_on(2, f"good{i}", {"toxicity": 0.1, "utility": 0.9})
    bad = {"step": 2, "steps": 6, "digest": "bad", "toxicity": 0.9, "utility": 0.1}
    trial = SimpleNamespace(trial_id="t")
    assert scheduler.on_trial_result(None, trial, {**bad, "base": True}) == "CONTINUE"
    assert scheduler.on_trial_result(None, trial, {**bad, "step": 6}) == "CONTINUE"
    assert stopped == set()
    assert scheduler.on_trial_result(None, trial, bad) == "STOP"
    assert stopped == {"t"}


def test_rungs_grow_by_the_factor_and_end_with_the_last_step() -> None:
    assert rung_steps(30, 3, 3) == (3, 9, 27, 30)
    assert rung_steps(12, 3, 2) == (3, 6, 12)
