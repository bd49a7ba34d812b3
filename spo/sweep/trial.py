"""One trial: its vector, on request its training, and what it scores on the validation prompts.

`Trial` is a plain class and knows neither Ray nor Tune. It is measured at the steps of its plan,
checkpoints at every learner step, and a new `Trial` on the same folder continues there.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from spo.artifact import SteeringArtifact, write_atomic
from spo.config import RunConfig
from spo.engines.base import Sampler
from spo.engines.plan import DifferentiableEngine
from spo.errors import DataError
from spo.pipeline import STAGE1, run_estimate, train
from spo.progress import Silent
from spo.records import Batch, SteeringSpec
from spo.stages.coordinator import Coordinator
from spo.stages.learn import Update, VectorLearner
from spo.sweep.plan import TrialPlan, TrialResult, read_result, stage1_digest
from spo.sweep.settings import Scalar
from spo.sweep.validation import Scorer, Split, Validator
from spo.vector import SteeringVector

SLOTS_TRAINING = 4
"""Versions of one name that an engine keeps."""
_KEPT_CHECKPOINTS = 2


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
        split: Split,
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
        self._learner: VectorLearner | None = None
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
            vector = self._train(artifact.vector, until)
            history = read_history(self.folder)
        name = f"vector-{vector.sha256[:16]}" if not until else f"trial-{self.digest}"
        result = TrialResult(
            digest=self.digest,
            values=self.values,
            step=until,
            steps=self.plan.steps[-1],
            measured=self._measure(name, vector, until),
            layers=vector.layers,
            sha256=vector.sha256,
            seconds=time.monotonic() - begin + (kept.seconds if kept else 0.0),
            history=history,
        )
        self._keep(artifact, vector)
        write_atomic(self.folder / "result.json", result.to_json().encode())
        return result

    def _measure(self, name: str, vector: SteeringVector, version: int) -> Any:
        self._sampler.publish(name, vector, version)
        steering = self.config.steering
        spec = SteeringSpec(
            vector=name,
            version=version,
            coefficient=steering.coefficient,
            operator=steering.operator,
            positions=steering.positions,
        )
        return self._validator.measure(spec, sha256=vector.sha256)

    def _train(self, start: SteeringVector, until: int) -> SteeringVector:
        """Learner steps up to `until`; the vector of the last one."""
        if self._learner is None:
            self._learner = VectorLearner(
                self._learner_engine(self.config),
                start,
                steering=self.config.steering,
                config=self.config.learn,
            )
        learner = self._learner
        kept = self._checkpoints()
        first = learner.restore(kept[-1]) if kept else 0
        coordinator = Coordinator(
            self._split.train,
            rollouts=self._sampler,
            scorer=self._scorer,
            steering=self.config.steering,
            rollout=self.config.rollout,
            reward=self.config.reward,
            seed=self.config.seed,
            history=self.folder / "history.jsonl",
            vector_name=f"trial-{self.digest}",
        )

        def next_batch(step: int, vector: SteeringVector) -> Batch:
            return coordinator.batch(step, vector)

        def after_step(update: Update, vector: SteeringVector) -> None:
            coordinator.record(
                {
                    "step": update.step,
                    "loss": update.loss,
                    "kl": update.kl,
                    "grad_norm": update.grad_norm,
                    "doses": vector.doses.tolist(),
                    "learn_s": update.seconds,
                }
            )
            self._checkpoint(learner, update.step + 1)

        return train(learner, next_batch, steps=range(first, until), after_step=after_step)

    def _checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*[0-9]"))

    def _checkpoint(self, learner: VectorLearner, next_step: int) -> None:
        """Whole or not at all: a kill during the write leaves the one before."""
        path = self.folder / f"checkpoint-{next_step:06d}"
        part = path.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        learner.save(part, next_step)
        if not path.exists():
            part.rename(path)
        for old in self._checkpoints()[:-_KEPT_CHECKPOINTS]:
            shutil.rmtree(old, ignore_errors=True)

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
        there = config.model_copy(update={"output_dir": home.parent, "name": home.name})
        run_estimate(there, Silent())
    return SteeringArtifact.load(home / STAGE1, model_id=None)


def read_history(folder: Path) -> tuple[Mapping[str, Any], ...]:
    """Figures by learner step; a step that was replayed counts once, as it went last."""
    path = folder / "history.jsonl"
    if not path.is_file():
        return ()
    steps: dict[int, Mapping[str, Any]] = {}
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}: a line is not JSON: {error}") from error
        steps[int(entry["step"])] = entry
    return tuple(steps[step] for step in sorted(steps))


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
    return SLOTS_TRAINING if plan.trains else 1
