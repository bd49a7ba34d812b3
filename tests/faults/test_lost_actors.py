"""Engines that die on a real Ray cluster: the pool waits, republishes, and asks again."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from spo.actors.engine_actor import EngineHealth
from spo.actors.engine_pool import EnginePool
from spo.actors.reward_pool import RewardPool
from spo.config import EngineConfig
from spo.engines.fake import FakeEngine
from spo.errors import UnpublishedError
from spo.records import GenerateRequest, Prompt, PromptKind, Sampling, SteeringSpec
from spo.stage2.coordinator import Coordinator
from spo.stage2.coordinator_actor import CoordinatorActor, CoordinatorLink
from spo.stage2.ledger import committed_ids
from spo.vector import SteeringVector
from tests.parity.conftest import make_vector
from tests.unit.stage2.test_preference_loop import WordScorer, coordinator, start_vector
from tests.waiting import wait_for

pytestmark = pytest.mark.ray
CONFIG = EngineConfig(
    backend="fake",
    replicas=2,
    max_restarts=20,
    start_timeout_s=240,
    request_timeout_s=240,
    probe_interval_s=1.0,
)


@pytest.fixture(scope="module")
def pool() -> Iterator[EnginePool]:
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        namespace="faults",
    )
    made = EnginePool.start("fake", None, CONFIG, prefix="faults", seed=0)
    yield made
    made.close()
    ray.shutdown()


def vector() -> SteeringVector:
    return SteeringVector(
        layers=(1,),
        directions=torch.full((1, 8), 0.1),
        mean_norms=torch.ones(1),
        calibration=torch.zeros(1, 8),
        model_id="fake",
    )


def requests(version: int, tokens: int = 6) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            request_id=f"{version}/{i}",
            prompt=Prompt(prompt_id=f"p{i}", text="words", kind=PromptKind.HARM),
            sampling=Sampling(max_tokens=tokens, seed=i),
            steering=SteeringSpec(vector="v", version=version),
        )
        for i in range(6)
    ]


def pid_of(pool: EnginePool, i: int) -> int:
    """Process of an engine; waits while it restarts."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        found = pool.health()[i]
        if isinstance(found, EngineHealth):
            return found.process_id
        time.sleep(0.2)
    raise AssertionError(f"engine {i} is not back: {found}")


def kill(pool: EnginePool, i: int, with_signal: int = signal.SIGKILL) -> int:
    pid = pid_of(pool, i)
    os.kill(pid, with_signal)
    return pid


def test_a_killed_engine_heals_and_answers_the_same(pool: EnginePool) -> None:
    pool.publish("v", vector(), 1)
    before = pool.generate(requests(1))
    killed = kill(pool, 0)
    after = pool.generate(requests(1))
    assert [r.request_id for r in after] == [f"1/{i}" for i in range(6)]
    assert [(r.token_ids, r.receipt) for r in after] == [(r.token_ids, r.receipt) for r in before]
    assert all(r.receipt and r.receipt.sha256 == vector().sha256 for r in after)
    assert pid_of(pool, 0) != killed


def test_every_engine_killed_at_once_heals(pool: EnginePool) -> None:
    pool.publish("v", vector() * 2.0, 2)
    for i in range(CONFIG.replicas):
        kill(pool, i)
    receipts = {r.receipt.sha256 for r in pool.generate(requests(2)) if r.receipt}
    assert receipts == {(vector() * 2.0).sha256}


def test_a_frozen_engine_is_restarted_and_its_requests_answered_elsewhere(pool: EnginePool) -> None:
    pool.publish("v", vector() * 3.0, 3)
    frozen = [kill(pool, i, signal.SIGSTOP) for i in range(CONFIG.replicas)]
    begin = time.monotonic()
    assert len(pool.generate(requests(3))) == 6
    assert time.monotonic() - begin < 0.5 * CONFIG.request_timeout_s
    assert frozen != [pid_of(pool, i) for i in range(CONFIG.replicas)]


def test_callers_of_one_set_of_engines_neither_see_nor_evict_each_other(pool: EnginePool) -> None:
    mine = EnginePool([member.actor for member in pool._members], CONFIG)
    mine.publish("mine", vector(), 0)
    for version in range(4, 20):
        pool.publish("v", vector() * float(version), version)
    asked = [replace(r, steering=SteeringSpec(vector="mine", version=0)) for r in requests(4)]
    with ThreadPoolExecutor(8) as threads:
        calls = [threads.submit(mine.generate, asked) for _ in range(8)]
        others = [threads.submit(pool.generate, requests(19)) for _ in range(8)]
        sha = {r.receipt.sha256 for call in calls for r in call.result() if r.receipt}
        other = {r.receipt.sha256 for call in others for r in call.result() if r.receipt}
    assert (sha, other) == ({vector().sha256}, {(vector() * 19.0).sha256})
    pool.retire("v")
    with pytest.raises(UnpublishedError, match="version 19 is not published"):
        pool.generate(requests(19))
    assert len(mine.generate(asked)) == 6
    mine.retire("mine", 7)  # not held: nothing to drop
    assert len(mine.generate(asked)) == 6


@pytest.mark.vllm
def test_a_living_actor_whose_vllm_core_died_leaves_and_comes_back(
    pool: EnginePool, tiny_llava: Path
) -> None:
    """Real vLLM, its core in a process of its own: killed at work, then at rest."""
    config = CONFIG.model_copy(
        update={
            "backend": "vllm",
            "replicas": 1,
            "dtype": "float32",
            "in_process": False,
            "max_model_len": 512,
            "memory_gib": 0.05,
            "slots": 2,
        }
    )
    vllm = EnginePool.start(str(tiny_llava), None, config, prefix="core", seed=0)
    try:
        vllm.publish("v", make_vector(vllm.info, 1), 1)
        before = vllm.generate(requests(1))
        plain = vllm.generate([replace(request, steering=None) for request in requests(1)])
        assert [r.token_ids for r in plain] != [r.token_ids for r in before]
        actor = pid_of(vllm, 0)
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(vllm.generate, requests(1, tokens=400))
            wait_for(lambda: busy(vllm), "the engine to begin", 60)
            kill_core(actor)
            assert len(waiting.result(timeout=240)) == 6
        assert vllm.retries >= 1
        healed = pid_of(vllm, 0)
        after = vllm.generate(requests(1))
        assert [(r.token_ids, r.receipt) for r in after] == [
            (r.token_ids, r.receipt) for r in before
        ]
        assert healed != actor
        kill_core(healed)
        # Nobody asks it anything.
        wait_for(lambda: not psutil.pid_exists(healed), "the actor to leave", 60)
    finally:
        vllm.close()


def busy(pool: EnginePool) -> bool:
    """Whether the first engine works on something."""
    found = pool.health()[0]
    return isinstance(found, EngineHealth) and found.working > 0


def kill_core(actor: int) -> None:
    """Kill the process in which vLLM computes for an actor."""
    cores = [c for c in psutil.Process(actor).children() if "EngineCore" in " ".join(c.cmdline())]
    assert len(cores) == 1, [c.cmdline() for c in psutil.Process(actor).children()]
    cores[0].kill()


class Trial:
    """What a trial of a sweep with engines of its own does."""

    def start(self) -> str:
        one = CONFIG.model_copy(update={"replicas": 1})
        own = EnginePool.start("fake", None, one, prefix="trial", seed=0)
        try:
            return own.info.model_id
        finally:
            own.close()


def test_engines_start_outside_the_placement_group_of_a_trial(pool: EnginePool) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group([{"CPU": 0.1}])  # as Ray Tune makes one for every trial
    inside = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    trial = ray.remote(Trial).options(num_cpus=0.1, scheduling_strategy=inside).remote()
    assert ray.get(trial.start.remote(), timeout=240) == pool.info.model_id
    ray.kill(trial)
    remove_placement_group(group)


def test_a_vector_that_nobody_published_is_an_error_and_never_an_unsteered_answer(
    pool: EnginePool,
) -> None:
    with pytest.raises(UnpublishedError, match="version 99 is not published"):
        pool.generate(requests(99))


class WordScorerActor(WordScorer):
    """The fake vocabulary's scorer as an actor, with what `RewardPool` asks of one."""

    def ready(self) -> bool:
        return True

    def process_id(self) -> int:
        return os.getpid()


def connected_coordinator(folder: str) -> Coordinator:
    """Built in the coordinator's own process, and again in the one that takes its place."""
    import ray

    scorers = [ray.get_actor(f"faults-scorer-{i}") for i in range(2)]
    made = coordinator(
        EnginePool.connect("faults", CONFIG),
        RewardPool(scorers, timeout_s=120),
        ledger=Path(folder) / "ledger.jsonl",
        max_staleness=1,
    )
    return made.inner


def test_fifty_steps_of_random_kills_use_every_id_once(pool: EnginePool, tmp_path: Path) -> None:
    """Every engine, every scorer and the coordinator are killed twice, in random order."""
    import ray

    places = {"max_restarts": 20, "num_cpus": 0}
    scorers: list[Any] = []
    for i in range(2):
        scorers.append(
            ray.remote(WordScorerActor).options(name=f"faults-scorer-{i}", **places).remote()
        )
    head = ray.remote(CoordinatorActor).options(name="faults-coordinator", **places)
    kept = head.remote(connected_coordinator, {"folder": str(tmp_path)})
    line = CoordinatorLink("faults-coordinator", "faults", rank=0, timeout_s=240)
    victims = [
        *(member.actor for member in pool._members),
        *scorers,
        kept,
    ]
    chance = random.Random(0)
    doomed = [v for _ in range(2) for v in chance.sample(victims, len(victims))]
    start = start_vector(FakeEngine())
    batches = []
    for step in range(50):
        if step % 5 == 2:
            ray.kill(doomed.pop(), no_restart=False)
        # Each step has a vector of its own.
        batches.append(line.batch(step, start * (1.0 + 0.01 * step)))
        line.snapshot = line.record({"step": step, "learn_s": 0.0})
    assert not doomed
    used = [i.rollout.request_id for batch in batches for group in batch.groups for i in group]
    assert len(used) == len(set(used)) == 50 * 24
    assert committed_ids(tmp_path / "ledger.jsonl") == used
    assert max(age for batch in batches for age in batch.staleness) <= 1
    for batch in batches:
        shas = {i.rollout.receipt.sha256 for g in batch.groups for i in g if i.rollout.receipt}
        allowed = {(start * (1.0 + 0.01 * s)).sha256 for s in (batch.step - 1, batch.step)}
        assert shas <= allowed
    assert line.snapshot["totals"]["consumed"] == 50 * 24
