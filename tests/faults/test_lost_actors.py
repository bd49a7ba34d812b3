"""Engines that die on a real Ray cluster: the pool waits, republishes, and asks again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch

from spo.config import EngineConfig
from spo.errors import EngineError, SteeringError
from spo.records import GenerateRequest, Prompt, PromptKind, Sampling, SteeringSpec
from spo.stages.rollout import RolloutPool
from spo.vector import SteeringVector

pytestmark = pytest.mark.ray
CONFIG = EngineConfig(backend="fake", replicas=2, start_timeout_s=60, request_timeout_s=60)


@pytest.fixture(scope="module")
def pool() -> Iterator[RolloutPool]:
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        namespace="faults",
    )
    made = RolloutPool.start("fake", None, CONFIG, prefix="faults", seed=0)
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


def kill(pool: RolloutPool, i: int) -> int:
    import ray

    pid: int = ray.get(pool._actors[i].process_id.remote(), timeout=30)
    os.kill(pid, signal.SIGKILL)
    return pid


def test_a_killed_engine_heals_and_answers_the_same(pool: RolloutPool) -> None:
    import ray

    pool.publish("v", vector(), 1)
    before = pool.generate(requests(1))
    killed = kill(pool, 0)
    after = pool.generate(requests(1))
    assert [r.request_id for r in after] == [f"1/{i}" for i in range(6)]
    assert [(r.token_ids, r.receipt) for r in after] == [(r.token_ids, r.receipt) for r in before]
    assert all(r.receipt and r.receipt.sha256 == vector().sha256 for r in after)
    assert ray.get(pool._actors[0].process_id.remote(), timeout=30) != killed


def test_every_engine_killed_at_once_heals(pool: RolloutPool) -> None:
    pool.publish("v", vector() * 2.0, 2)
    for i in range(CONFIG.replicas):
        kill(pool, i)
    receipts = {r.receipt.sha256 for r in pool.generate(requests(2)) if r.receipt}
    assert receipts == {(vector() * 2.0).sha256}


def test_a_vector_that_nobody_published_is_an_error_and_never_an_unsteered_answer(
    pool: RolloutPool,
) -> None:
    with pytest.raises((SteeringError, EngineError), match="version 99 is not published"):
        pool.generate(requests(99))
