"""Stage II learner: batches of scored rollouts in, a better steering vector out.

`VectorLearner` is a plain class: it trains the directions of a vector and nothing else. `fit` puts
it under Ray Train: the loop runs in every worker, each takes its share of the groups, one flat
gradient is averaged, and a checkpoint is reported every step, so that a crash costs one step.
Replaying a step is harmless, because batches are handed out by step number.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spo.algorithms.objectives import OBJECTIVES, Groups
from spo.config import LearnConfig, SteeringConfig
from spo.engines.plan import DifferentiableEngine, SteeringPlan, token_logprobs
from spo.errors import StageError
from spo.records import Batch, PromptKind, ScoredRollout
from spo.vector import SteeringVector

_VECTOR = "vector.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Figures of one learner step."""

    step: int
    loss: float
    kl: float
    """Mean over answer tokens of KL(steered || unsteered), nats."""
    grad_norm: float
    sequences: int
    logprob_gap: float
    """Mean |engine - learner| of per-token answer log-probability: 0 if both compute the same."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """What a sum of losses is divided by; `units` are what the objective counts."""

    answers: float
    units: float


class VectorLearner:
    """Trains steering directions on a frozen model.

    The parameter is the vector in dose units (direction / mean hidden norm of its layer), so one
    learning rate fits layers of any size; Adam moves each coordinate by `learning_rate /
    sqrt(hidden)`, so that one step changes a layer's dose by about `learning_rate`.

    Args:
        engine: gives differentiable logits.
        vector: start.
        steering: operator, positions and coefficient, the same as at rollout.
        config: objective and step sizes.
        all_reduce: averages a flat gradient over workers, in place; None with one worker.
    """

    def __init__(
        self,
        engine: DifferentiableEngine,
        vector: SteeringVector,
        *,
        steering: SteeringConfig,
        config: LearnConfig,
        all_reduce: Callable[[Tensor], None] | None = None,
    ) -> None:
        vector.check_fits(hidden_size=engine.info.hidden_size, num_layers=engine.info.num_layers)
        self._engine = engine
        self._start = vector
        self._steering = steering
        self._config = config
        self._all_reduce = all_reduce
        self._norms = vector.mean_norms.to(engine.device).unsqueeze(1)
        self._parameter = nn.Parameter(vector.directions.to(engine.device) / self._norms)
        rate = config.learning_rate / vector.hidden_size**0.5
        self._optimizer = torch.optim.Adam([self._parameter], lr=rate)

    @property
    def vector(self) -> SteeringVector:
        """The current vector."""
        return self._start.replace(directions=(self._parameter * self._norms).detach())

    def update(self, batch: Batch, *, rank: int = 0, world: int = 1) -> Update:
        """One optimiser step on a batch; with several workers, on this worker's share of groups."""
        begin = time.monotonic()
        self._optimizer.zero_grad()
        groups = batch.groups[rank::world]
        objective = OBJECTIVES[self._config.objective]
        # Counts of the whole batch over workers: the averaged gradient is then one worker's.
        units = sum(objective.units(_rewards(group), self._config) for group in batch.groups)
        scale = _Scale(
            answers=max(sum(map(len, batch.groups)), 1) / world, units=max(units, 1) / world
        )
        sums = {"loss": 0.0, "kl": 0.0, "tokens": 0.0, "gap": 0.0}
        size = max(1, self._config.micro_batch // max(map(len, groups), default=1))
        for start in range(0, len(groups), size):
            self._accumulate(groups[start : start + size], scale, sums)
        grad_norm = self._step(batch.step)
        tokens = max(sums["tokens"], 1.0)
        return Update(
            step=batch.step,
            loss=sums["loss"],
            kl=sums["kl"] / tokens,
            grad_norm=grad_norm,
            sequences=sum(map(len, groups)),
            logprob_gap=sums["gap"] / tokens,
            seconds=time.monotonic() - begin,
        )

    def _accumulate(
        self, groups: Sequence[Sequence[ScoredRollout]], scale: _Scale, sums: dict[str, float]
    ) -> None:
        scored = [item for group in groups for item in group]
        batch = self._engine.prepare(
            [item.rollout.prompt for item in scored], [item.rollout.token_ids for item in scored]
        )
        with torch.no_grad():
            reference = self._engine.answer_logits(batch)
        logits = self._engine.answer_logits(batch, self._plan())
        policy = token_logprobs(logits, batch.answer_ids, batch.answer_mask)
        base = token_logprobs(reference, batch.answer_ids, batch.answer_mask)
        kl = _token_kl(logits, reference) * batch.answer_mask
        benign = torch.tensor(
            [item.rollout.prompt.kind is PromptKind.BENIGN for item in scored],
            device=kl.device,
        )
        weights = torch.where(benign, self._config.kl_weight, self._config.kl_weight_harm)
        per_sequence = kl.sum(dim=1) / batch.answer_mask.sum(dim=1).clamp_min(1)
        tensors = _in_groups(groups, policy.sum(dim=1), base.sum(dim=1))
        objective = OBJECTIVES[self._config.objective].loss(tensors, self._config)
        loss = objective / scale.units + (weights * per_sequence).sum() / scale.answers
        if not torch.isfinite(loss):
            raise StageError(
                "the loss is not finite: expected finite log-probabilities and rewards; lower "
                "learn.learning_rate or learn.max_dose. The last checkpoint is unharmed"
            )
        loss.backward()
        engine_logprob = torch.tensor([item.rollout.logprob for item in scored])
        sums["loss"] += float(loss.detach())
        sums["kl"] += float(kl.detach().sum())
        sums["tokens"] += float(batch.answer_mask.sum())
        sums["gap"] += float((policy.detach().sum(dim=1).cpu() - engine_logprob).abs().sum())

    def _plan(self) -> SteeringPlan:
        return SteeringPlan(
            layers=self._start.layers,
            directions=self._parameter * self._norms,
            mean_norms=self._norms.squeeze(1),
            calibration=self._start.calibration.to(self._engine.device),
            operator=self._steering.operator,
            positions=self._steering.positions,
            coefficient=self._steering.coefficient,
        )

    def _step(self, step: int) -> float:
        if self._parameter.grad is None:
            if self._all_reduce is None:
                raise StageError(f"step {step} has no rollouts to learn from; see what was dropped")
            # Fewer groups than workers: this one has none, and the others wait for its share.
            self._parameter.grad = torch.zeros_like(self._parameter)
        if self._all_reduce is not None:
            self._all_reduce(self._parameter.grad)
        norm = float(nn.utils.clip_grad_norm_([self._parameter], self._config.max_grad_norm))
        self._optimizer.step()
        with torch.no_grad():
            doses = self._parameter.norm(dim=1, keepdim=True)
            self._parameter.mul_((self._config.max_dose / doses.clamp_min(1e-9)).clamp_max(1.0))
        return norm

    def save(self, folder: Path, next_step: int) -> None:
        """Write vector, optimiser and position of the loop; `restore` is the inverse."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _VECTOR).write_bytes(self.vector.to_bytes())
        state = self._optimizer.state.get(self._parameter, {})
        tensors = {name: value.detach().cpu().clone() for name, value in state.items()}
        save_file(
            {"parameter": self._parameter.detach().cpu().clone(), **tensors}, folder / _OPTIMIZER
        )
        (folder / _STATE).write_text(json.dumps({"next_step": next_step}))

    def restore(self, folder: Path) -> int:
        """Continue from a checkpoint; returns the step to run next."""
        try:
            tensors = load_file(folder / _OPTIMIZER)
            next_step = int(json.loads((folder / _STATE).read_text())["next_step"])
        except (OSError, ValueError, KeyError) as error:
            raise StageError(f"checkpoint {folder} cannot be read: {error}") from error
        parameter = tensors.pop("parameter")
        if parameter.shape != self._parameter.shape:
            raise StageError(
                f"checkpoint {folder} holds a vector of shape {tuple(parameter.shape)}, this run's "
                f"is {tuple(self._parameter.shape)}: give the run another name"
            )
        with torch.no_grad():
            self._parameter.copy_(parameter)
        if tensors:
            self._optimizer.state[self._parameter] = {
                name: value.to("cpu" if name == "step" else self._parameter.device)
                for name, value in tensors.items()
            }
        return next_step


def _token_kl(logits: Tensor, reference: Tensor) -> Tensor:
    """(batch, width) KL(steered || unsteered) over the vocabulary."""
    steered = torch.log_softmax(logits, dim=-1)
    return (steered.exp() * (steered - torch.log_softmax(reference, dim=-1))).sum(dim=-1)


def _rewards(group: Sequence[ScoredRollout]) -> list[float]:
    return [item.reward.total for item in group if item.reward.total is not None]


def _in_groups(
    groups: Sequence[Sequence[ScoredRollout]], policy: Tensor, reference: Tensor
) -> Groups:
    width = max(map(len, groups))
    index = torch.zeros(len(groups), width, dtype=torch.int64)
    mask = torch.zeros(len(groups), width, dtype=torch.bool)
    rewards = torch.zeros(len(groups), width)
    row = 0
    for i, group in enumerate(groups):
        for j, item in enumerate(group):
            if item.reward.total is None:
                raise StageError(
                    f"rollout {item.rollout.request_id!r} reached the learner without a reward "
                    f"({item.reward.reason}); the coordinator must drop and count it"
                )
            index[i, j], mask[i, j], rewards[i, j] = row, True, item.reward.total
            row += 1
    index, device = index.to(policy.device), policy.device
    return Groups(
        policy=policy[index],
        reference=reference[index],
        rewards=rewards.to(device),
        mask=mask.to(device),
    )


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


Loop = Callable[..., SteeringVector]
"""`spo.pipeline.train`, handed in so that the order of the steps stays written in one place."""


def fit(settings: TrainLoopSettings, loop: Loop, *, name: str, storage: str) -> SteeringVector:
    """Run the preference loop under Ray Train and return the trained vector.

    The same name and storage (a folder or URL that every node can write) continue an interrupted
    run at its last checkpoint.

    Raises:
        StageError: training failed; the message holds the worker's own first error.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    config = settings.config
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"settings": settings, "loop": loop},
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=config.use_gpu,
            label_selector=config.labels or None,
            # It works while the engines wait, so it asks for next to no CPU of its own.
            resources_per_worker={"CPU": 0.1}
            | ({"GPU": config.num_gpus} if config.use_gpu else {}),
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
        return SteeringVector.from_bytes((Path(folder) / _VECTOR).read_bytes())


def _worker(train_loop_config: Mapping[str, Any]) -> None:
    import ray
    from ray import train

    settings: TrainLoopSettings = train_loop_config["settings"]
    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    learner = VectorLearner(
        _open(settings),
        SteeringVector.from_bytes(settings.vector),
        steering=settings.steering,
        config=settings.config,
        all_reduce=_average if world > 1 else None,
    )
    checkpoint = train.get_checkpoint()
    first = 0
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            first = learner.restore(Path(folder))
    coordinator = ray.get_actor(settings.coordinator, namespace=settings.namespace)

    def next_batch(step: int, vector: SteeringVector) -> Batch:
        try:
            batch: Batch = ray.get(
                coordinator.batch.remote(step, vector.to_bytes()), timeout=settings.batch_timeout_s
            )
            return batch
        except ray.exceptions.GetTimeoutError as error:
            raise StageError(
                f"waited {settings.batch_timeout_s:.0f} s for the rollouts of step {step}; the "
                "engines or scorers hang: see their logs, or raise engine.request_timeout_s"
            ) from error

    def after_step(update: Update, vector: SteeringVector) -> None:
        if rank == 0:
            ray.get(
                coordinator.record.remote(_figures(update, vector, settings)),
                timeout=settings.batch_timeout_s,
            )
        with tempfile.TemporaryDirectory() as folder:
            learner.save(Path(folder), update.step + 1)
            kept = train.Checkpoint.from_directory(folder) if rank == 0 else None
            train.report({"step": update.step, "loss": update.loss}, checkpoint=kept)

    train_loop_config["loop"](
        learner,
        next_batch,
        steps=range(first, settings.config.steps),
        after_step=after_step,
        shard=(rank, world),
    )


def _open(settings: TrainLoopSettings) -> DifferentiableEngine:
    if settings.model == "fake":
        from spo.engines.fake import FakeEngine

        return FakeEngine()
    from spo.engines.hf import HfEngine

    return HfEngine(
        settings.model,
        revision=settings.revision,
        dtype=settings.config.dtype,
        device="cuda" if settings.config.use_gpu else "cpu",
    )


def _average(gradient: Tensor) -> None:
    torch.distributed.all_reduce(gradient)
    gradient /= torch.distributed.get_world_size()


def _figures(update: Update, vector: SteeringVector, settings: TrainLoopSettings) -> dict[str, Any]:
    start = SteeringVector.from_bytes(settings.vector)
    cosines = torch.nn.functional.cosine_similarity(vector.directions, start.directions, dim=1)
    return {
        "step": update.step,
        "version": update.step + 1,
        "loss": update.loss,
        "kl": update.kl,
        "grad_norm": update.grad_norm,
        "logprob_gap": update.logprob_gap,
        "doses": vector.doses.tolist(),
        "cos_to_init": cosines.tolist(),
        "learn_s": update.seconds,
    }
