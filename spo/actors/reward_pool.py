"""Reward models as Ray actors: rollouts in, raw scores out; `spo.scorers.rewards` weighs them."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

from spo.actors.restarts import await_back
from spo.config import RewardConfig
from spo.config.rewards import CROSSCHECK, AnyRewardPart
from spo.engines.processing import load_image
from spo.errors import ScorerError, StageError
from spo.records import Rollout
from spo.scorers.rewards import PartScorer, Place, Scored, kind_of, raw_scores

if TYPE_CHECKING:
    from spo.scorers.crosscheck import CrossCheck

_LOG = logging.getLogger(__name__)
_MAX_TRIES = 3
_CALLS = 64
"""Calls of one scorer that are under way at once."""
_PATIENCE = 0.9
"""Share of a call's time after which answers over a network are waited for no longer."""


class ScorerActor:
    """All reward models in one process. Calls of several callers are scored together.

    Args:
        parts: of the reward, with models as places or hub ids.
        config: batch sizes, and which cross-check.
    """

    def __init__(self, parts: Sequence[AnyRewardPart], config: RewardConfig) -> None:
        place = Place(device=config.device, load_picture=load_image)
        self._here: list[tuple[AnyRewardPart, PartScorer]] = []
        self._remote: list[tuple[AnyRewardPart, PartScorer]] = []
        for part in parts:
            kind = kind_of(part)
            if part.needs_model and kind.open is not None:
                (self._remote if kind.remote else self._here).append((part, kind.open(part, place)))
        self._crosscheck: CrossCheck | None = None
        if config.crosscheck == "profanity":
            # Here and not above: the libraries behind scorers take ten seconds to import.
            from spo.scorers.crosscheck import ProfanityCheck

            self._crosscheck = ProfanityCheck()
        self._gathered = MicroBatcher(
            self._score, max_items=config.batch_size, max_wait_s=config.batch_wait_s
        )
        self._asking = ThreadPoolExecutor(_CALLS, thread_name_prefix="remote-rewards")
        self._patience_s = _PATIENCE * config.timeout_s

    def score(self, rollouts: Sequence[Rollout]) -> list[dict[str, float]]:
        """Raw scores of each rollout by name of part, where the part counts on the prompt.

        A rollout that a part cannot score gets NaN there and does not spoil the others. Parts over
        a network are asked meanwhile; what has not come in time is NaN too.
        """
        end = time.monotonic() + self._patience_s
        asked = [
            (part, self._asking.submit(_measure, part, scorer, rollouts))
            for part, scorer in self._remote
        ]
        scores = self._gathered.call(rollouts) if self._here or self._crosscheck else []
        scores = scores or [{} for _ in rollouts]
        for part, answer in asked:
            try:
                found = answer.result(timeout=max(end - time.monotonic(), 0.0))
            except TimeoutError:
                _LOG.warning("no score of %r: none in %.0f s", part.name, self._patience_s)
                found = _unscored(part, rollouts)
            for values, more in zip(scores, found, strict=True):
                values.update(more)
        return scores

    def _score(self, rollouts: Sequence[Rollout]) -> list[dict[str, float]]:
        scores: list[dict[str, float]] = [{} for _ in rollouts]
        for part, scorer in self._here:
            for values, more in zip(scores, _measure(part, scorer, rollouts), strict=True):
                values.update(more)
        if self._crosscheck is not None:
            texts = [rollout.text for rollout in rollouts]
            for values, second in zip(scores, self._crosscheck.score(texts), strict=True):
                values[CROSSCHECK] = second
        return scores

    def ready(self) -> bool:
        """Answers once both models are loaded."""
        return True

    def process_id(self) -> int:
        """Process of the actor."""
        return os.getpid()


def _measure(
    part: AnyRewardPart, scorer: PartScorer, rollouts: Sequence[Rollout]
) -> list[dict[str, float]]:
    """One part's raw scores; {} where it does not count, NaN where it has none."""
    scores: list[dict[str, float]] = [{} for _ in rollouts]
    counted = [i for i, rollout in enumerate(rollouts) if part.counts_on(rollout.prompt)]
    if not counted:
        return scores
    for i, scored in zip(
        counted, _scored(part, scorer, [rollouts[i] for i in counted]), strict=True
    ):
        if scored.reason:
            _LOG.warning("no %s of %r: %s", part.name, rollouts[i].request_id, scored.reason)
        scores[i] = raw_scores(part, scored)
    return scores


def _scored(part: AnyRewardPart, scorer: PartScorer, rollouts: Sequence[Rollout]) -> list[Scored]:
    try:
        return scorer.score(rollouts)
    except ScorerError as error:
        if len(rollouts) == 1:
            return [Scored(value=math.nan, reason=str(error))]
        return [_scored(part, scorer, [rollout])[0] for rollout in rollouts]


def _unscored(part: AnyRewardPart, rollouts: Sequence[Rollout]) -> list[dict[str, float]]:
    return [{part.name: math.nan} if part.counts_on(r.prompt) else {} for r in rollouts]


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
        parts: Sequence[AnyRewardPart],
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
                max_concurrency=_CALLS,
                scheduling_strategy="DEFAULT",
            )
            .remote(list(parts), config)
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
        results: list[dict[str, float]] = [{} for _ in rollouts]
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
