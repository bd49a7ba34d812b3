"""The coordinator: which prompts, which version, which batch. One CPU process holds it.

A plain asyncio class. The learner pulls batch `step` with its vector after `step` updates, which
becomes the policy for everything that is started from then on. Groups of answers are admitted while
`accepted + running <= (S + step + 1) * B` (steps count from 0), so the engines work ahead of the
learner and no sample is more than S steps old. Asked again for a step, it gives the same batch: a
learner that crashed and replays cannot shift the data. What became of every answer is in the
ledger.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from spo.algorithms.objectives import is_informative
from spo.config import LearnConfig, RewardConfig, RolloutConfig, SteeringConfig
from spo.engines.base import LogprobRequest, Sampler, confirm
from spo.errors import DataError, StageError
from spo.records import (
    Batch,
    Prompt,
    PromptKind,
    RewardStatus,
    Rollout,
    ScoredRollout,
    SteeringSpec,
)
from spo.scorers.rewards import costs_of, reward_of
from spo.stage2.history import IdleClock, Recorder, Sink, open_sinks
from spo.stage2.ledger import Fate, Ledger
from spo.stage2.schedule import GroupSlot, Schedule, done_by
from spo.vector import SteeringVector

VECTOR_NAME = "spo"
_POISONED_AFTER = 2
"""A batch that this many learners did not survive is made anew from other groups."""
_Result = TypeVar("_Result")


class Scorer(Protocol):
    """What the coordinator needs of the reward models."""

    def score(self, rollouts: Sequence[Rollout]) -> list[dict[str, float]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorSettings:
    """What a coordinator needs of a run's configuration."""

    steering: SteeringConfig
    """How rollouts are steered, the same as in the learner."""
    rollout: RolloutConfig
    reward: RewardConfig
    steps: int
    """Number of steps of the run; nothing is sampled beyond."""
    informative: Callable[[Sequence[float]], bool]
    """Rewards of answers to one harmful prompt -> whether there is something to learn from."""
    seed: int = 0
    """Decides orders of prompts and sampling seeds."""
    name: str = VECTOR_NAME
    """Under which vectors are published; unique among the callers of one set of engines."""

    @classmethod
    def of(
        cls,
        *,
        steering: SteeringConfig,
        rollout: RolloutConfig,
        reward: RewardConfig,
        learn: LearnConfig,
        seed: int,
        name: str,
    ) -> CoordinatorSettings:
        """Those of a learner with this configuration."""
        return cls(
            steering=steering,
            rollout=rollout,
            reward=reward,
            steps=learn.steps,
            informative=partial(is_informative, config=learn),
            seed=seed,
            name=name,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorFiles:
    """What a coordinator writes; nothing by default."""

    history: Path | None = None
    """Figures, one JSON line a step."""
    ledger: Path | None = None
    """Fate of every answer, JSON lines."""
    rollouts: Path | None = None
    """Folder of Parquet files, one a step."""
    sinks: Sequence[Sink] = ()
    """Where figures go besides."""

    @classmethod
    def named(cls, folder: Path, name: str, loggers: Sequence[str]) -> CoordinatorFiles:
        """All of them in one folder, told from those of another coordinator by `name`."""
        return cls(
            history=folder / f"history-{name}.jsonl",
            ledger=folder / f"ledger-{name}.jsonl",
            rollouts=folder / "rollouts" / name,
            sinks=open_sinks(loggers, folder, name),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Policy:
    """What new groups are sampled with."""

    step: int
    spec: SteeringSpec
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """An accepted group."""

    items: tuple[ScoredRollout, ...]
    sampled_at: int
    """Step of the policy that sampled it."""


class Coordinator:
    """Makes one batch of scored rollouts for each step. Made by `make_coordinator`.

    Args:
        schedule: prompts by slot.
        rollouts: engine or pool; called from several threads.
        scorer: reward models; called from several threads.
        settings: slices of the configuration.
        ledger: fate of every answer.
        recorder: where figures and rollouts go.
    """

    def __init__(
        self,
        schedule: Schedule,
        rollouts: Sampler,
        scorer: Scorer,
        settings: CoordinatorSettings,
        *,
        ledger: Ledger,
        recorder: Recorder,
    ) -> None:
        self.schedule = schedule
        self.ledger = ledger
        self.recorder = recorder
        self._rollouts = rollouts
        self._scorer = scorer
        self._steering = settings.steering
        self._config = rollout = settings.rollout
        self._reward = settings.reward
        self._informative = settings.informative
        self._steps = settings.steps
        self._name = settings.name
        self._policy: _Policy | None = None
        self._next_version = 0
        self._admitted = 0
        self._places: dict[int, list[asyncio.Task[_Group | None]]] = {}
        self._batches: dict[int, asyncio.Task[Batch]] = {}
        self._handed: defaultdict[int, Counter[int]] = defaultdict(Counter)
        self._first_attempt: dict[int, int] = {}
        self._dropped: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self._seconds: defaultdict[int, defaultdict[str, float]] = defaultdict(
            lambda: defaultdict(float)
        )
        self._costs: defaultdict[int, list[Mapping[str, float]]] = defaultdict(list)
        self._opening = asyncio.Lock()
        self._clock = IdleClock()
        calls = self.schedule.places * (rollout.max_staleness + 1) * (rollout.calls_per_group + 1)
        self._threads = ThreadPoolExecutor(calls + 2, thread_name_prefix="coordinator")

    async def batch(self, step: int, vector: SteeringVector, *, rank: int = 0) -> Batch:
        """Batch `step`, the same however often it is asked for.

        Args:
            step: zero-based learner step.
            vector: the learner's vector after `step` updates.
            rank: which worker asks.

        Raises:
            StageError: too many answers could not be scored, or none could be used.
        """
        begin = time.monotonic()
        async with self._opening:
            self._handed[step][rank] += 1
            if self._handed[step][rank] > _POISONED_AFTER and step in self._batches:
                self._make_anew(step)
            if step not in self._batches:
                await self._publish(step, vector)
                self._admit(until=step + self._config.max_staleness)
                self._batches[step] = asyncio.ensure_future(self._assemble(step))
        try:
            batch = await asyncio.shield(self._batches[step])
        except Exception:  # a replay may ask again, and then gets another try
            self._batches.pop(step, None)
            self._forget(step)
            raise
        self._seconds[step].setdefault("wait_rollout", time.monotonic() - begin)
        return batch

    def record(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Commit a step: join the learner's figures with the batch's, and write both down.

        Returns:
            The state that a checkpoint must carry for `restore`.
        """
        step = int(figures["step"])
        added = {
            "seconds": {**self._seconds.pop(step, {}), "engine_idle": self.idle_seconds()},
            "ledger": self.ledger.counts(step),
            "retries": getattr(self._rollouts, "retries", 0),
        }
        if cost := costs_of(self._costs.pop(step, [])):
            added["reward_cost"] = cost
        self.ledger.commit(step)
        self.recorder.record(figures, added)
        self._batches = {known: made for known, made in self._batches.items() if known >= step}
        self._handed.pop(step - 1, None)
        return self.snapshot(step + 1)

    def idle_seconds(self) -> float:
        """Seconds since the last call in which nothing was sampled."""
        return self._clock.take()

    def snapshot(self, next_step: int) -> dict[str, Any]:
        """State at the start of a step; ids and seeds follow from it and the configuration."""
        return {
            "next_step": next_step,
            "next_version": self._next_version,
            "banned": sorted(self.schedule.banned),
            "totals": dict(self.ledger.totals),
            "recorder": self.recorder.state(),
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Continue from a snapshot. Must precede the first batch; later it changes nothing,
        because a coordinator that has outlived its learner knows more than the checkpoint."""
        if self._policy is not None:
            return
        self._next_version = int(snapshot["next_version"])
        self._admitted = int(snapshot["next_step"])
        self.schedule.banned |= set(snapshot["banned"])
        self.ledger.totals.update(snapshot["totals"])
        self.recorder.restore(snapshot["recorder"])

    async def _publish(self, step: int, vector: SteeringVector) -> None:
        held = self._policy
        if held is not None and (self._config.static or held.sha256 == vector.sha256):
            self._policy = replace(held, step=step)
            return
        # A replayed update may differ in its last bits: it is a new version, never the old number.
        version = max(step, self._next_version)
        begin = time.monotonic()
        await self._in_thread(self._rollouts.publish, self._name, vector, version)
        self._seconds[step]["publish"] = time.monotonic() - begin
        self._next_version = version + 1
        self._policy = _Policy(
            step=step,
            sha256=vector.sha256,
            spec=SteeringSpec(
                vector=self._name,
                version=version,
                coefficient=0.0 if self._config.static else self._steering.coefficient,
                operator=self._steering.operator,
                positions=self._steering.positions,
            ),
        )

    def _admit(self, until: int) -> None:
        """Start the groups of every batch up to `until` that is not started yet."""
        assert self._policy is not None
        first = max(self._admitted, self._policy.step)
        if self._policy.step not in self._places and self._policy.step < first:
            first = self._policy.step  # forgotten after a failure: its groups are made again
        for step in range(first, min(until, self._steps - 1) + 1):
            if step not in self._places:
                self._places[step] = [
                    asyncio.ensure_future(self._fill(step, place))
                    for place in range(self.schedule.places)
                ]
            self._admitted = max(self._admitted, step + 1)

    def _forget(self, step: int) -> None:
        """Drop what a failed step has started; its ids will not be used again."""
        for task in self._places.pop(step, []):
            task.cancel()
        self._first_attempt[step] = self._first_attempt.get(step, 0) + 1000

    def _make_anew(self, step: int) -> None:
        reason = f"the learner failed {_POISONED_AFTER} times on the batch of step {step}"
        self.ledger.revoke(step, reason)
        self._dropped[step].clear()
        self._dropped[step][reason] += 1
        del self._batches[step]
        self._handed[step].clear()
        self._forget(step)

    async def _fill(self, step: int, place: int) -> _Group | None:
        """A group for one place; refilled while its answers say nothing, then left out."""
        first = self._first_attempt.get(step, 0)
        for attempt in range(first, first + self._config.max_refills + 1):
            slot = self.schedule.slot(step, place, attempt)
            group, again = await self._group(slot)
            if group is not None or not again:
                return group
        return None

    async def _group(self, slot: GroupSlot) -> tuple[_Group | None, bool]:
        """One attempt: the group or None, and whether another prompt may do better."""
        policy = self._policy
        assert policy is not None
        requests = self.schedule.requests(slot, policy.spec)
        begin = time.monotonic()
        try:
            with self._clock:
                rollouts = await self._sample(requests)
        except DataError as error:
            self.schedule.banned.add(slot.prompt.prompt_id)
            ids = [request.request_id for request in requests]
            self.ledger.enter(slot.step, ids, Fate.QUARANTINED, str(error))
            self._dropped[slot.step]["prompt cannot be used"] += len(ids)
            return None, True
        sampled = time.monotonic()
        for rollout in rollouts:
            confirm(rollout.receipt, policy.spec, policy.sha256, answer=rollout.request_id)
        scores = await self._in_thread(self._scorer.score, rollouts)
        self._costs[slot.step] += scores
        spent = self._seconds[slot.step]
        spent["rollout"] += (sampled - begin) / self.schedule.places
        spent["score"] += (time.monotonic() - sampled) / self.schedule.places
        present = {rollout.request_id for rollout in rollouts}
        late = [r.request_id for r in requests if r.request_id not in present]
        self.ledger.enter(slot.step, late, Fate.TIMED_OUT)
        if late:
            self._dropped[slot.step]["timed out"] += len(late)
        return self._judge(slot, policy, rollouts, scores)

    async def _sample(self, requests: Sequence[Any]) -> list[Rollout]:
        """Answers of a group; after the deadline without those that are still missing."""
        count = min(self._config.calls_per_group, len(requests))
        calls = [
            asyncio.ensure_future(self._in_thread(self._rollouts.generate, requests[i::count]))
            for i in range(count)
        ]
        strict = self._config.max_staleness == 0
        found = await done_by(
            calls,
            deadline_s=None if strict else self._config.group_deadline_s,
            enough=self._config.min_group,
        )
        order = {request.request_id: i for i, request in enumerate(requests)}
        return sorted(found, key=lambda rollout: order[rollout.request_id])

    def _judge(
        self,
        slot: GroupSlot,
        policy: _Policy,
        rollouts: Sequence[Rollout],
        scores: Sequence[Mapping[str, float]],
    ) -> tuple[_Group | None, bool]:
        """Weigh the answers, and decide whether the group is worth learning from."""
        dropped, kept = self._dropped[slot.step], []
        failed = 0
        for rollout, values in zip(rollouts, scores, strict=True):
            reward = reward_of(rollout, values, self._reward)
            reason = ""
            if reward.status is not RewardStatus.SCORED:
                reason, failed = f"reward failed: {reward.reason}", failed + 1
            elif not rollout.token_ids:
                reason = "empty answer"
            if reason:
                dropped[reason] += 1
                self.ledger.enter(slot.step, [rollout.request_id], Fate.QUARANTINED, reason)
            else:
                kept.append(ScoredRollout(rollout=rollout, reward=reward))
        ids = [item.rollout.request_id for item in kept]
        if len(kept) < 2:
            self.ledger.enter(slot.step, ids, Fate.FILTERED)
            dropped.update({"alone in its group": 1} if ids else {})
            return None, not failed
        rewards = [item.reward.total for item in kept if item.reward.total is not None]
        if slot.prompt.kind is PromptKind.HARM and not self._informative(rewards):
            self.ledger.enter(slot.step, ids, Fate.FILTERED)
            dropped["no information"] += len(ids)
            return None, True
        self.ledger.enter(slot.step, ids, Fate.CONSUMED)
        return _Group(items=tuple(kept), sampled_at=policy.step), False

    async def _assemble(self, step: int) -> Batch:
        groups = [g for g in await asyncio.gather(*self._places[step]) if g is not None]
        self._places.pop(step)
        dropped = dict(self._dropped.pop(step, {}))
        counts = self.ledger.counts(step)
        failed = sum(n for reason, n in dropped.items() if reason.startswith("reward failed"))
        if not groups or failed > self._reward.max_failed_share * sum(counts.values()):
            raise StageError(
                f"step {step}: {failed} of {sum(counts.values())} answers have no usable score and "
                f"{len(groups)} groups are left ({dropped}); check the reward models and prompts, "
                "or raise reward.max_failed_share"
            )
        batch = Batch(
            step=step,
            groups=tuple(group.items for group in groups),
            staleness=tuple(step - group.sampled_at for group in groups),
            engine_logprobs=await self._engine_logprobs(groups, step),
            dropped=dropped,
        )
        await self._in_thread(self.recorder.batch, batch)
        return batch

    async def _engine_logprobs(self, groups: Sequence[_Group], step: int) -> dict[str, float]:
        """What engines make of some answers under the learner's own vector, for its parity gate."""
        count, policy = self._config.parity_answers, self._policy
        items = [item.rollout for group in groups for item in group.items[:1]][:count]
        if not items or policy is None or policy.step != step or self._config.static:
            return {}
        fresh = {
            r.request_id: r.logprob
            for r in items
            if r.receipt and r.receipt.sha256 == policy.sha256
        }
        if len(fresh) == len(items):
            return fresh
        requests = [
            LogprobRequest(
                request_id=f"parity/{rollout.request_id}",
                prompt=rollout.prompt,
                token_ids=rollout.token_ids,
                steering=policy.spec,
            )
            for rollout in items
        ]
        values = await self._in_thread(self._rollouts.logprobs, requests)
        return {r.request_id: sum(v) for r, v in zip(items, values, strict=True)}

    async def _in_thread(self, call: Callable[..., _Result], *arguments: Any) -> _Result:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, call, *arguments)


def make_coordinator(
    prompts: Sequence[Prompt],
    rollouts: Sampler,
    scorer: Scorer,
    settings: CoordinatorSettings,
    files: CoordinatorFiles | None = None,
) -> Coordinator:
    """The one way to a coordinator.

    Args:
        prompts: training prompts of both kinds.
        rollouts: engine or pool.
        scorer: reward models.
        settings: slices of the configuration.
        files: what it writes; None keeps nothing.
    """
    files = files or CoordinatorFiles()
    return Coordinator(
        Schedule(prompts, settings.rollout, settings.seed),
        rollouts,
        scorer,
        settings,
        ledger=Ledger(files.ledger),
        recorder=Recorder(
            settings.reward, history=files.history, rollouts=files.rollouts, sinks=files.sinks
        ),
    )
