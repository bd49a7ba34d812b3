"""Stage II under Ray Train: the preference loop in every worker, one vector out.

Each worker takes its share of a batch's groups, one flat gradient is averaged, and a checkpoint is
reported every step, so that a crash costs one step. Replaying a step is harmless, because batches
are handed out by step number.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo.config import LearnConfig, SteeringConfig
from spo.engines.factory import open_learner_engine
from spo.errors import StageError
from spo.stage2.coordinator_actor import CoordinatorLink
from spo.stage2.learner import VECTOR_FILE, Update, VectorLearner, step_figures
from spo.stage2.loop import train as preference_loop
from spo.vector import SteeringVector

_COORDINATOR = "coordinator.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainLoopSettings:
    """What a Ray Train worker needs to build its learner and find its batches. Plain values."""

    model: str
    revision: str | None
    vector: bytes
    steering: SteeringConfig
    config: LearnConfig
    coordinator: str
    """Name of the coordinator actor."""
    namespace: str
    batch_timeout_s: float


def fit(settings: TrainLoopSettings, *, name: str, storage: str) -> SteeringVector:
    """Run the preference loop under Ray Train and return the trained vector.

    The same name and storage (a folder or URL that every node can write) continue an interrupted
    run at its last checkpoint.

    Raises:
        StageError: training failed; the message holds the worker's own first error.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    # A worker that reports waits until the controller looks: every two seconds, unless told.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    config = settings.config
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"settings": settings},
        scaling_config=ScalingConfig(
            num_workers=config.workers
            if config.min_workers is None
            else (config.min_workers, config.workers),
            use_gpu=config.use_gpu,
            label_selector=config.labels or None,
            # It works while the engines wait, so it asks for next to no CPU of its own.
            resources_per_worker={"CPU": 0.1} | ({"GPU": config.gpus} if config.gpus else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=3),
        ),
    )
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        raise StageError(f"training failed: {error}") from error
    if result.checkpoint is None:
        raise StageError(f"training of {name!r} ended without a checkpoint; see the worker's log")
    with result.checkpoint.as_directory() as folder:
        return SteeringVector.from_bytes((Path(folder) / VECTOR_FILE).read_bytes())


def _worker(train_loop_config: Mapping[str, Any]) -> None:
    from ray import train

    settings: TrainLoopSettings = train_loop_config["settings"]
    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    start = SteeringVector.from_bytes(settings.vector)
    learner = VectorLearner(
        open_learner_engine(
            settings.model, settings.revision, settings.config, _own_cards(settings.config)
        ),
        start,
        steering=settings.steering,
        config=settings.config,
        all_reduce=_average if world > 1 else None,
    )
    link = CoordinatorLink(
        settings.coordinator, settings.namespace, rank=rank, timeout_s=settings.batch_timeout_s
    )
    checkpoint = train.get_checkpoint()
    first = 0
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            first = learner.restore(Path(folder))
            # Before the first rollout: what is sampled must follow from where the run stands.
            link.restore(json.loads((Path(folder) / _COORDINATOR).read_text()))

    def after_step(update: Update, vector: SteeringVector) -> None:
        snapshot = link.record(step_figures(update, vector, start)) if rank == 0 else None
        link.snapshot = _shared(snapshot, world)
        with tempfile.TemporaryDirectory() as folder:
            learner.save(Path(folder), update.step + 1)
            (Path(folder) / _COORDINATOR).write_text(json.dumps(link.snapshot))
            kept = train.Checkpoint.from_directory(folder) if rank == 0 else None
            train.report({"step": update.step, "loss": update.loss}, checkpoint=kept)

    preference_loop(
        learner,
        link.batch,
        steps=range(first, settings.config.steps),
        after_step=after_step,
        shard=(rank, world),
    )


def _own_cards(config: LearnConfig) -> list[str]:
    """Several cards by number: Ray Train shows each worker those of its neighbours too."""
    if config.tensor_parallel_size == 1:
        return []
    from ray.train.torch import get_devices

    return [str(device) for device in get_devices()]


def _shared(snapshot: Mapping[str, Any] | None, world: int) -> Mapping[str, Any]:
    """Rank 0's snapshot, on every rank."""
    held = [snapshot]
    if world > 1:
        torch.distributed.broadcast_object_list(held, src=0)
    assert held[0] is not None
    return held[0]


def _average(gradient: Tensor) -> None:
    torch.distributed.all_reduce(gradient)
    gradient /= torch.distributed.get_world_size()
