"""Reward models as Ray actors: rollouts in, raw scores out; `algorithms.rewards` weighs them."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

from spo.actors.restarts import await_back
from spo.config import RewardConfig
from spo.engines.processing import load_image
from spo.errors import ScorerError, StageError
from spo.records import PromptKind, Rollout

if TYPE_CHECKING:
    from spo.scorers.crosscheck import CrossCheck

_LOG = logging.getLogger(__name__)
_MAX_TRIES = 3


class ScorerActor:
    """All reward models in one process. Calls of several callers are scored together.

    Args:
        toxicity: arguments of `ToxicityScorer`.
        alignment: arguments of `AlignmentScorer`.
        config: batch sizes, and which cross-check.
    """

    def __init__(
        self, toxicity: dict[str, Any], alignment: dict[str, Any], config: RewardConfig
    ) -> None:
        # Here and not above: the libraries behind them take ten seconds to import.
        from spo.scorers.alignment import AlignmentScorer
        from spo.scorers.crosscheck import ProfanityCheck
        from spo.scorers.toxicity import ToxicityScorer

        self._toxicity = ToxicityScorer(**toxicity, device=config.device)
        self._alignment = AlignmentScorer(**alignment, device=config.device)
        self._crosscheck: CrossCheck | None = (
            ProfanityCheck() if config.crosscheck == "profanity" else None
        )
        self._gathered = MicroBatcher(
            self._score, max_items=config.batch_size, max_wait_s=config.batch_wait_s
        )

    def score(self, rollouts: Sequence[Rollout]) -> list[dict[str, float]]:
        """Raw scores of each rollout; alignment where the prompt is benign and has a picture.

        A rollout that a model cannot score gets NaN and does not spoil the others.
        """
        return self._gathered.call(rollouts)

    def _score(self, rollouts: Sequence[Rollout]) -> list[dict[str, float]]:
        try:
            return self._score_together(rollouts)
        except ScorerError as error:
            if len(rollouts) == 1:
                _LOG.warning("no score for %r: %s", rollouts[0].request_id, error)
                return [{"toxicity": math.nan}]
            return [self._score([rollout])[0] for rollout in rollouts]

    def _score_together(self, rollouts: Sequence[Rollout]) -> list[dict[str, float]]:
        texts = [rollout.text for rollout in rollouts]
        scores = [{"toxicity": values["toxicity"]} for values in self._toxicity.score(texts)]
        if self._crosscheck is not None:
            for values, second in zip(scores, self._crosscheck.score(texts), strict=True):
                values["crosscheck"] = second
        pictured = [
            i
            for i, rollout in enumerate(rollouts)
            if rollout.prompt.kind is PromptKind.BENIGN and rollout.prompt.image
        ]
        images = [load_image(str(rollouts[i].prompt.image)) for i in pictured]
        aligned = self._alignment.score(images, [texts[i] for i in pictured])
        for i, value in zip(pictured, aligned, strict=True):
            scores[i]["alignment"] = value
        return scores

    def ready(self) -> bool:
        """Answers once both models are loaded."""
        return True

    def process_id(self) -> int:
        """Process of the actor."""
        return os.getpid()


class MicroBatcher:
    """Joins calls of several threads into one call of a function.

    Args:
        function: takes a list of items, gives a list of results.
        max_items: largest joined call; a single call may be larger.
        max_wait_s: how long the first of them waits for more; 0 joins nothing.
    """

    def __init__(
        self,
        function: Callable[[Sequence[Any]], list[Any]],
        *,
        max_items: int,
        max_wait_s: float,
    ) -> None:
        self._function = function
        self._max_items = max_items
        self._max_wait_s = max_wait_s
        self._waiting: list[tuple[Sequence[Any], Future[list[Any]]]] = []
        self._changed = threading.Condition()
        self._turn = threading.Lock()

    def call(self, items: Sequence[Any]) -> list[Any]:
        """Results of these items, in order."""
        mine: Future[list[Any]] = Future()
        with self._changed:
            self._waiting.append((items, mine))
            self._changed.notify_all()
        with self._turn:
            while not mine.done():
                self._run(self._take())
        return mine.result()

    def _take(self) -> list[tuple[Sequence[Any], Future[list[Any]]]]:
        with self._changed:
            end = time.monotonic() + self._max_wait_s
            while sum(len(items) for items, _ in self._waiting) < self._max_items:
                if not self._changed.wait(end - time.monotonic()) or time.monotonic() >= end:
                    break
            taken = [self._waiting.pop(0)]
            size = len(taken[0][0])
            while self._max_wait_s and self._waiting:
                size += len(self._waiting[0][0])
                if size > self._max_items:
                    break
                taken.append(self._waiting.pop(0))
            return taken

    def _run(self, calls: Sequence[tuple[Sequence[Any], Future[list[Any]]]]) -> None:
        try:
            results = iter(self._function([item for items, _ in calls for item in items]))
        except Exception as error:  # noqa: BLE001 every joined caller gets it, and raises
            for _, future in calls:
                future.set_exception(error)
            return
        for items, future in calls:
            future.set_result([next(results) for _ in items])


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
        """Start the scorers as named actors; `wait_ready` waits until their models are loaded."""
        actors = [
            ray.remote(ScorerActor)
            .options(
                name=f"{prefix}-scorer-{i}",
                num_cpus=0.5,
                **config.ray_options(),
                max_restarts=3,
                max_concurrency=64,
                scheduling_strategy="DEFAULT",
            )
            .remote(toxicity, alignment, config)
            for i in range(config.replicas)
        ]
        return cls(actors, timeout_s=config.timeout_s)

    def wait_ready(self) -> None:
        """Wait until every scorer has loaded its models."""
        waiting = [actor.ready.remote() for actor in self._actors]
        try:
            ray.get(waiting, timeout=self._timeout_s)
        except (ActorDiedError, ActorUnavailableError) as error:
            raise ScorerError(f"a reward model cannot be loaded: {error}") from error
        except GetTimeoutError as error:
            raise StageError(
                f"waited {self._timeout_s:.0f} s for {len(waiting)} scorer(s) to load; free "
                f"resources: {ray.available_resources()}. Free some or raise reward.timeout_s"
            ) from error

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
