"""Stage II's loop on this machine, learner and rollout engine on one device or on a card each.

Rewards are drawn from the answers' hashes: the shape of the work is real, what is learned means
nothing. Part of `jobs.bench learner`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from spo.actors.engine_pool import EnginePool
from spo.config import EngineConfig, LearnConfig, RewardConfig, RolloutConfig, SteeringConfig
from spo.engines.hf.engine import HfEngine
from spo.records import Operator, Positions, Prompt, Rollout
from spo.stage2.coordinator import Coordinator, CoordinatorSettings, make_coordinator
from spo.stage2.coordinator_thread import CoordinatorThread
from spo.stage2.learner import VectorLearner, step_figures
from spo.vector import SteeringVector


def measure_loop(
    engine: HfEngine,
    folder: Path,
    prompts: Sequence[Prompt],
    vector: SteeringVector,
    settings: Mapping[str, Any],
    staleness: int,
    limit_s: float,
) -> dict[str, float]:
    """Seconds a step, median seconds of learning, and the share in which the engine waits.

    Args:
        engine: the learner's.
        folder: the model, for the rollout engine, which is started here and ended.
        prompts: to sample answers to.
        vector: to begin with.
        settings: a preset of `spo.bench.learner`.
        staleness: S.
        limit_s: seconds, once the engine is there, after which no step is begun.
    """
    steering = SteeringConfig(operator=Operator.ADD, positions=Positions.ALL, coefficient=0.1)
    config = LearnConfig(micro_batch=settings["micro"], max_kl=1e9, learning_rate=0.01)
    idle: list[float] = []
    learned: list[float] = []
    times: list[float] = []
    with _engines(folder, settings, prefix=f"bench-{staleness}") as pool:
        end = time.monotonic() + limit_s
        coordinator = _coordinator(pool, prompts, settings, steering, staleness)
        info = pool.info
        vector = vector.replace(model_id=info.model_id, model_revision=info.model_revision)
        learner = VectorLearner(engine, vector, steering=steering, config=config)

        limit = max(60.0, end - time.monotonic())
        with closing(CoordinatorThread(coordinator, timeout_s=limit)) as line:
            for step in range(settings["steps"]):
                begin = time.perf_counter()
                update = learner.update(line.batch(step, learner.vector))
                learned.append(update.seconds)
                idle.append(coordinator.idle_seconds())
                line.record(step_figures(update, learner.vector, vector))
                times.append(time.perf_counter() - begin)
                if time.monotonic() > end:
                    break
    return _figures(settings, times, learned, idle)


@contextmanager
def _engines(folder: Path, settings: Mapping[str, Any], *, prefix: str) -> Iterator[EnginePool]:
    import ray

    gpu = settings["device"] == "cuda"
    alone = settings["gpus"] > 1
    config = EngineConfig(
        backend="vllm",
        dtype=settings["dtype"],
        max_model_len=1024,
        memory_gib=0.2,
        gpu_memory_utilization=0.4,
        num_gpus=(1.0 if alone else 0.5) if gpu else 0.0,
    )
    started = not ray.is_initialized()
    if started:
        # Ray gives out the first card alone; the learner, here in the driver, has the last one.
        cards = {"num_gpus": 1} if gpu else {}
        ray.init(address="local", include_dashboard=False, log_to_driver=False, **cards)
    pool = EnginePool.start(str(folder), None, config, prefix=prefix, seed=0)
    try:
        yield pool
    finally:
        pool.close()
        if started:
            ray.shutdown()


def _coordinator(
    pool: EnginePool,
    prompts: Sequence[Prompt],
    settings: Mapping[str, Any],
    steering: SteeringConfig,
    staleness: int,
) -> Coordinator:
    rollout = RolloutConfig(
        harm_prompts=settings["prompts"] - settings["prompts"] // 4,
        benign_prompts=settings["prompts"] // 4,
        group_size=settings["group"],
        max_tokens=settings["tokens"],
        max_staleness=staleness,
        parity_answers=0,  # two sets of random weights: they differ, as they must
    )
    return make_coordinator(
        prompts,
        pool,
        _HashScorer(),
        CoordinatorSettings(
            steering=steering,
            rollout=rollout,
            reward=RewardConfig(),
            steps=settings["steps"],
            informative=lambda rewards: True,
        ),
    )


def _figures(
    settings: Mapping[str, Any], times: list[float], learned: list[float], idle: list[float]
) -> dict[str, float]:
    # The first two steps fill the pipeline and compile; the last has nothing to work ahead for.
    kept = slice(2, len(times) - 1) if len(times) > 4 else slice(1, None)
    wall = sum(times[kept])
    return {
        "seconds_a_step": wall / len(times[kept]),
        "learn_s": median(learned[kept]),
        "engine_waits": sum(idle[kept]) / wall,
        "sequences_s": settings["prompts"] * settings["group"] * len(times[kept]) / wall,
    }


class _HashScorer:
    """Rewards without a meaning, different for every answer."""

    def score(self, rollouts: Sequence[Rollout]) -> list[dict[str, float]]:
        return [
            {"toxicity": hashlib.sha256(r.text.encode()).digest()[0] / 255, "alignment": 0.3}
            for r in rollouts
        ]
