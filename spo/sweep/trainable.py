"""A trial as a Ray Tune trainable: finds the shared pools by name, or starts its own.

One process runs many trials in turn, so libraries load and connections are made once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune

from spo.actors.engine_pool import EnginePool
from spo.actors.pools import Pools
from spo.actors.reward_pool import RewardPool
from spo.config import RunConfig
from spo.engines.base import Sampler
from spo.engines.factory import open_learner_engine
from spo.engines.forward import DifferentiableEngine
from spo.errors import StageError
from spo.pipeline import open_pools
from spo.progress import Silent
from spo.resolve import learner_model, open_corpus, resolve_model
from spo.sweep.leased_sampler import LeasedSampler
from spo.sweep.plan import BASE, TrialPlan
from spo.sweep.slot_office import RemoteOffice
from spo.sweep.trial import Trial
from spo.sweep.validation import Scorer, split_prompts


def office_name(prefix: str) -> str:
    """Name of the actor that leases the slots of a pool."""
    return f"{prefix}-slots"


class SweepTrainable(tune.Trainable):  # type: ignore[misc]
    """Runs `Trial`s. Its Tune configuration is {"label": ..., "values": the point}."""

    def setup(self, config: dict[str, Any], plan: TrialPlan) -> None:
        """Called once in a process, with the first trial."""
        self._plan = plan
        self._own: Pools | None = None
        self._engine: DifferentiableEngine | None = None
        prompts, _ = open_corpus(plan.base.corpus).training_prompts()
        self._split = split_prompts(prompts, plan.sweep.validation)
        self._sampler: Sampler
        self._scorer: Scorer
        self._trial: Trial
        self._lease: LeasedSampler | None = None
        if plan.prefix:
            self._sampler = EnginePool.connect(plan.prefix, plan.base.engine)
            self._scorer = RewardPool.connect(plan.prefix, plan.base.reward)
        else:
            self._own = open_pools(plan.base, Silent())
            self._own.__enter__()
            self._sampler, self._scorer = self._own.rollouts, self._own.rewards
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial in the same process."""
        if self._own is not None:
            return False
        self._end()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Up to the next step at which the trial is measured."""
        result = self._trial.advance()
        if result.whole and self._lease is not None:
            # Now, not in `cleanup`: this process waits for its next trial with nothing in hand.
            self._lease.end(keep=not self._plan.trains)
            self._lease = None
        return {
            "step": result.step,
            "steps": result.steps,
            "digest": result.digest,
            "base": self._label == BASE,
            **{name: value.mean for name, value in result.measured.metrics.items()},
            "done": result.whole,
        }

    def cleanup(self) -> None:
        """Give back what this process holds; after a kill the lease's end does it."""
        self._end()
        if self._own is not None:
            self._own.__exit__(None, None, None)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing for Tune: a trial's folder holds its checkpoints."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: a trial continues at the checkpoints of its folder."""

    def _begin(self, config: dict[str, Any]) -> None:
        plan = self._plan
        self._label: str = config["label"]
        self._lease = None
        sampler: Sampler = self._sampler
        if plan.prefix:
            import ray

            self._lease = LeasedSampler(
                self._sampler,
                RemoteOffice(ray.get_actor(office_name(plan.prefix))),
                # With the process: one that was thought dead must not renew its successor's lease.
                trial=f"{self._label}-{os.getpid()}",
                lease_s=plan.sweep.pool.lease_s,
                wait_s=plan.sweep.pool.wait_s,
            )
            sampler = self._lease
        self._trial = Trial(
            plan,
            config["values"],
            sampler=sampler,
            scorer=self._scorer,
            split=self._split,
            learner_engine=self._open_learner,
        )

    def _end(self) -> None:
        self._trial.close()
        if self._lease is not None:
            self._lease.end(keep=not self._plan.trains)
            self._lease = None

    def _open_learner(self, config: RunConfig) -> DifferentiableEngine:
        """The frozen model for gradients; the same for every trial of this process."""
        if self._engine is None:
            model = resolve_model(config.model, config.cache)
            self._engine = open_learner_engine(
                learner_model(config.engine, model), model.revision, config.learn
            )
        return self._engine


def trial_resources(plan: TrialPlan) -> dict[str, float]:
    """What Tune reserves for a trial; its engine, where it has its own, asks for itself."""
    learn = plan.base.learn
    if learn.workers > 1:
        raise StageError(
            f"a sweep's trial learns in one process, got learn.workers={learn.workers}; set it to "
            "1 and run more trials at once (search.concurrent)"
        )
    needs = {"CPU": 0.1}
    if plan.trains and learn.gpus:
        needs["GPU"] = learn.gpus
    return needs


def retirer(prefix: str, base: RunConfig) -> Callable[[], Callable[[str], object]]:
    """What the office needs to retire vectors: connects inside the office's own process."""

    def connect() -> Callable[[str], object]:
        return EnginePool.connect(prefix, base.engine).retire

    return connect


def sessions(folder: Path) -> Path:
    """Folder for Tune's own files of this driver."""
    home = folder / "tune"
    home.mkdir(parents=True, exist_ok=True)
    return home / f"session-{len(list(home.iterdir())):03d}"
