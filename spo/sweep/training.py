"""The preference loop of one trial, in the trial's own process and without Ray."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spo.config import RunConfig
from spo.engines.base import Sampler
from spo.engines.forward import DifferentiableEngine
from spo.errors import DataError
from spo.stage2.coordinator import CoordinatorFiles, CoordinatorSettings, make_coordinator
from spo.stage2.coordinator_thread import CoordinatorThread
from spo.stage2.learner import Update, VectorLearner, step_figures
from spo.stage2.loop import train
from spo.sweep.slot_office import trained_name
from spo.sweep.validation import PromptSplit, Scorer
from spo.vector import SteeringVector

_KEPT_CHECKPOINTS = 2
_COORDINATOR = "coordinator.json"


class TrialTraining:
    """Learner and coordinator of one trial, with a checkpoint at every step.

    Args:
        config: run configuration of the trial.
        digest: names its vectors.
        folder: history and checkpoints.
        split: it learns from the training part only.
        sampler: engine or pool, already leased.
        scorer: reward models.
        open_engine: opens the engine that gradients come from.
    """

    def __init__(
        self,
        config: RunConfig,
        digest: str,
        folder: Path,
        *,
        split: PromptSplit,
        sampler: Sampler,
        scorer: Scorer,
        open_engine: Callable[[RunConfig], DifferentiableEngine],
    ) -> None:
        self._config = config
        self._folder = folder
        self._open_engine = open_engine
        self._learner: VectorLearner | None = None
        engine = config.engine
        # One thread for all rungs: rollouts of the next step are under way when a rung ends.
        self._coordinator = CoordinatorThread(
            make_coordinator(
                split.train,
                sampler,
                scorer,
                CoordinatorSettings.of(
                    steering=config.steering,
                    rollout=config.rollout,
                    reward=config.reward,
                    learn=config.learn,
                    seed=config.seed,
                    name=trained_name(digest),
                ),
                CoordinatorFiles(history=folder / "history.jsonl", ledger=folder / "ledger.jsonl"),
            ),
            float(engine.start_timeout_s + 2 * engine.request_timeout_s + config.reward.timeout_s),
        )

    def run(self, start: SteeringVector, until: int) -> SteeringVector:
        """Learner steps up to `until`, from the last checkpoint; the vector after them."""
        first = self._resume(start)
        learner = self._learner
        assert learner is not None

        def after_step(update: Update, vector: SteeringVector) -> None:
            snapshot = self._coordinator.record(step_figures(update, vector, start))
            self._checkpoint(learner, update.step + 1, snapshot)

        steps = range(first, until)
        return train(learner, self._coordinator.batch, steps=steps, after_step=after_step)

    def close(self) -> None:
        """End what is still sampled ahead, e.g. for a trial that is stopped at a rung."""
        self._coordinator.close()

    def _resume(self, start: SteeringVector) -> int:
        """Learner and coordinator as the last checkpoint left them; the step to run next."""
        fresh = self._learner is None
        if self._learner is None:
            self._learner = VectorLearner(
                self._open_engine(self._config),
                start,
                steering=self._config.steering,
                config=self._config.learn,
            )
        kept = self._checkpoints()
        if not kept:
            return 0
        if not fresh:
            return int(kept[-1].name.rsplit("-", 1)[1])
        first = self._learner.restore(kept[-1])
        self._coordinator.inner.restore(json.loads((kept[-1] / _COORDINATOR).read_text()))
        return first

    def _checkpoints(self) -> list[Path]:
        return sorted(self._folder.glob("checkpoint-*[0-9]"))

    def _checkpoint(
        self, learner: VectorLearner, next_step: int, snapshot: Mapping[str, Any]
    ) -> None:
        """Whole or not at all: a kill during the write leaves the one before."""
        path = self._folder / f"checkpoint-{next_step:06d}"
        part = path.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        learner.save(part, next_step)
        (part / _COORDINATOR).write_text(json.dumps(snapshot))
        if not path.exists():
            part.rename(path)
        for old in self._checkpoints()[:-_KEPT_CHECKPOINTS]:
            shutil.rmtree(old, ignore_errors=True)


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
