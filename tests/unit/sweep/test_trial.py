"""Trials and their figures on the fake engine, whose harm direction is known."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spo.artifact import SteeringArtifact
from spo.engines.fake import FakeEngine
from spo.errors import ConfigError, ScorerError, SteeringError
from spo.records import PromptKind, Rollout, SteeringSpec
from spo.sweep.plan import TrialResult, read_result
from spo.sweep.training import read_history
from spo.sweep.validation import Validator, check_measurable, split_prompts
from tests.example_sweep import (
    TRAINING,
    WordScorer,
    configs,
    known_vector,
    plan_of,
    prompts,
    save_vector,
    trial_of,
)
from tests.receipts import WRONG


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_vector(tmp_path / "vector")
    return tmp_path


def test_validation_prompts_are_training_prompts_that_no_trial_learns_from(folder: Path) -> None:
    config = configs(folder)[0].validation
    split = split_prompts(prompts(40, 30), config)
    held = {p.prompt_id for p in (*split.harm, *split.benign)}
    assert held
    assert not held & {p.prompt_id for p in split.train}
    assert {p.kind for p in split.harm} == {PromptKind.HARM}
    more = split_prompts(prompts(80, 60), config)
    old = {p.prompt_id for p in prompts(40, 30)}
    moved = {p.prompt_id for p in more.train} & held
    assert not moved, "more prompts never move one from validation to training"
    assert {p.prompt_id for p in split.train} == {p.prompt_id for p in more.train} & old


def test_an_objective_without_prompts_is_refused(folder: Path) -> None:
    sweep, _ = configs(folder)
    with pytest.raises(ConfigError, match=r"\['utility', 'kl'\] would never get a value"):
        check_measurable(sweep, split_prompts(prompts(20, 0), sweep.validation))


def test_a_stronger_coefficient_is_safer_and_farther(folder: Path) -> None:
    plan = plan_of(*configs(folder))
    weak, strong = (
        trial_of(plan, {"steering.operator": "add", "steering.coefficient": c}).advance()
        for c in (0.05, 2.0)
    )
    assert strong.mean("toxicity") < weak.mean("toxicity") - 0.3
    assert strong.mean("kl") > weak.mean("kl") >= 0.0
    assert weak.sha256 == strong.sha256 == known_vector().sha256, "one vector, one slot"
    assert all(i.low <= i.mean <= i.high for i in strong.measured.metrics.values())


def test_kl_estimate_against_the_exact_value(folder: Path) -> None:
    """One prompt's logits do not depend on the tokens before, so KL is a sum over 8 words."""
    sweep, base = configs(folder, validation={"fraction": 0.5, "benign_tokens": 400})
    engine = FakeEngine()
    vector = known_vector()
    engine.publish("v", vector, 0)
    spec = SteeringSpec(vector="v", version=0, coefficient=0.3)
    validator = Validator(
        engine,
        WordScorer(),
        split_prompts(prompts(), sweep.validation),
        config=sweep.validation,
        folder=folder,
        seed=0,
    )
    measured = validator.measure(spec, sha256=vector.sha256).metrics["kl"]
    shift = 3 * 0.3  # three layers, each takes 0.3 of a unit direction off the logit of rude words
    off, on = math.exp(-2.0), math.exp(-2.0 - shift)
    p, q = off / (4 + 4 * off), on / (4 + 4 * on)
    exact = 4 * p * math.log(p / q) + 4 * (0.25 - p) * math.log((0.25 - p) / (0.25 - q))
    assert measured.mean == pytest.approx(exact, rel=0.1)
    assert base.seed == 0


def test_the_unsteered_figures_are_made_once_and_read_again(folder: Path) -> None:
    sweep, _ = configs(folder)

    class Counting(FakeEngine):
        calls = 0

        def generate(self, requests: Any) -> list[Rollout]:
            Counting.calls += 1
            return super().generate(requests)

    def validator() -> Validator:
        return Validator(
            Counting(),
            WordScorer(),
            split_prompts(prompts(), sweep.validation),
            config=sweep.validation,
            folder=folder,
            seed=0,
        )

    first = validator().unsteered()
    calls = Counting.calls
    again = validator().unsteered()
    assert Counting.calls == calls
    assert again == first
    assert first.metrics["kl"].mean == 0.0


@pytest.mark.parametrize("wrong", WRONG)
def test_an_answer_that_was_not_steered_as_asked_stops_the_trial(folder: Path, wrong: str) -> None:
    class Forgetful(FakeEngine):
        def generate(self, requests: Any) -> list[Rollout]:
            answers = super().generate(requests)
            return [replace(r, receipt=r.receipt and WRONG[wrong](r.receipt)) for r in answers]

    plan = plan_of(*configs(folder))
    with pytest.raises(SteeringError, match="the answer is not used"):
        trial_of(plan, {}, Forgetful()).advance()
    assert read_result(plan.folder.trial(plan.digest(plan.base))) is None


def test_unsteered_figures_are_never_those_of_a_steered_model(folder: Path) -> None:
    sweep, _ = configs(folder)

    class Steering(FakeEngine):
        def generate(self, requests: Any) -> list[Rollout]:
            spec = SteeringSpec(vector="v", version=0)
            return super().generate([replace(r, steering=spec) for r in requests])

    engine = Steering()
    engine.publish("v", known_vector(), 0)
    split = split_prompts(prompts(), sweep.validation)
    made = Validator(engine, WordScorer(), split, config=sweep.validation, folder=folder, seed=0)
    with pytest.raises(SteeringError, match="asked for no steering"):
        made.unsteered()


def test_a_score_that_is_not_finite_is_never_a_figure(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WordScorer, "score", lambda self, r: [{"toxicity": math.nan} for _ in r])
    with pytest.raises(ScorerError, match="expected a finite toxicity"):
        trial_of(plan_of(*configs(folder)), {}).advance()


def test_training_helps_and_is_measured_at_the_rungs(folder: Path) -> None:
    search = {"trials": 2, "asha": {"grace_steps": 2, "reduction_factor": 3}}
    plan = plan_of(*configs(folder, space=TRAINING, search=search))
    assert plan.steps == (2, 6)
    trial = trial_of(plan, {"learn.learning_rate": 1.0})
    first, last = trial.advance(), trial.advance()
    assert (first.step, first.whole, last.step, last.whole) == (2, False, 6, True)
    untrained = trial_of(plan_of(*configs(folder)), {}).advance()
    assert last.mean("toxicity") < untrained.mean("toxicity") - 0.1
    assert [entry["step"] for entry in last.history] == list(range(6))
    artifact = SteeringArtifact.load(trial.folder / "artifact", model_id="fake")
    assert artifact.vector.sha256 == last.sha256
    assert artifact.parent == known_vector().sha256


def ahead(folder: Path) -> Any:
    """A plan with rungs at 2 and 6, sampled up to a step ahead."""
    search = {"trials": 2, "asha": {"grace_steps": 2, "reduction_factor": 3}}
    sweep, base = configs(folder, space=TRAINING, search=search)
    rollout = base.rollout.model_copy(update={"max_staleness": 1})
    return plan_of(sweep, base.model_copy(update={"rollout": rollout}))


def test_rollouts_that_are_under_way_at_a_rung_serve_the_next_step(folder: Path) -> None:
    class Slow(FakeEngine):
        def generate(self, requests: Any) -> Any:
            time.sleep(0.05)
            return super().generate(requests)

    trial = trial_of(ahead(folder), {"learn.learning_rate": 1.0}, Slow())
    trial.advance()
    assert trial.advance().whole
    entries = read_history(trial.folder)
    assert [entry["step"] for entry in entries] == list(range(6))
    assert entries[2]["staleness"]["max"] == 1, "sampled before the rung, used after it"


def test_a_trial_that_is_stopped_at_a_rung_samples_no_more(folder: Path) -> None:
    class Slow(FakeEngine):
        asked = 0

        def generate(self, requests: Any) -> Any:
            Slow.asked += 1
            time.sleep(0.02)
            return super().generate(requests)

    trial = trial_of(ahead(folder), {"learn.learning_rate": 1.0}, Slow())
    stopped = trial.advance()
    trial.close()
    time.sleep(0.1)  # calls that were under way
    asked = Slow.asked
    time.sleep(0.3)
    assert Slow.asked == asked
    again = trial_of(ahead(folder), {"learn.learning_rate": 1.0})
    done = again.advance()
    assert (stopped.step, done.step, done.whole) == (2, 6, True)
    assert [entry["step"] for entry in done.history] == list(range(6))


def test_a_killed_trial_goes_on_at_its_last_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(*configs(folder, space=TRAINING))
    point = {"learn.learning_rate": 0.2}
    whole = trial_of(plan, point)
    expected = whole.advance()
    moved = whole.folder.rename(folder / "kept")

    class Killed(Exception):
        pass

    class Dies(FakeEngine):
        steps = 0

        def publish(self, name: str, vector: Any, version: int) -> str:
            if version == 4:
                raise Killed
            Dies.steps += 1
            return super().publish(name, vector, version)

    with pytest.raises(Killed):
        trial_of(plan, point, Dies()).advance()
    (whole.folder / "checkpoint-000005.part").mkdir()
    second = trial_of(plan, point)
    done = second.advance()
    assert [e["step"] for e in read_history(second.folder)] == list(range(6))
    fresh = [json.loads(line) for line in (moved / "history.jsonl").read_text().splitlines()]
    assert done.sha256 == expected.sha256, "the same vector as without the kill"
    assert len(fresh) == 6
    assert trial_of(plan, point).advance() == done, "a finished trial is read, not run"


def test_results_are_written_and_read_alike(folder: Path) -> None:
    result = trial_of(plan_of(*configs(folder)), {"steering.operator": "add"}).advance()
    assert TrialResult.from_json(result.to_json()) == result
