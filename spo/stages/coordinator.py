"""The coordinator: which prompts, which version, which batch. One CPU process holds it.

A plain class. Batches are handed out by step number: asked again for a step it already made, it
returns the same batch, so a learner that crashed and replays cannot shift the data. What was
dropped is counted with its reason; the history of a run is written here, one line a step.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from spo.algorithms.rewards import reward_of
from spo.config import RewardConfig, RolloutConfig, SteeringConfig
from spo.engines.base import Sampler
from spo.errors import DataError, StageError
from spo.records import (
    Batch,
    GenerateRequest,
    Prompt,
    PromptKind,
    RewardStatus,
    Rollout,
    Sampling,
    ScoredRollout,
    SteeringSpec,
)
from spo.vector import SteeringVector

VECTOR_NAME = "spo"
_KEPT_BATCHES = 2


class Scorer(Protocol):
    """What the coordinator needs of the reward models."""

    def score(self, rollouts: Sequence[Rollout]) -> list[dict[str, float]]: ...


class Coordinator:
    """Makes one batch of scored rollouts for each step.

    Args:
        prompts: training prompts; both kinds.
        rollouts: engine or pool.
        scorer: reward models.
        steering: how rollouts are steered, the same as in the learner.
        rollout: sizes and sampling.
        reward: weights.
        seed: decides the order of prompts and the sampling seeds.
        history: JSONL file of figures by step; None keeps none.
        vector_name: name to publish under; callers that share engines need names of their own.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        rollouts: Sampler,
        scorer: Scorer,
        steering: SteeringConfig,
        rollout: RolloutConfig,
        reward: RewardConfig,
        seed: int,
        history: Path | None = None,
        vector_name: str = VECTOR_NAME,
    ) -> None:
        self._harm = [prompt for prompt in prompts if prompt.kind is PromptKind.HARM]
        self._benign = [prompt for prompt in prompts if prompt.kind is PromptKind.BENIGN]
        if not self._harm or (rollout.benign_prompts and not self._benign):
            raise DataError(
                f"training needs harmful and benign prompts, got {len(self._harm)} and "
                f"{len(self._benign)}; add some or set rollout.benign_prompts=0"
            )
        self._rollouts = rollouts
        self._scorer = scorer
        self._steering = steering
        self._config = rollout
        self._reward = reward
        self._seed = seed
        self._history = history
        self._vector_name = vector_name
        self._batches: dict[int, Batch] = {}
        self._figures: dict[int, dict[str, Any]] = {}

    def batch(self, step: int, vector: SteeringVector) -> Batch:
        """Publish version `step`, sample and score; the same step gives the same batch again."""
        if step in self._batches:
            return self._batches[step]
        begin = time.monotonic()
        self._rollouts.publish(self._vector_name, vector, step)
        spec = SteeringSpec(
            vector=self._vector_name,
            version=step,
            coefficient=self._steering.coefficient,
            operator=self._steering.operator,
            positions=self._steering.positions,
        )
        prompts = self.prompts_of(step)
        rollouts = self._rollouts.generate(self._requests(step, prompts, spec))
        sampled = time.monotonic()
        for item in rollouts:
            if item.receipt is None or item.receipt.sha256 != vector.sha256:
                raise StageError(
                    f"rollout {item.request_id!r} has no receipt for vector {vector.sha256[:12]}: "
                    "the engine did not steer it. Nothing was learned from it"
                )
        scores = self._scorer.score(rollouts)
        batch = self._group(step, rollouts, scores)
        self._batches[step] = batch
        for old in sorted(self._batches)[:-_KEPT_BATCHES]:
            del self._batches[old]
        self._figures[step] = self._reward_figures(batch) | {
            "seconds": {"rollout": sampled - begin, "score": time.monotonic() - sampled}
        }
        return batch

    def prompts_of(self, step: int) -> list[Prompt]:
        """The prompts of a step: each kind cycles through its own seeded order."""
        chosen = []
        for pool, count in (
            (self._harm, self._config.harm_prompts),
            (self._benign, self._config.benign_prompts),
        ):
            for i in range(step * count, (step + 1) * count):
                epoch, position = divmod(i, len(pool))
                order = np.random.default_rng([self._seed, epoch]).permutation(len(pool))
                chosen.append(pool[order[position]])
        return chosen

    def record(self, figures: Mapping[str, Any]) -> None:
        """Join the learner's figures with those of the batch and append them to the history."""
        merged = dict(figures)
        made = self._figures.get(merged["step"], {})
        seconds = {**made.get("seconds", {}), "learn": merged.pop("learn_s")}
        merged = {**made, **merged, "seconds": seconds}
        if self._history is not None:
            with self._history.open("a") as file:
                file.write(json.dumps(merged) + "\n")

    def _requests(
        self, step: int, prompts: Sequence[Prompt], spec: SteeringSpec
    ) -> list[GenerateRequest]:
        return [
            GenerateRequest(
                request_id=f"{step}/{slot}/{prompt.prompt_id}/{sample}",
                prompt=prompt,
                sampling=Sampling(
                    max_tokens=self._config.max_tokens,
                    temperature=self._config.temperature,
                    top_p=self._config.top_p,
                    seed=(self._seed * 1_000_003 + step * 10_007 + slot * 101 + sample) % 2**31,
                ),
                steering=spec,
            )
            for slot, prompt in enumerate(prompts)
            for sample in range(self._config.group_size)
        ]

    def _group(
        self, step: int, rollouts: Sequence[Rollout], scores: Sequence[Mapping[str, float]]
    ) -> Batch:
        dropped: Counter[str] = Counter()
        groups: dict[str, list[ScoredRollout]] = {}
        for rollout, values in zip(rollouts, scores, strict=True):
            reward = reward_of(rollout, values, self._reward)
            if reward.status is not RewardStatus.SCORED:
                dropped[f"reward failed: {reward.reason}"] += 1
            elif not rollout.token_ids:
                dropped["empty answer"] += 1
            else:
                slot = "/".join(rollout.request_id.split("/")[:2])
                groups.setdefault(slot, []).append(ScoredRollout(rollout=rollout, reward=reward))
        kept = tuple(tuple(group) for group in groups.values() if len(group) >= 2)
        alone = sum(len(group) == 1 for group in groups.values())
        if alone:
            dropped["alone in its group"] += alone
        if not kept:
            raise StageError(
                f"step {step}: no group of answers could be scored ({dict(dropped)}); "
                "check the reward models and the prompts"
            )
        return Batch(step=step, groups=kept, dropped=dict(dropped))

    def _reward_figures(self, batch: Batch) -> dict[str, Any]:
        scored = [item for group in batch.groups for item in group]
        parts: dict[str, list[float]] = {}
        for item in scored:
            kind = item.rollout.prompt.kind.value
            for name, value in item.reward.parts.items():
                parts.setdefault(name, []).append(value)
                if name == "toxicity":
                    parts.setdefault(f"toxicity_{kind}", []).append(value)
        totals = [item.reward.total for item in scored if item.reward.total is not None]
        return {
            "reward": float(np.mean(totals)),
            "reward_parts": {name: float(np.mean(values)) for name, values in parts.items()},
            "rollouts": len(scored),
            "dropped": dict(batch.dropped),
        }


class CoordinatorActor:
    """Actor shell of `Coordinator`; connects to pools by name, so that it can be restarted."""

    def __init__(self, build: Callable[..., Coordinator], arguments: Mapping[str, Any]) -> None:
        self._coordinator = build(**arguments)

    def batch(self, step: int, vector: bytes) -> Batch:
        """See `Coordinator.batch`."""
        return self._coordinator.batch(step, SteeringVector.from_bytes(vector))

    def record(self, figures: Mapping[str, Any]) -> None:
        """See `Coordinator.record`."""
        self._coordinator.record(figures)
