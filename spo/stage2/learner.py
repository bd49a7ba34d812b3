"""The learner: a batch of scored rollouts in, a better steering vector out. No Ray.

Trains a vector and nothing else: its directions, or each layer's strength, or the offsets of its
gates, on a frozen model. Everything that crosses workers is one flat tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spo.algorithms.objectives import Groups, Objective, objective_of
from spo.config import LearnConfig, SteeringConfig
from spo.engines.batching import made_ahead
from spo.engines.forward import AnswerScores, DifferentiableEngine, SteeringPlan, TokenBatch
from spo.errors import StageError
from spo.records import Batch, Operator, PromptKind, ScoredRollout
from spo.vector import SteeringVector

VECTOR_FILE = "vector.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"

_MOST_REFUSED = 8
"""Moves in a row that may be taken back before training ends with an error."""

_Part = Sequence[Sequence[ScoredRollout]]
"""Groups that are computed together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Figures of one learner step."""

    step: int
    loss: float
    kl: float
    """Mean over answer tokens of KL(steered || unsteered), nats."""
    kl_benign: float
    """The same on benign prompts: what steering costs where nothing is wrong."""
    grad_norm: float
    sequences: int
    logprob_gap: float
    """Mean |engine - learner| of a token's log-probability under this vector: 0 if they agree."""
    ratio: float
    """Mean likelihood ratio of the answers, current vector to the one that sampled them."""
    learning_rate: float
    rejected: bool
    """Whether the step was not taken, because KL on benign prompts was over its cap."""
    seconds: float
    alarms: tuple[str, ...] = ()


def step_figures(update: Update, vector: SteeringVector, start: SteeringVector) -> dict[str, Any]:
    """What a learner tells its coordinator about a step.

    Args:
        update: the step.
        vector: the vector after it.
        start: the vector before the first step.
    """
    cosines = torch.nn.functional.cosine_similarity(vector.directions, start.directions, dim=1)
    figures = asdict(update)
    return {
        **figures,
        "version": update.step + 1,
        "alarms": list(update.alarms),
        "doses": vector.doses.tolist(),
        "cos_to_init": cosines.tolist(),
        "learn_s": figures.pop("seconds"),
    }


@dataclass(slots=True, kw_only=True)
class _Sums:
    """Sums over one worker's share of a batch."""

    loss: float = 0.0
    kl: float = 0.0
    tokens: float = 0.0
    benign_kl: float = 0.0
    benign_tokens: float = 0.0
    gap: float = 0.0
    gap_tokens: float = 0.0
    ratio: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """What a sum of losses is divided by; `units` are what the objective counts."""

    answers: float
    units: float


@dataclass(slots=True, kw_only=True)
class _KlGuard:
    """Takes back moves that cost too much on benign prompts, and never locks.

    A vector is refused when its KL is over the bound *and* over that of the vector it came from, so
    a start above the bound may come down. The vector that was gone back to is not asked again.
    """

    max_kl: float
    kept: float | None = None
    """KL, nats a token, of the last vector that was kept."""
    went_back: bool = False
    """The current vector is the kept one: the move before was refused."""
    refused: int = 0
    """Moves refused in a row."""

    def refuses(self, kl: float) -> bool:
        """Whether the current vector, of this KL, is refused.

        Raises:
            StageError: too many moves in a row were.
        """
        if self.kept is None or self.went_back or kl <= max(self.max_kl, self.kept):
            if not self.went_back:
                self.refused = 0
            self.kept, self.went_back = kl, False
            return False
        self.went_back = True
        self.refused += 1
        if self.refused >= _MOST_REFUSED:
            raise StageError(
                f"{self.refused} steps in a row were taken back: KL {kl:.3g} on benign prompts is "
                f"over learn.max_kl={self.max_kl:g} and over the {self.kept:.3g} before; begin "
                "with a weaker steering.coefficient, or raise learn.kl_weight or learn.max_kl"
            )
        return True

    def state(self) -> dict[str, float | bool | int | None]:
        """For a checkpoint; `restore` is the inverse."""
        return {"kept": self.kept, "went_back": self.went_back, "refused": self.refused}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.kept = state.get("kept")
        self.went_back = bool(state.get("went_back", False))
        self.refused = int(state.get("refused", 0))


class VectorLearner:
    """Trains a steering vector on a frozen model.

    Directions are learned in dose units (direction / mean hidden norm of the layer), so one rate
    fits layers of any size; Adam moves each coordinate by `learning_rate / sqrt(hidden)`, a layer's
    dose by about `learning_rate`. A strength is the logarithm of a factor on its layer's direction;
    a gate is the calibration activation, in the same units.

    Args:
        engine: scores answers with gradients.
        vector: start.
        steering: operator, positions and coefficient, the same as at rollout.
        config: objective and step sizes.
        all_reduce: averages a flat tensor over workers, in place; None with one worker.
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
        self._objective: Objective = objective_of(config)
        self._all_reduce = all_reduce
        self._norms = vector.mean_norms.to(engine.device).unsqueeze(1)
        width = vector.hidden_size**0.5
        made = {
            "directions": (vector.directions.to(engine.device) / self._norms, width),
            "coefficients": (torch.zeros_like(self._norms), 1.0),
            "gates": (vector.calibration.to(engine.device) / self._norms, width),
        }
        self._tensors = {
            name: nn.Parameter(value.clone(), requires_grad=name in config.train)
            for name, (value, _) in made.items()
        }
        self._trained = [self._tensors[name] for name in config.train]
        self._optimizer = torch.optim.Adam(
            [
                {"params": [self._tensors[name]], "lr": config.learning_rate / made[name][1]}
                for name in config.train
            ]
        )
        self._safe: dict[str, Tensor] = {}
        self._guard = _KlGuard(max_kl=config.max_kl)

    @property
    def vector(self) -> SteeringVector:
        """The current vector."""
        return self._start.replace(
            directions=self._directions().detach(),
            calibration=(self._tensors["gates"] * self._norms).detach()
            if "gates" in self._config.train
            else self._start.calibration,
        )

    def _directions(self) -> Tensor:
        return self._tensors["directions"] * self._tensors["coefficients"].exp() * self._norms

    def update(self, batch: Batch, *, rank: int = 0, world: int = 1) -> Update:
        """One optimiser step on a batch; with several workers, on this worker's share of groups."""
        begin = time.monotonic()
        self._optimizer.zero_grad()
        groups = batch.groups[rank::world]
        # Counts of the whole batch over workers: the averaged gradient is then one worker's.
        units = sum(self._objective.units(_rewards(group), self._config) for group in batch.groups)
        scale = _Scale(
            answers=max(sum(map(len, batch.groups)), 1) / world, units=max(units, 1) / world
        )
        sums = _Sums()
        size = max(1, self._config.micro_batch // max(map(len, groups), default=1))
        parts = [groups[start : start + size] for start in range(0, len(groups), size)]
        for part, tokens in made_ahead(parts, self._tokens):
            self._accumulate(part, tokens, scale, sums, batch)
        benign = self._reduce(batch.step, sums, world)
        rejected = self._guard.refuses(benign)
        share = self._config.rate_share(batch.step)
        grad_norm = self._go_back() if rejected else self._step(share)
        gap = sums.gap / max(sums.gap_tokens, 1.0)
        return Update(
            step=batch.step,
            loss=sums.loss,
            kl=sums.kl / max(sums.tokens, 1.0),
            kl_benign=benign,
            grad_norm=grad_norm,
            sequences=sum(map(len, groups)),
            logprob_gap=gap,
            ratio=sums.ratio / max(sum(map(len, groups)), 1),
            learning_rate=share * self._optimizer.param_groups[0]["lr"],
            rejected=rejected,
            seconds=time.monotonic() - begin,
            alarms=self._alarms(gap, benign, rejected),
        )

    def _alarms(self, gap: float, benign: float, rejected: bool) -> tuple[str, ...]:
        alarms = []
        if gap > self._config.parity_bound:
            alarms.append(
                f"parity: engine and learner differ by {gap:.3g} nats a token, over "
                f"learn.parity_bound={self._config.parity_bound:g}: other model, tokens or steering"
            )
        if rejected:
            alarms.append(
                f"divergence: KL {benign:.3g} on benign prompts is over learn.max_kl="
                f"{self._config.max_kl:g}; went back one step and halved the learning rate"
            )
        return tuple(alarms)

    def _tokens(self, part: _Part) -> TokenBatch:
        asked = [item.rollout for group in part for item in group]
        return self._engine.prepare([r.prompt for r in asked], [r.token_ids for r in asked])

    def _accumulate(
        self,
        groups: _Part,
        batch: TokenBatch,
        scale: _Scale,
        sums: _Sums,
        whole: Batch,
    ) -> None:
        scored = [item for group in groups for item in group]
        sign = _sign(whole.step) if self._objective.random_sign else 1.0
        plans = [self._plan(sign)] + ([self._null_plan()] if self._objective.nulled else [])
        scores = self._engine.answer_scores(
            batch,
            plans,
            chunk_tokens=self._config.chunk_tokens,
            cache_prefix=self._config.cache_prefix,
        )
        lengths = batch.answer_mask.sum(dim=1)
        kinds = [item.rollout.prompt.kind is PromptKind.BENIGN for item in scored]
        benign = torch.tensor(kinds, device=lengths.device)
        weights = torch.where(benign, self._config.kl_weight, self._config.kl_weight_harm)
        kl = scores[0].kl.sum(dim=1)
        objective = self._objective.loss(
            _in_groups(groups, scores, lengths, sign=sign), self._config
        )
        loss = objective / scale.units + (weights * kl / lengths.clamp_min(1)).sum() / scale.answers
        if not torch.isfinite(loss):
            raise StageError(
                "the loss is not finite: expected finite log-probabilities and rewards; lower "
                "learn.learning_rate or learn.max_dose. The last checkpoint is unharmed"
            )
        loss.backward()
        self._count(sums, scored, scores[0].policy.detach().sum(dim=1).cpu(), whole, sign)
        sums.loss += float(loss.detach())
        sums.kl += float(kl.detach().sum())
        sums.tokens += float(lengths.sum())
        sums.benign_kl += float(kl.detach()[benign].sum())
        sums.benign_tokens += float(lengths[benign].sum())

    @staticmethod
    def _count(
        sums: _Sums, scored: Sequence[ScoredRollout], policy: Tensor, whole: Batch, sign: float
    ) -> None:
        for item, value in zip(scored, policy.tolist(), strict=True):
            sums.ratio += math.exp(min(max(value - item.rollout.logprob, -20.0), 20.0))
            engine = whole.engine_logprobs.get(item.rollout.request_id)
            if engine is not None and sign > 0:
                sums.gap += abs(value - engine)
                sums.gap_tokens += len(item.rollout.token_ids)

    def _plan(self, sign: float = 1.0) -> SteeringPlan:
        return SteeringPlan(
            layers=self._start.layers,
            directions=self._directions(),
            mean_norms=self._norms.squeeze(1),
            calibration=self._tensors["gates"] * self._norms,
            operator=self._steering.operator,
            positions=self._steering.positions,
            coefficient=sign * self._steering.coefficient,
        )

    def _null_plan(self) -> SteeringPlan:
        """What steering adds (away from harm) is taken out: RePS's h - relu(h.u) u, u = -v/|v|."""
        return SteeringPlan(
            layers=self._start.layers,
            directions=-self._directions(),
            mean_norms=self._norms.squeeze(1),
            calibration=torch.zeros_like(self._tensors["gates"]),
            operator=Operator.CLAMP,
            positions=self._steering.positions,
            coefficient=1.0,
        )

    def _reduce(self, step: int, sums: _Sums, world: int) -> float:
        """Average the gradients over workers; returns KL per token on all benign answers."""
        if self._all_reduce is None:
            if all(tensor.grad is None for tensor in self._trained):
                raise StageError(f"step {step} has no rollouts to learn from; see what was dropped")
            return sums.benign_kl / max(sums.benign_tokens, 1.0)
        # Fewer groups than workers: this one has none, and the others wait for its share.
        gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in self._trained]
        extra = torch.tensor([sums.benign_kl, sums.benign_tokens], device=gradients[0].device)
        flat = torch.cat([*(g.flatten() for g in gradients), extra * world])
        self._all_reduce(flat)
        start = 0
        for tensor in self._trained:
            tensor.grad = flat[start : start + tensor.numel()].view_as(tensor).clone()
            start += tensor.numel()
        return float(flat[start] / flat[start + 1].clamp_min(1.0))

    def _step(self, share: float) -> float:
        norm = float(nn.utils.clip_grad_norm_(self._trained, self._config.max_grad_norm))
        self._safe = {name: tensor.detach().clone() for name, tensor in self._tensors.items()}
        self._optimizer.step()
        with torch.no_grad():
            for name in self._config.train:  # an Adam step is linear in its rate
                self._tensors[name].lerp_(self._safe[name], 1.0 - share)
            doses = (self._directions() / self._norms).norm(dim=1, keepdim=True)
            cap = (self._config.max_dose / doses.clamp_min(1e-9)).clamp_max(1.0)
            self._tensors["directions"].mul_(cap)
        return norm

    def _go_back(self) -> float:
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(self._safe[name])
        for group in self._optimizer.param_groups:
            group["lr"] /= 2
        return 0.0

    def save(self, folder: Path, next_step: int) -> None:
        """Write vector, optimiser and position of the loop; `restore` is the inverse."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / VECTOR_FILE).write_bytes(self.vector.to_bytes())
        tensors = {name: tensor.detach() for name, tensor in self._tensors.items()}
        tensors |= {f"safe.{name}": tensor for name, tensor in self._safe.items()}
        for name in self._config.train:
            state = self._optimizer.state.get(self._tensors[name], {})
            tensors |= {f"adam.{name}.{key}": value for key, value in state.items()}
        save_file(
            {name: tensor.cpu().clone() for name, tensor in tensors.items()}, folder / _OPTIMIZER
        )
        rates = [group["lr"] for group in self._optimizer.param_groups]
        state = {"next_step": next_step, "rates": rates, "guard": self._guard.state()}
        (folder / _STATE).write_text(json.dumps(state))

    def restore(self, folder: Path) -> int:
        """Continue from a checkpoint; returns the step to run next."""
        try:
            tensors = load_file(folder / _OPTIMIZER)
            state = json.loads((folder / _STATE).read_text())
            next_step, rates = int(state["next_step"]), list(state["rates"])
            saved = {name: tensors[name] for name in self._tensors}
        except (OSError, ValueError, KeyError) as error:
            raise StageError(f"checkpoint {folder} cannot be read: {error}") from error
        device = self._norms.device
        for name, tensor in self._tensors.items():
            if saved[name].shape != tensor.shape:
                raise StageError(
                    f"checkpoint {folder} holds {name} of shape {tuple(saved[name].shape)}, this "
                    f"run's are {tuple(tensor.shape)}: give the run another name"
                )
            with torch.no_grad():
                tensor.copy_(saved[name])
            prefix = f"adam.{name}."
            adam = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if adam:
                self._optimizer.state[tensor] = {
                    key: value if key == "step" else value.to(device) for key, value in adam.items()
                }
        self._safe = {
            name: tensors[f"safe.{name}"].to(device)
            for name in self._tensors
            if f"safe.{name}" in tensors
        }
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        # Checkpoints of earlier versions have no guard: the next vector counts as kept.
        self._guard.restore(state.get("guard", {}))
        return next_step


def _sign(step: int) -> float:
    """The random sign of a step: the same on every worker and after a resume."""
    return 1.0 if hashlib.sha256(f"sign {step}".encode()).digest()[0] % 2 else -1.0


def _rewards(group: Sequence[ScoredRollout]) -> list[float]:
    return [item.reward.total for item in group if item.reward.total is not None]


def _in_groups(
    groups: Sequence[Sequence[ScoredRollout]],
    scores: Sequence[AnswerScores],
    lengths: Tensor,
    *,
    sign: float,
) -> Groups:
    width = max(map(len, groups))
    index = torch.zeros(len(groups), width, dtype=torch.int64)
    mask = torch.zeros(len(groups), width, dtype=torch.bool)
    rewards, behaviour = torch.zeros(len(groups), width), torch.zeros(len(groups), width)
    row = 0
    for i, group in enumerate(groups):
        for j, item in enumerate(group):
            if item.reward.total is None:
                raise StageError(
                    f"rollout {item.rollout.request_id!r} reached the learner without a reward "
                    f"({item.reward.reason}); the coordinator must drop and count it"
                )
            index[i, j], mask[i, j], rewards[i, j] = row, True, item.reward.total
            behaviour[i, j] = item.rollout.logprob
            row += 1
    index = index.to(lengths.device)
    return Groups(
        policy=scores[0].policy.sum(dim=1)[index],
        reference=scores[0].reference.sum(dim=1)[index],
        behaviour=behaviour.to(index.device),
        lengths=lengths[index],
        rewards=rewards.to(index.device),
        mask=mask.to(index.device),
        sign=sign,
        nulled=scores[1].policy.sum(dim=1)[index] if len(scores) > 1 else None,
    )
