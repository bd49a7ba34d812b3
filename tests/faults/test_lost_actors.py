"""Engines that die on a real Ray cluster: the pool waits, republishes, and asks again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from spo.config import EngineConfig
from spo.errors import UnpublishedError
from spo.records import GenerateRequest, Prompt, PromptKind, Sampling, SteeringSpec
from spo.stages.engine_actor import EngineHealth
from spo.stages.rollout import EnginePool
from spo.vector import SteeringVector

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
        num_cpus=2,
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


def requests(version: int) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            request_id=f"{version}/{i}",
            prompt=Prompt(prompt_id=f"p{i}", text="words", kind=PromptKind.HARM),
            sampling=Sampling(max_tokens=6, seed=i),
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


def test_a_vector_that_nobody_published_is_an_error_and_never_an_unsteered_answer(
    pool: EnginePool,
) -> None:
    with pytest.raises(UnpublishedError, match="version 99 is not published"):
        pool.generate(requests(99))
