"""One trial: its vector, on request its training, and what it scores on the validation prompts.

`Trial` is a plain class and knows neither Ray nor Tune. It is measured at the steps of its plan,
checkpoints at every learner step, and a new `Trial` on the same folder continues there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from spo.artifact import SteeringArtifact
from spo.config import RunConfig
from spo.engines.base import Sampler
from spo.engines.forward import DifferentiableEngine
from spo.files import write_atomic
from spo.progress import Silent
from spo.records import SteeringSpec
from spo.stage1.job import STAGE1, run_estimate
from spo.sweep.plan import TrialPlan, TrialResult, read_result, stage1_digest
from spo.sweep.settings import Scalar
from spo.sweep.slot_office import slots_of, trained_name
from spo.sweep.training import TrialTraining, read_history
from spo.sweep.validation import Measured, PromptSplit, Scorer, Validator
from spo.vector import SteeringVector


class Trial:
    """A point of the space, run step by step.

    Args:
        plan: the sweep.
        values: the point; empty for the base configuration.
        sampler: engine or pool, already leased.
        scorer: reward models.
        split: training and validation prompts.
        learner_engine: opens the engine that gradients come from; called when the trial trains.
    """

    def __init__(
        self,
        plan: TrialPlan,
        values: Mapping[str, Scalar],
        *,
        sampler: Sampler,
        scorer: Scorer,
        split: PromptSplit,
        learner_engine: Callable[[RunConfig], DifferentiableEngine],
    ) -> None:
        self.plan = plan
        self.values = dict(values)
        self.config = plan.config(values)
        self.digest = plan.digest(self.config)
        self.folder = plan.folder.trial(self.digest)
        self._sampler = sampler
        self._scorer = scorer
        self._split = split
        self._learner_engine = learner_engine
        self._trained: TrialTraining | None = None
        self._validator = Validator(
            sampler,
            scorer,
            split,
            config=plan.sweep.validation,
            folder=plan.folder.path,
            seed=plan.base.seed,
        )

    def advance(self) -> TrialResult:
        """Run to the next step at which the trial is measured, and measure it."""
        kept = read_result(self.folder)
        if kept is not None and kept.whole:
            return kept
        begin = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / "config.yaml", self.config.to_yaml().encode())
        artifact = start_artifact(self.plan, self.config)
        done = 0 if kept is None else kept.step
        until = next(step for step in self.plan.steps if step > done or step == 0)
        vector = artifact.vector
        history: tuple[Mapping[str, Any], ...] = ()
        if until:
            vector = self._training().run(artifact.vector, until)
            history = read_history(self.folder)
        result = TrialResult(
            digest=self.digest,
            values=self.values,
            step=until,
            steps=self.plan.steps[-1],
            measured=self._measure(vector, passing=until > 0),
            layers=vector.layers,
            sha256=vector.sha256,
            seconds=time.monotonic() - begin + (kept.seconds if kept else 0.0),
            history=history,
        )
        self._keep(artifact, vector)
        write_atomic(self.folder / "result.json", result.to_json().encode())
        return result

    def close(self) -> None:
        """End its background work; a new `Trial` on the same folder continues."""
        if self._trained is not None:
            self._trained.close()
            self._trained = None

    def _training(self) -> TrialTraining:
        if self._trained is None:
            self._trained = TrialTraining(
                self.config,
                self.digest,
                self.folder,
                split=self._split,
                sampler=self._sampler,
                scorer=self._scorer,
                open_engine=self._learner_engine,
            )
        return self._trained

    def _measure(self, vector: SteeringVector, *, passing: bool) -> Measured:
        """Figures of a vector; `passing` gives its slot back at once, for nobody shares it."""
        name = f"vector-{vector.sha256[:16]}"
        self._sampler.publish(name, vector, 0)
        steering = self.config.steering
        spec = SteeringSpec(
            vector=name,
            version=0,
            coefficient=steering.coefficient,
            operator=steering.operator,
            positions=steering.positions,
        )
        measured = self._validator.measure(spec, sha256=vector.sha256)
        if passing:
            self._sampler.retire(name)
        return measured

    def _keep(self, start: SteeringArtifact, vector: SteeringVector) -> None:
        trained = vector.sha256 != start.vector.sha256
        method = f"{self.config.learn.objective} from {start.method}" if trained else start.method
        SteeringArtifact(
            vector=vector,
            operator=self.config.steering.operator,
            coefficient=self.config.steering.coefficient,
            positions=self.config.steering.positions,
            method=f"{method}, chosen by a sweep",
            data_sha256=start.data_sha256,
            config_digest=self.config.digest,
            parent=start.vector.sha256 if trained else start.parent,
        ).save(self.folder / "artifact")


def start_artifact(plan: TrialPlan, config: RunConfig) -> SteeringArtifact:
    """The vector that a trial begins with: the sweep's own artifact, or Stage I of its settings.

    Stage I is a cheap reduction of activations that were extracted once for the whole sweep.
    """
    if plan.sweep.vector is not None:
        return SteeringArtifact.load(plan.sweep.vector, model_id=None)
    home = plan.folder.stage1(stage1_digest(config))
    if not (home / STAGE1 / "manifest.json").is_file():
        home.mkdir(parents=True, exist_ok=True)
        link = home / "activations"
        if not link.exists():
            # Another trial with the same Stage I settings may be faster.
            with suppress(FileExistsError):
                link.symlink_to(plan.folder.path / "activations", target_is_directory=True)
        there = config.model_copy(update={"output_dir": str(home.parent), "name": home.name})
        run_estimate(there, Silent())
    return SteeringArtifact.load(home / STAGE1, model_id=None)


def rung_steps(total: int, grace: int, factor: int) -> tuple[int, ...]:
    """Steps at which trials are compared: grace, grace x factor, ..., and the last."""
    steps: list[int] = []
    step = grace
    while step < total:
        steps.append(step)
        step *= factor
    return (*steps, total)


def trial_slots(plan: TrialPlan) -> int:
    """Slots that one trial needs."""
    return slots_of(trained_name("")) + 1 if plan.trains else 1
