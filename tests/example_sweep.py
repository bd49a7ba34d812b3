"""A whole sweep on the fake engine without Ray: the real search, trials, storage and files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from spo.artifact import SteeringArtifact
from spo.config import RunConfig
from spo.config.load import validated
from spo.engines.fake import FakeEngine
from spo.records import Operator, Positions, Prompt, PromptFormat, PromptKind, Rollout
from spo.sweep.outcome import Outcome, load_outcome, remember_base, write_table
from spo.sweep.plan import TrialPlan, TrialResult
from spo.sweep.rungs import Rungs
from spo.sweep.settings import SweepConfig
from spo.sweep.study import SweepSearch, open_study, queue_first, requeue_interrupted
from spo.sweep.tensorboard import log_trial
from spo.sweep.trial import Trial, rung_steps
from spo.sweep.validation import PromptSplit, split_prompts
from spo.vector import SteeringVector

RUDE = re.compile(r"rude|mean|vile|cruel")


class WordScorer:
    """Share of rude words; alignment is constant."""

    def score(self, rollouts: Sequence[Rollout]) -> list[dict[str, float]]:
        return [
            {"toxicity": len(RUDE.findall(r.text)) / len(r.text.split()), "alignment": 0.5}
            for r in rollouts
        ]


def known_vector(layers: tuple[int, ...] = (0, 1, 2)) -> SteeringVector:
    direction = FakeEngine().harm_direction
    return SteeringVector(
        layers=layers,
        directions=torch.stack([direction] * len(layers)),
        mean_norms=torch.ones(len(layers)),
        calibration=torch.zeros(len(layers), 8),
        model_id="fake",
        model_revision="1",
    )


def save_vector(folder: Path) -> Path:
    return SteeringArtifact(
        vector=known_vector(),
        operator=Operator.ADD,
        coefficient=0.1,
        positions=Positions.ALL,
        method="known",
    ).save(folder)


def prompts(harm: int = 24, benign: int = 16) -> list[Prompt]:
    return [
        Prompt(
            prompt_id=f"{kind.value}-{i:03d}",
            text=f"words <{i}> & more",
            kind=kind,
            format=PromptFormat.PLAIN,
        )
        for kind, count in ((PromptKind.HARM, harm), (PromptKind.BENIGN, benign))
        for i in range(count)
    ]


COEFFICIENTS: dict[str, Any] = {
    "steering.operator": {"choices": ["add", "project"]},
    "steering.coefficient": {"loguniform": [0.05, 2.0]},
}
TRAINING: dict[str, Any] = {"learn.learning_rate": {"loguniform": [0.01, 1.0]}}


def configs(folder: Path, *, space: dict[str, Any] | None = None, **sweep: Any) -> Any:
    """(sweep, base) of a sweep in `folder`."""
    tree = {
        "name": "example",
        "vector": str(folder / "vector"),
        "objectives": {"toxicity": "min", "utility": "max", "kl": "min"},
        "space": COEFFICIENTS if space is None else space,
        "search": {"trials": 10, "concurrent": 1, "startup_trials": 4},
        "validation": {"bootstrap": 50, "max_tokens": 12, "benign_tokens": 12, "fraction": 0.5},
        "compare": False,
        **sweep,
    }
    base = {
        "name": "example",
        "output_dir": str(folder),
        "engine": {"backend": "fake"},
        "steering": {"coefficient": 0.1},
        "rollout": {
            "harm_prompts": 4,
            "benign_prompts": 2,
            "group_size": 4,
            "max_tokens": 12,
            "max_staleness": 0,
        },
        "learn": {"steps": 6, "dtype": "float32", "max_dose": 20.0},
    }
    return validated(SweepConfig, tree, None), validated(RunConfig, base, None)


def plan_of(sweep: SweepConfig, base: RunConfig) -> TrialPlan:
    asha, steps = sweep.search.asha, base.learn.steps
    trains = any(key.startswith("learn.") for key in sweep.space)
    rungs = rung_steps(steps, asha.grace_steps, asha.reduction_factor) if asha else (steps,)
    return TrialPlan(
        sweep=sweep, base=base, num_layers=4, prefix="", steps=rungs if trains else (0,)
    )


def trial_of(
    plan: TrialPlan, values: Any, engine: FakeEngine | None = None, split: PromptSplit | None = None
) -> Trial:
    return Trial(
        plan,
        values,
        sampler=engine or FakeEngine(),
        scorer=WordScorer(),
        split=split or split_prompts(prompts(), plan.sweep.validation),
        learner_engine=lambda _: FakeEngine(),
    )


def search_here(sweep: SweepConfig, base: RunConfig, *, stop_after: int | None = None) -> int:
    """Run the search in this process, on demand to the middle of a trial; returns trials begun."""
    plan = plan_of(sweep, base)
    folder = plan.folder
    study = open_study(folder, sweep, base)
    requeue_interrupted(study)
    queue_first(study, plan.space(), sweep)
    remember_base(folder, plan.digest(base))
    stopped: set[str] = set()

    def on_result(number: int | None, result: TrialResult) -> None:
        settings = plan.space().settings(result.values)
        log_trial(folder, sweep, number, result, settings)

    searcher = SweepSearch(plan, study, stopped=stopped, on_result=on_result)
    factor = sweep.search.asha.reduction_factor if sweep.search.asha else 2
    rungs = Rungs(folder.rungs, list(sweep.objectives), factor)
    begun = 0
    while isinstance(point := searcher.suggest(f"t{begun}"), dict):
        begun += 1
        trial, found = trial_of(plan, point["values"]), None
        if stop_after is not None and begun > stop_after:
            return begun
        while found is None or not found.whole:
            found = trial.advance()
            if not found.whole and point["label"] != "base":
                values = {name: i.mean for name, i in found.measured.metrics.items()}
                if not rungs.goes_on(found.step, found.digest, values):
                    stopped.add(f"t{begun - 1}")
                    break
        result = {"digest": found.digest, "base": point["label"] == "base"}
        searcher.on_trial_complete(f"t{begun - 1}", result)
    return begun


def finished_sweep(folder: Path, **changes: Any) -> Outcome:
    """A finished sweep with every file."""
    save_vector(folder / "vector")
    sweep, base = configs(folder, **changes)
    search_here(sweep, base)
    outcome = load_outcome(plan_of(sweep, base).folder, sweep, base)
    write_table(outcome)
    return outcome
