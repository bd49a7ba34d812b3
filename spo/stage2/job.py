"""Stage II of one run: engines and reward models, coordinator and learner, joined.

What the learner and the coordinator are is in `spo.actors`; `train` is the loop itself, a function
that tests run on fakes in milliseconds.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import ray

from spo.actors.engine_pool import EnginePool
from spo.actors.reward_pool import RewardPool
from spo.algorithms.objectives import is_informative
from spo.artifact import SteeringArtifact, write_atomic
from spo.config import RunConfig
from spo.corpus.files import (
    ResolvedModel,
    alignment_arguments,
    learner_model,
    resolve_model,
    toxicity_arguments,
    training_prompts,
)
from spo.engines.base import Sampler
from spo.errors import ArtifactError, DataError
from spo.progress import Reporter, following
from spo.records import Batch, Prompt, QuarantinedRow
from spo.run_folder import keep_quarantined
from spo.stage1.job import build_artifact
from spo.stage2.attacked_prompts import with_attacked
from spo.stage2.coordinator import VECTOR_NAME, Coordinator, Scorer, Settings
from spo.stage2.coordinator_actor import CoordinatorActor
from spo.stage2.history import Recorder, open_sinks
from spo.stage2.learner import Update
from spo.stage2.ledger import Ledger
from spo.stage2.schedule import Schedule
from spo.stage2.worker import TrainLoopSettings, fit
from spo.vector import SteeringVector


class Learner(Protocol):
    """Improves a vector by one batch."""

    @property
    def vector(self) -> SteeringVector: ...

    def update(self, batch: Batch, *, rank: int, world: int) -> Update: ...


def train(
    learner: Learner,
    next_batch: Callable[[int, SteeringVector], Batch],
    *,
    steps: Iterable[int],
    after_step: Callable[[Update, SteeringVector], None],
    shard: tuple[int, int] = (0, 1),
) -> SteeringVector:
    """The preference loop.

    Args:
        learner: holds the vector and its optimiser.
        next_batch: publishes the vector as version `step`, samples, scores; asked again for a step
            it returns the same batch.
        steps: steps still to run.
        after_step: records figures and saves a checkpoint.
        shard: (rank, number of workers): which groups of a batch this worker learns from.
    """
    rank, world = shard
    for step in steps:
        batch = next_batch(step, learner.vector)
        update = learner.update(batch, rank=rank, world=world)
        after_step(update, learner.vector)
    return learner.vector


class Pools:
    """Engines and reward models of one run, started once and shared by training and evaluation.

    Args:
        config: the run.
        reporter: told what is started.
        scoring: False leaves the reward models out, which only training asks.
    """

    def __init__(self, config: RunConfig, reporter: Reporter, *, scoring: bool = True) -> None:
        self._config = config
        self._reporter = reporter
        self._scoring = scoring
        self.prefix = f"{config.name}-{uuid.uuid4().hex[:8]}"
        self.model: ResolvedModel = resolve_model(config.model, config.cache)

    def __enter__(self) -> Pools:
        config = self._config
        self._reporter.stage(
            f"Start {config.engine.replicas} {config.engine.backend} engine(s)"
            + " and reward models" * self._scoring
        )
        with ExitStack() as undo:
            if self._scoring:  # they load while the engines do
                self.rewards = RewardPool.start(
                    toxicity_arguments(config.reward, config.cache),
                    alignment_arguments(config.reward, config.cache),
                    config.reward,
                    prefix=self.prefix,
                )
                undo.callback(self.rewards.close)
            self.rollouts = EnginePool.start(
                self.model.path,
                self.model.revision,
                config.engine,
                prefix=self.prefix,
                seed=config.seed,
            )
            undo.callback(self.rollouts.close)
            if self._scoring:
                self.rewards.wait_ready()
            self._close = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._close.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What Stage II of a run has to do."""

    start: SteeringArtifact
    prompts: list[Prompt]
    unusable: Sequence[QuarantinedRow]
    digest: str
    """Names everything that the trained vector depends on."""

    @classmethod
    def of(cls, config: RunConfig, start: SteeringArtifact) -> Task:
        prompts, unusable = training_prompts(config.data, config.cache, config.seed)
        digest = config.digest_of(
            *("seed", "data", "steering", "rollout", "reward", "learn"),
            also=start.vector.sha256 + repr(prompts),
        )
        return cls(start=start, prompts=prompts, unusable=unusable, digest=digest)

    def finished(self, config: RunConfig) -> SteeringArtifact | None:
        """The artifact of this very task, when the run folder has it."""
        try:
            note = json.loads(_note_path(config).read_text())
            found = SteeringArtifact.load(
                config.run_dir / config.learn.artifact, model_id=self.start.vector.model_id
            )
        except (OSError, ValueError, ArtifactError):
            return None
        done = {"digest": self.digest, "sha256": found.vector.sha256}
        return found if note == done else None


def _note_path(config: RunConfig) -> Path:
    return config.run_dir / f"trained-{config.learn.artifact}.json"


def trained(config: RunConfig) -> SteeringArtifact | None:
    """The artifact of a run whose Stage II is finished; asks no engine."""
    folder = config.run_dir / config.learn.start
    if not folder.is_dir():
        return None
    return Task.of(config, SteeringArtifact.load(folder, model_id=None)).finished(config)


def run_train(config: RunConfig, reporter: Reporter, pools: Pools) -> SteeringArtifact:
    """Stage II: refine the Stage I vector, or the one that `learn.start` names.

    Continues an interrupted run of the same name; a finished one is returned as it is.
    """
    task = Task.of(config, load_artifact(config, config.learn.start, pools))
    start, digest = task.start, task.digest
    keep_quarantined(config, "training prompts", task.unusable)
    done = task.finished(config)
    if done is not None:
        reporter.stage(f"Refine by {config.learn.objective}: finished before")
        return done
    reporter.stage(
        f"Refine by {config.learn.objective}: {config.learn.steps} steps of "
        f"{config.rollout.harm_prompts}+{config.rollout.benign_prompts} prompts x "
        f"{config.rollout.group_size} answers"
    )
    history = config.run_dir / f"history-{digest}.jsonl"
    history.touch()
    prompts = with_attacked(task.prompts, config, start, pools.model, reporter)
    coordinator = _start_coordinator(config, prompts, pools.prefix, history)
    settings = TrainLoopSettings(
        model=learner_model(config, pools.model),
        revision=pools.model.revision,
        vector=start.vector.to_bytes(),
        steering=config.steering,
        config=config.learn,
        coordinator=f"{pools.prefix}-coordinator",
        namespace=config.ray.namespace,
        batch_timeout_s=float(
            config.engine.start_timeout_s
            + 2 * config.engine.request_timeout_s
            + config.reward.timeout_s
        ),
    )

    def show(figures: Mapping[str, Any]) -> None:
        parts = figures.get("reward_parts", {})
        reporter.step(
            figures["step"] + 1,
            config.learn.steps,
            f"reward {figures.get('reward', math.nan):+.3f}  "
            f"toxicity {parts.get('toxicity_harm', math.nan):.3f}  kl {figures['kl']:.3f}",
        )
        for alarm in figures["alarms"]:
            reporter.note(f"alarm at step {figures['step']}: {alarm}")

    with following(history, show):
        vector = fit(settings, train, name=f"train-{digest}", storage=config.storage)
    own = "" if config.learn.artifact == "spo" else f"-{config.learn.artifact}"
    write_atomic(config.run_dir / f"history{own}.jsonl", history.read_bytes())
    keep_quarantined(config, "rollouts", ray.get(coordinator.quarantined.remote()))
    ray.kill(coordinator)
    pools.rollouts.retire(f"{VECTOR_NAME}-{digest}")
    method = f"{config.learn.objective} from {start.method}"
    artifact = build_artifact(config, vector, method, start.data_sha256, parent=start.vector.sha256)
    artifact.save(config.run_dir / config.learn.artifact)
    note = {"digest": digest, "sha256": artifact.vector.sha256}
    write_atomic(_note_path(config), json.dumps(note).encode())
    return artifact


def _start_coordinator(config: RunConfig, prompts: list[Prompt], prefix: str, history: Path) -> Any:
    """The coordinator as a named actor, which Ray restarts."""
    placed = ray.remote(CoordinatorActor).options(
        name=f"{prefix}-coordinator", num_cpus=0, max_restarts=3
    )
    arguments = {"prompts": prompts, "config": config, "prefix": prefix, "history": history}
    return placed.remote(_connected_coordinator, arguments)


def load_artifact(config: RunConfig, name: str, pools: Pools) -> SteeringArtifact:
    """An artifact of this run, checked against the model that the engines hold."""
    folder = config.run_dir / name
    if not folder.is_dir():
        raise DataError(
            f"{folder} does not exist; run jobs.estimate, or for a trained one jobs.train, first"
        )
    held = pools.rollouts.info
    return SteeringArtifact.load(folder, model_id=held.model_id, model_revision=held.model_revision)


def make_coordinator(
    prompts: list[Prompt],
    config: RunConfig,
    rollouts: Sampler,
    scorer: Scorer,
    history: Path,
) -> Coordinator:
    """A coordinator that keeps its files beside `history` (`history-NAME.jsonl`)."""
    name = history.stem.removeprefix("history-")
    folder = history.parent
    return Coordinator(
        Schedule(prompts, config.rollout, config.seed),
        rollouts,
        scorer,
        Settings(
            steering=config.steering,
            rollout=config.rollout,
            reward=config.reward,
            steps=config.learn.steps,
            informative=partial(is_informative, config=config.learn),
            name=f"{VECTOR_NAME}-{name}",
        ),
        ledger=Ledger(folder / f"ledger-{name}.jsonl"),
        recorder=Recorder(
            config.reward,
            history=history,
            rollouts=folder / "rollouts" / name,
            sinks=open_sinks(config.learn.loggers, folder, name),
        ),
    )


def _connected_coordinator(
    prompts: list[Prompt], config: RunConfig, prefix: str, history: Path
) -> Coordinator:
    """Built inside the coordinator's own process, which finds the pools by name."""
    return make_coordinator(
        prompts,
        config,
        EnginePool.connect(prefix, config.engine),
        RewardPool.connect(prefix, config.reward),
        history,
    )
