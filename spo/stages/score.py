"""Reward models as Ray actors: rollouts in, raw scores out; `algorithms.rewards` weighs them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

from spo.config import RewardConfig
from spo.engines.processing import load_image
from spo.errors import ScorerError, StageError
from spo.records import PromptKind, Rollout
from spo.scorers.alignment import AlignmentScorer
from spo.scorers.toxicity import ToxicityScorer
from spo.stages.restarts import await_back

_MAX_TRIES = 3


class ScorerActor:
    """Both reward models in one process.

    Args:
        toxicity: arguments of `ToxicityScorer`.
        alignment: arguments of `AlignmentScorer`.
    """

    def __init__(self, toxicity: dict[str, Any], alignment: dict[str, Any]) -> None:
        self._toxicity = ToxicityScorer(**toxicity)
        self._alignment = AlignmentScorer(**alignment)

    def score(self, rollouts: Sequence[Rollout]) -> list[dict[str, float]]:
        """Raw scores of each rollout; alignment where the prompt is benign and has a picture."""
        scores = [
            {"toxicity": values["toxicity"]}
            for values in self._toxicity.score([rollout.text for rollout in rollouts])
        ]
        pictured = [
            i
            for i, rollout in enumerate(rollouts)
            if rollout.prompt.kind is PromptKind.BENIGN and rollout.prompt.image
        ]
        images = [load_image(str(rollouts[i].prompt.image)) for i in pictured]
        texts = [rollouts[i].text for i in pictured]
        for i, value in zip(pictured, self._alignment.score(images, texts), strict=True):
            scores[i]["alignment"] = value
        return scores

    def ready(self) -> bool:
        """Answers once both models are loaded."""
        return True


class RewardPool:
    """Sends rollouts to scorer actors, retrying on another when one is lost."""

    def __init__(self, actors: Sequence[Any], *, timeout_s: float) -> None:
        self._actors = list(actors)
        self._timeout_s = timeout_s

    @classmethod
    def start(
        cls,
        toxicity: dict[str, Any],
        alignment: dict[str, Any],
        config: RewardConfig,
        *,
        prefix: str,
    ) -> RewardPool:
        """Start the scorers as named actors and wait until their models are loaded."""
        actors = [
            ray.remote(ScorerActor)
            .options(
                name=f"{prefix}-scorer-{i}",
                num_cpus=0.5,
                max_restarts=3,
                label_selector=config.labels,
            )
            .remote(toxicity, alignment)
            for i in range(config.replicas)
        ]
        try:
            ray.get([actor.ready.remote() for actor in actors], timeout=config.timeout_s)
        except (ActorDiedError, ActorUnavailableError) as error:
            raise ScorerError(f"a reward model cannot be loaded: {error}") from error
        except GetTimeoutError as error:
            raise StageError(
                f"waited {config.timeout_s} s for {len(actors)} scorer(s) to load; free resources: "
                f"{ray.available_resources()}. Free some or raise reward.timeout_s"
            ) from error
        return cls(actors, timeout_s=config.timeout_s)

    @classmethod
    def connect(cls, prefix: str, config: RewardConfig) -> RewardPool:
        """A pool over scorers that another process of the same job started."""
        actors = [ray.get_actor(f"{prefix}-scorer-{i}") for i in range(config.replicas)]
        return cls(actors, timeout_s=config.timeout_s)

    def score(self, rollouts: Sequence[Rollout]) -> list[dict[str, float]]:
        """Raw scores in order. A value that is not finite stays in: the reward fails, visibly."""
        count = len(self._actors)
        results: list[dict[str, float]] = [{"toxicity": math.nan} for _ in rollouts]
        pending = [
            (i, self._actors[i].score.remote(rollouts[i::count]))
            for i in range(count)
            if len(rollouts) > i
        ]
        for i, reference in pending:
            share = self._finish(i, reference, rollouts[i::count])
            for position, value in zip(range(i, len(rollouts), count), share, strict=True):
                results[position] = value
        return results

    def close(self) -> None:
        """End the scorers of this pool."""
        for actor in self._actors:
            ray.kill(actor)

    def _finish(
        self, i: int, reference: Any, rollouts: Sequence[Rollout]
    ) -> list[dict[str, float]]:
        for attempt in range(1, _MAX_TRIES + 1):
            try:
                result: list[dict[str, float]] = ray.get(reference, timeout=self._timeout_s)
                return result
            except GetTimeoutError as error:
                raise StageError(
                    f"waited {self._timeout_s:.0f} s for scorer {i} on {len(rollouts)} answers; "
                    "see its log, or raise reward.timeout_s"
                ) from error
            except (ActorDiedError, ActorUnavailableError) as error:
                if attempt == _MAX_TRIES:
                    raise ScorerError(f"scorer {i} was lost {attempt} times: {error}") from error
                other = self._actors[(i + attempt) % len(self._actors)]
                await_back(
                    other.ready.remote,
                    timeout_s=self._timeout_s,
                    what="a scorer (reward.timeout_s)",
                    error_type=ScorerError,
                )
                reference = other.score.remote(rollouts)
        raise AssertionError("unreachable: the last attempt returns or raises")
