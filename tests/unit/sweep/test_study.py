"""Search, storage, choice and export, without Ray: the real searcher is asked and told by hand."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from spo.artifact import SteeringArtifact
from spo.errors import ConfigError, DataError
from spo.sweep.outcome import choose, export, load_outcome, numbered, parse_limits
from spo.sweep.rungs import dominates
from spo.sweep.study import SweepSearch, locked, open_study, queue_first
from tests.example_sweep import (
    COEFFICIENTS,
    TRAINING,
    configs,
    finished_sweep,
    plan_of,
    save_vector,
    search_here,
    trial_of,
)


def test_a_sweep_finds_the_front(tmp_path: Path) -> None:
    outcome = finished_sweep(tmp_path, search={"trials": 14, "concurrent": 1})
    assert len(outcome.whole) == 14
    objectives = list(outcome.sweep.objectives)
    points = {
        row.number: {name: row.result.mean(name) for name in objectives}
        for row in outcome.whole
        if row.result
    }
    for row in outcome.whole:
        beaten = any(dominates(o, points[row.number], objectives) for o in points.values())
        assert row.front is not beaten
    assert outcome.base is not None
    assert outcome.base.values == {}
    with (outcome.folder.table).open() as file:
        lines = list(csv.DictReader(file))
    assert [line["trial"] for line in lines] == ["base", *(str(i) for i in range(14))]
    assert float(lines[1]["toxicity"]) == pytest.approx(points[0]["toxicity"], abs=1e-5)


def test_the_choice_is_best_within_its_limits(tmp_path: Path) -> None:
    outcome = finished_sweep(tmp_path)
    freely = choose(outcome, "toxicity", {"kl": 100.0})
    best = min(row.result.mean("toxicity") for row in outcome.whole if row.result)
    assert freely.result
    assert freely.result.mean("toxicity") == best
    kls = sorted(row.result.mean("kl") for row in outcome.whole if row.result)
    near = choose(outcome, "toxicity", {"kl": kls[3]})
    assert near.result
    assert near.result.mean("kl") <= kls[3]
    with pytest.raises(DataError, match=r"none of 10 whole trials keeps to toxicity -1.000"):
        choose(outcome, "kl", {"toxicity": -1.0})
    out = tmp_path / "released"
    export(outcome, near, out)
    artifact = SteeringArtifact.load(out, model_id="fake")
    assert artifact.coefficient == near.settings["steering.coefficient"]
    assert artifact.evaluation["validation"]["kl"]["mean"] == near.result.mean("kl")
    assert numbered(outcome, near.number) == near
    with pytest.raises(DataError, match="trial 99 did not run"):
        numbered(outcome, 99)
    with pytest.raises(ConfigError, match="METRIC=VALUE"):
        parse_limits(["beauty=3"])


def twins(tmp_path: Path, trials: int) -> tuple[Any, Any, Any]:
    """(plan, study, searcher): the first point is the base's own, the second is another."""
    save_vector(tmp_path / "vector")
    sweep, base = configs(
        tmp_path,
        space=TRAINING,
        first=[{"learn.learning_rate": 0.1}, {"learn.learning_rate": 0.3}],
        search={"trials": trials, "concurrent": 3, "asha": {"grace_steps": 2}},
    )
    plan = plan_of(sweep, base)
    study = open_study(plan.folder, sweep, base)
    queue_first(study, plan.space(), sweep)
    return plan, study, SweepSearch(plan, study, stopped=set(), on_result=lambda *_: None)


def advance(plan: Any, point: Any, times: int = 9) -> Any:
    trial, found = trial_of(plan, point["values"]), None
    while (found is None or not found.whole) and times:
        found, times = trial.advance(), times - 1
    trial.close()
    return found


def test_a_point_whose_twin_runs_waits_for_it(tmp_path: Path) -> None:
    """Both would train in one folder and publish one name."""
    plan, _, searcher = twins(tmp_path, trials=2)
    base = searcher.suggest("base")
    other = searcher.suggest("a")
    assert other["values"] == {"learn.learning_rate": 0.3}, "others are not held up"
    assert searcher.suggest("b") is None, "the target is reached by those that run and wait"
    found = advance(plan, base)
    searcher.on_trial_complete("base", {"digest": found.digest, "base": True})
    twin = searcher.suggest("c")
    assert twin["values"] == {"learn.learning_rate": 0.1}
    assert advance(plan, twin) == found, "read, not trained again"
    for name, point in (("a", other), ("c", twin)):
        whole = advance(plan, point)
        searcher.on_trial_complete(name, {"digest": whole.digest, "base": False})
    assert searcher.suggest("e") == "FINISHED"


def test_the_twin_of_a_stopped_point_is_stopped_too(tmp_path: Path) -> None:
    plan, study, searcher = twins(tmp_path, trials=2)
    base = searcher.suggest("base")
    searcher.suggest("a")
    found = advance(plan, base, times=1)
    assert not found.whole
    searcher.on_trial_complete("base", {"digest": found.digest, "base": True})
    assert searcher.suggest("c") is None, "one runs, and the twin counts as stopped"
    assert study.get_trials()[0].state is TrialState.PRUNED


@pytest.mark.parametrize("algorithm", ["random", "nsga2", "grid"])
def test_every_algorithm_reaches_its_number(tmp_path: Path, algorithm: str) -> None:
    space = {
        "steering.operator": {"choices": ["add", "project"]},
        "steering.coefficient": {"loguniform": [0.05, 1.0], "grid": 3},
    }
    outcome = finished_sweep(tmp_path, space=space, search={"trials": 5, "algorithm": algorithm})
    assert len(outcome.whole) == (6 if algorithm == "grid" else 5)
    if algorithm == "grid":
        assert len({str(row.params) for row in outcome.whole}) == 6


def test_points_to_evaluate_first_come_first_and_once(tmp_path: Path) -> None:
    first = [{"steering.operator": "project", "steering.coefficient": 0.7}]
    outcome = finished_sweep(tmp_path, first=first, search={"trials": 3})
    assert outcome.rows[0].settings == first[0]
    sweep, base = configs(tmp_path, first=first, search={"trials": 5})
    search_here(sweep, base)
    again = load_outcome(outcome.folder, sweep, base)
    assert sum(row.settings == first[0] for row in again.rows) == 1
    assert len(again.whole) == 5, "a finished sweep is extended"


def test_an_interrupted_trial_is_queued_again(tmp_path: Path) -> None:
    save_vector(tmp_path / "vector")
    sweep, base = configs(tmp_path, space=TRAINING, search={"trials": 4})
    search_here(sweep, base, stop_after=3)
    folder = plan_of(sweep, base).folder
    study = open_study(folder, sweep, base)
    running = study.get_trials(states=(TrialState.RUNNING,))
    assert len(running) == 1
    search_here(sweep, base)
    outcome = load_outcome(folder, sweep, base)
    assert len(outcome.whole) == 4
    assert any(row.params == running[0].params for row in outcome.whole)


def test_stopped_trials_count_and_give_no_values(tmp_path: Path) -> None:
    search = {"trials": 8, "asha": {"grace_steps": 2, "reduction_factor": 3}}
    outcome = finished_sweep(tmp_path, space=TRAINING, search=search)
    states = [row.state for row in outcome.rows]
    assert len(states) == 8
    assert states.count("pruned") >= 1
    assert all(row.result and row.result.step == 2 for row in outcome.rows if row.state == "pruned")
    pruned = [t for t in outcome.study.trials if t.state is TrialState.PRUNED]
    assert all(not trial.values for trial in pruned)


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"space": TRAINING}, "space"),
        ({"objectives": {"toxicity": "min", "utility": "max", "nll": "min"}}, "objectives"),
        ({"objectives": {"toxicity": "min"}}, "other objectives"),
        ({"validation": {"harm_prompts": 3}}, "validation"),
    ],
)
def test_storage_of_another_sweep_is_refused(
    tmp_path: Path, changes: dict[str, Any], differs: str
) -> None:
    sweep, base = configs(tmp_path)
    folder = plan_of(sweep, base).folder
    open_study(folder, sweep, base)
    other, _ = configs(tmp_path, **changes)
    with pytest.raises(ConfigError, match=differs):
        open_study(folder, other, base)
    learn = base.learn.model_copy(update={"steps": 7})
    with pytest.raises(ConfigError, match="another base configuration"):
        open_study(folder, sweep, base.model_copy(update={"learn": learn}))
    more, _ = configs(tmp_path, search={"trials": 99, "algorithm": "random"})
    open_study(folder, more, base)


def test_a_file_that_is_no_study_is_refused(tmp_path: Path) -> None:
    sweep, base = configs(tmp_path)
    folder = plan_of(sweep, base).folder
    folder.path.mkdir(parents=True)
    folder.storage.write_bytes(b"not a database at all" * 100)
    with pytest.raises(ConfigError, match="is not an Optuna database"):
        open_study(folder, sweep, base)
    folder.storage.unlink()
    foreign = optuna.create_study(
        storage=f"sqlite:///{folder.storage}",
        study_name="spo-sweep",
        directions=["minimize", "maximize", "minimize"],
    )
    foreign.ask()
    with pytest.raises(ConfigError, match=r"was not made by jobs\.sweep"):
        open_study(folder, sweep, base)


def test_two_sweeps_on_one_folder_are_refused(tmp_path: Path) -> None:
    sweep, base = configs(tmp_path, space=COEFFICIENTS)
    folder = plan_of(sweep, base).folder
    code = (
        "import sys; from pathlib import Path; from spo.sweep.plan import SweepFolder; "
        "from spo.sweep.study import locked\n"
        f"with locked(SweepFolder(path=Path({str(folder.path)!r}))):\n"
        "    print('in', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout
        assert other.stdout.readline() == "in\n"
        with pytest.raises(ConfigError, match=f"another sweep works .*process {other.pid}"):
            locked(folder).__enter__()
    finally:
        other.kill()
        other.wait(timeout=10)
    with locked(folder):
        pass  # the lock went with the process
