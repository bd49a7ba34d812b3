"""Stage II of one run: engines and reward models, coordinator and learner, joined.

The loop itself is `spo.stage2.loop.train`; every Ray Train worker runs it (`spo.stage2.worker`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray

from spo.actors.picture_tasks import Workshop
from spo.actors.pools import Pools
from spo.artifact import SteeringArtifact
from spo.config import RewardConfig, RunConfig
from spo.errors import ArtifactError, DataError
from spo.files import write_atomic
from spo.progress import Reporter, following
from spo.records import Prompt, QuarantinedRow
from spo.resolve import ResolvedModel, learner_model, open_corpus
from spo.run_folder import keep_quarantined
from spo.stage1.job import build_artifact
from spo.stage2.attacked_prompts import with_attacked
from spo.stage2.coordinator import VECTOR_NAME, CoordinatorFiles, CoordinatorSettings
from spo.stage2.coordinator_actor import start_coordinator
from spo.stage2.worker import TrainLoopSettings, fit


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
        prompts, unusable = open_corpus(config.corpus).training_prompts()
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
    keep_quarantined(config.run_dir, "training prompts", task.unusable)
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
    coordinator = _coordinator(config, task, pools, reporter)
    settings = TrainLoopSettings(
        model=learner_model(config.engine, pools.model),
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
        reporter.step(figures["step"] + 1, config.learn.steps, _told(figures, config.reward))
        for alarm in figures["alarms"]:
            reporter.note(f"alarm at step {figures['step']}: {alarm}")

    with following(history, show):
        vector = fit(settings, name=f"train-{digest}", storage=config.storage)
    own = "" if config.learn.artifact == "spo" else f"-{config.learn.artifact}"
    write_atomic(config.run_dir / f"history{own}.jsonl", history.read_bytes())
    keep_quarantined(config.run_dir, "rollouts", ray.get(coordinator.quarantined.remote()))
    ray.kill(coordinator)
    pools.rollouts.retire(f"{VECTOR_NAME}-{digest}")
    method = f"{config.learn.objective} from {start.method}"
    artifact = build_artifact(config, vector, method, start.data_sha256, parent=start.vector.sha256)
    artifact.save(config.run_dir / config.learn.artifact)
    note = {"digest": digest, "sha256": artifact.vector.sha256}
    write_atomic(_note_path(config), json.dumps(note).encode())
    return artifact


def _coordinator(config: RunConfig, task: Task, pools: Pools, reporter: Reporter) -> Any:
    """The coordinator's actor, on the training prompts with their attacked pictures."""
    prompts = attacked_prompts(config, task.prompts, task.start, pools.model, reporter)
    settings = coordinator_settings(config, task.digest)
    files = partial(CoordinatorFiles.named, config.run_dir, task.digest, config.learn.loggers)
    return start_coordinator(prompts, settings, config.engine, pools.prefix, files)


def attacked_prompts(
    config: RunConfig,
    prompts: Sequence[Prompt],
    start: SteeringArtifact,
    model: ResolvedModel,
    reporter: Reporter,
) -> list[Prompt]:
    """The training prompts, a share of them with pictures attacked as `data.attacks` says."""
    return with_attacked(
        prompts,
        config.data,
        corpus=open_corpus(config.corpus),
        start=start,
        workshop=Workshop(
            model=model,
            place=config.attack_place,
            run_dir=config.run_dir,
            seed=config.seed,
            start=config.learn.start,
        ),
        reporter=reporter,
    )


def coordinator_settings(config: RunConfig, name: str) -> CoordinatorSettings:
    """What a coordinator of this run needs; `name` tells its vectors from those of others."""
    return CoordinatorSettings.of(
        steering=config.steering,
        rollout=config.rollout,
        reward=config.reward,
        learn=config.learn,
        seed=config.seed,
        name=f"{VECTOR_NAME}-{name}",
    )


def load_artifact(config: RunConfig, name: str, pools: Pools) -> SteeringArtifact:
    """An artifact of this run, checked against the model that the engines hold."""
    folder = config.run_dir / name
    if not folder.is_dir():
        raise DataError(
            f"{folder} does not exist; run jobs.estimate, or for a trained one jobs.train, first"
        )
    held = pools.rollouts.info
    return SteeringArtifact.load(folder, model_id=held.model_id, model_revision=held.model_revision)


def _told(figures: Mapping[str, Any], reward: RewardConfig) -> str:
    """A step on one line: its reward, of what, and the KL."""
    parts = figures.get("reward_parts", {})
    if reward.parts is None:
        parts = {"toxicity": parts.get("toxicity_harm", math.nan)}
    shown = "".join(f"{name} {value:.3f}  " for name, value in parts.items())
    return f"reward {figures.get('reward', math.nan):+.3f}  {shown}kl {figures['kl']:.3f}"
