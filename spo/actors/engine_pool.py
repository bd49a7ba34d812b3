"""Rollout engines as Ray actors, and the pool that spreads requests over them.

One set of engines serves many callers at once: training, evaluation, every trial of a sweep. Each
has its own `EnginePool` over the same actors and publishes under its own vector names. A request
carries the vector and the version it wants, so an engine that was restarted and came back empty is
told again and asked again: it heals by itself. An engine that is lost or hangs costs the requests
that it held a retry elsewhere. Waits have a deadline and say what they wait for.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    RayActorError,
    RayTaskError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from spo.actors.engine_actor import CALLS, CONTROL, GROUPS, EngineActor, EngineHealth
from spo.actors.restarts import await_back
from spo.config import EngineConfig
from spo.engines.base import KEPT_VERSIONS, EngineInfo, LogprobRequest
from spo.engines.batching import grouped
from spo.errors import EngineError, StageError, SteeringError, UnpublishedError
from spo.records import GenerateRequest, Rollout
from spo.vector import SteeringVector

_MAX_TRIES = 4
_Request = TypeVar("_Request", GenerateRequest, LogprobRequest)
_Send = Callable[[Any], Any]


@dataclass(slots=True, kw_only=True, eq=False)
class _Member:
    """One engine as this pool sees it."""

    number: int
    actor: Any
    load: int = 0
    """Requests of this pool that it holds."""
    suspect: bool = False
    """Lost when last spoken to: asked again only when no other engine is free of doubt."""
    gone: str = ""
    """Why it is given up; "" while it may come back."""
    health: EngineHealth | None = None
    """Last sign of life."""
    asked: Any = None
    """Ping under way to a suspect engine."""

    def recheck(self) -> None:
        """Clear the suspicion once the engine answers again; does not wait."""
        if not self.suspect or self.gone:
            return
        if self.asked is None:
            self.asked = _ping(self.actor)
        if not ray.wait([self.asked], timeout=0)[0]:
            return
        answer, self.asked = self.asked, None
        try:
            ray.get(answer)
            self.suspect = False
        except ActorDiedError as error:
            self.gone = str(error)
        except RayActorError:
            return  # still restarting; the next look asks again


class _Lost(Exception):
    """An engine was lost during a call; its requests go elsewhere."""


class EnginePool:
    """Spreads requests over engine actors; implements `spo.engines.base.Sampler`. Thread-safe.

    Args:
        actors: handles of `EngineActor`s.
        config: timeouts, and how many engines may be lost.
    """

    def __init__(self, actors: Sequence[Any], config: EngineConfig) -> None:
        if not actors:
            raise StageError("an engine pool needs at least one engine, got none")
        self._members = [_Member(number=i, actor=actor) for i, actor in enumerate(actors)]
        self._config = config
        self._published: dict[tuple[str, int], bytes] = {}
        self._info: EngineInfo | None = None
        self._lock = threading.Lock()
        self.retries = 0
        """Calls that had to be repeated because an engine was lost."""

    @classmethod
    def start(
        cls, model: str, revision: str | None, config: EngineConfig, *, prefix: str, seed: int
    ) -> EnginePool:
        """Start the configured replicas as named actors and wait until each model is loaded."""
        remote = ray.remote(concurrency_groups=GROUPS)(EngineActor)
        actors = [
            remote.options(
                name=f"{prefix}-engine-{i}",
                num_cpus=1,
                **config.ray_options(),
                max_restarts=config.max_restarts,
                max_task_retries=0,
                # Not inside the placement group of a sweep's trial, which holds its learner alone.
                scheduling_strategy="DEFAULT",
            ).remote(model, revision, config, seed + i)
            for i in range(config.replicas)
        ]
        pool = cls(actors, config)
        pool.wait_ready()
        return pool

    @classmethod
    def connect(cls, prefix: str, config: EngineConfig) -> EnginePool:
        """A pool over engines that another process of the same job started."""
        return cls([ray.get_actor(f"{prefix}-engine-{i}") for i in range(config.replicas)], config)

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            self._info = self._ask(
                lambda actor: actor.info.options(concurrency_group=CONTROL).remote(),
                what="what model it holds",
            )
        return self._info

    def wait_ready(self) -> None:
        """Wait for every engine to load its model."""
        timeout_s = self._config.start_timeout_s
        waiting = [m.actor.info.options(concurrency_group=CONTROL).remote() for m in self._members]
        try:
            ray.get(waiting, timeout=timeout_s)
        except GetTimeoutError as error:
            raise StageError(
                f"waited {timeout_s:.0f} s for {len(waiting)} engine(s) to load the model; "
                f"cluster resources: {ray.cluster_resources()}, free: {ray.available_resources()}. "
                "Free resources, lower engine.replicas, or raise engine.start_timeout_s"
            ) from error
        except RayActorError as error:
            raise EngineError(f"an engine died while it started: {error}") from error

    def health(self) -> dict[int, EngineHealth | str]:
        """By engine: its sign of life, or why there is none."""
        found: dict[int, EngineHealth | str] = {}
        for member in self._members:
            if member.gone:
                found[member.number] = member.gone
                continue
            try:
                member.health = ray.get(_ping(member.actor), timeout=self._config.probe_interval_s)
                # Alive: from now on its silence means that it hangs, not that it starts.
                member.suspect, member.asked = False, None
                found[member.number] = member.health
            except (RayActorError, GetTimeoutError) as error:
                found[member.number] = f"no sign of life: {error}"
        return found

    def publish(self, name: str, vector: SteeringVector, version: int) -> str:
        """Install a vector on every engine; SteeringError unless those that answer hold it.

        An engine that is lost or restarting is not waited for: it learns the vector with the first
        request that names it.
        """
        data = vector.to_bytes()
        with self._lock:
            self._published[(name, version)] = data
            own = sorted(key for key in self._published if key[0] == name)
            for old in own[:-KEPT_VERSIONS]:
                del self._published[old]
        self._publish_to([m for m in self._members if not m.gone], name, version)
        return vector.sha256

    def retire(self, name: str, version: int | None = None) -> None:
        """Drop versions of a vector everywhere; an engine that does not hold them has none."""
        with self._lock:
            for key in [k for k in self._published if k[0] == name and version in (None, k[1])]:
                del self._published[key]
        sent = [
            m.actor.retire.options(concurrency_group=CALLS).remote(name, version)
            for m in self._members
            if not m.gone
        ]
        for reference in sent:
            with suppress(UnpublishedError, RayActorError):
                ray.get(reference, timeout=self._config.request_timeout_s)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Rollout]:
        """Answers in the order of the requests; those of one prompt stay on one engine."""
        return self._spread(
            requests,
            lambda share: (
                lambda actor: actor.generate.options(concurrency_group=CALLS).remote(share)
            ),
        )

    def logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float]]:
        """See `Engine.logprobs`."""
        return self._spread(
            requests,
            lambda share: (
                lambda actor: actor.logprobs.options(concurrency_group=CALLS).remote(share)
            ),
        )

    def close(self) -> None:
        """End the engines of this pool."""
        for member in self._members:
            # An engine that is already gone cannot be closed; ray.kill ends it for certain.
            with suppress(RayActorError, GetTimeoutError, RayTaskError):
                ray.get(member.actor.close.options(concurrency_group=CONTROL).remote(), timeout=30)
            ray.kill(member.actor)

    def _spread(
        self, requests: Sequence[_Request], call: Callable[[list[_Request]], _Send]
    ) -> list[Any]:
        shares: dict[int, list[int]] = {}
        with self._lock:
            for _, places in grouped(requests, lambda request: request.prompt):
                member = min(self._usable(), key=lambda m: (m.suspect, m.load))
                member.load += len(places)
                shares.setdefault(member.number, []).extend(places)
        results: list[Any] = [None] * len(requests)
        sent: list[tuple[_Member, list[int], _Send, Any]] = []
        for number, places in shares.items():
            member, send = self._members[number], call([requests[i] for i in places])
            sent.append((member, places, send, None if member.suspect else send(member.actor)))
        try:
            for member, places, send, reference in sent:
                wanted = {(s.vector, s.version) for i in places if (s := requests[i].steering)}
                answers = self._finish(member, send, reference, wanted)
                for place, answer in zip(places, answers, strict=True):
                    results[place] = answer
        finally:
            with self._lock:
                for member, places, _, _ in sent:
                    member.load -= len(places)
        return results

    def _ask(self, send: _Send, *, what: str) -> Any:
        with self._lock:
            member = min(self._usable(), key=lambda m: (m.suspect, m.load))
        return self._finish(member, send, None, set(), what=what)

    def _finish(
        self,
        member: _Member,
        send: _Send,
        reference: Any,
        wanted: set[tuple[str, int]],
        *,
        what: str = "its answers",
    ) -> Any:
        """Result of a call, by whichever engine gives one."""
        first: BaseException | None = None
        for _ in range(_MAX_TRIES):
            try:
                if reference is None:
                    self._revive(member)
                    reference = send(member.actor)
                return self._await(member, reference, what)
            except UnpublishedError as error:
                self._heal(member, wanted, error)
                first = first or error
            except (_Lost, RayActorError) as error:
                member.suspect = True
                first = first or error
                with self._lock:
                    self.retries += 1
                    member = min(self._usable(first), key=lambda m: (m.suspect, m.load))
            reference = None
        raise EngineError(f"engines failed {_MAX_TRIES} times in a row, first: {first}") from first

    def _usable(self, cause: BaseException | None = None) -> list[_Member]:
        for member in self._members:
            member.recheck()
        usable = [member for member in self._members if not member.gone]
        if len(usable) < self._config.min_engines:
            lost = {member.number: member.gone for member in self._members if member.gone}
            raise EngineError(
                f"{len(usable)} of {len(self._members)} engines are left, engine.min_engines="
                f"{self._config.min_engines} are needed; lost: {lost}. First cause: {cause}; "
                "the engines' logs have more"
            ) from cause
        return usable

    def _revive(self, member: _Member) -> None:
        """Wait for an engine that was lost to be back, or give it up."""
        if not member.suspect:
            return
        try:
            await_back(
                lambda: _ping(member.actor),
                timeout_s=self._config.start_timeout_s,
                what=f"engine {member.number} (engine.start_timeout_s)",
                error_type=EngineError,
            )
        except EngineError as error:
            member.gone = str(error)
            raise _Lost(str(error)) from error
        member.suspect, member.asked = False, None

    def _await(self, member: _Member, reference: Any, what: str) -> Any:
        """A call's result; an engine that gives no sign of life, or is too slow, is restarted."""
        interval = self._config.probe_interval_s
        end = time.monotonic() + self._config.request_timeout_s
        while True:
            ready, _ = ray.wait(
                [reference], timeout=min(interval, max(0.0, end - time.monotonic()))
            )
            if ready:
                return ray.get(reference)
            late = time.monotonic() >= end
            if late:
                reason = f"waited {self._config.request_timeout_s:.0f} s for {what}"
            else:
                try:
                    member.health = ray.get(_ping(member.actor), timeout=2 * interval)
                    continue
                except GetTimeoutError:
                    reason = f"no sign of life for {3 * interval:.0f} s"
            _restart(member)
            raise _Lost(
                f"engine {member.number} hangs ({reason}) and was restarted; if it is only slow, "
                "raise engine.request_timeout_s"
            )

    def _heal(self, member: _Member, wanted: set[tuple[str, int]], error: UnpublishedError) -> None:
        with self._lock:
            known = all(key in self._published for key in wanted)
        if not known or not wanted:
            raise error
        for name, version in sorted(wanted):
            self._publish_to([member], name, version)

    def _publish_to(self, members: Sequence[_Member], name: str, version: int) -> None:
        with self._lock:
            data = self._published.get((name, version))
        if data is None:
            return  # retired meanwhile: the request itself says so
        sent = [
            (m, m.actor.publish.options(concurrency_group=CALLS).remote(name, data, version))
            for m in members
        ]
        wanted = SteeringVector.from_bytes(data).sha256
        for member, reference in sent:
            try:
                held = self._await(member, reference, f"vector {name!r}")
            except (_Lost, ActorDiedError, ActorUnavailableError):
                member.suspect = True
                continue
            if held != wanted:
                raise SteeringError(
                    f"vector {name!r} version {version} is {wanted[:12]} and engine "
                    f"{member.number} confirmed {held[:12]}; nothing is generated with it"
                )


def _restart(member: _Member) -> None:
    """End a hung engine so that Ray starts it anew; a frozen process does not obey Ray alone."""
    ray.kill(member.actor, no_restart=False)
    if member.health is not None:
        strategy = NodeAffinitySchedulingStrategy(node_id=member.health.node_id, soft=False)
        end = ray.remote(num_cpus=0, max_retries=0)(_end_process)
        # Not waited for: the node may be what is lost.
        end.options(scheduling_strategy=strategy).remote(member.health.process_id)
        member.health = None


def _end_process(process_id: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process_id, signal.SIGKILL)


def _ping(actor: Any) -> Any:
    return actor.health.options(concurrency_group=CONTROL).remote()
