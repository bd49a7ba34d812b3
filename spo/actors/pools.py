"""Engines and reward models of one run, as one context."""

from __future__ import annotations

import uuid
from contextlib import ExitStack
from pathlib import Path

from spo.actors.engine_pool import EnginePool
from spo.actors.reward_pool import RewardPool
from spo.config import EngineConfig, RewardConfig
from spo.progress import Reporter
from spo.resolve import ResolvedModel, reward_parts


class Pools:
    """Engines and reward models of one run, started once and shared by training and evaluation.

    Args:
        model: what the engines load.
        engine: the engines.
        reward: the reward models; None leaves them out, for only training asks them.
        name: begins the names of the actors.
        seed: the run's.
        cache: folder of assembled models.
        reporter: told what is started.
    """

    def __init__(
        self,
        model: ResolvedModel,
        engine: EngineConfig,
        reward: RewardConfig | None,
        *,
        name: str,
        seed: int,
        cache: Path,
        reporter: Reporter,
    ) -> None:
        self.model = model
        self.prefix = f"{name}-{uuid.uuid4().hex[:8]}"
        self._engine = engine
        self._reward = reward
        self._seed = seed
        self._cache = cache
        self._reporter = reporter

    def __enter__(self) -> Pools:
        engine, reward = self._engine, self._reward
        self._reporter.stage(
            f"Start {engine.replicas} {engine.backend} engine(s)"
            + " and reward models" * (reward is not None)
        )
        with ExitStack() as undo:
            if reward is not None:  # they load while the engines do
                self.rewards = RewardPool.start(
                    reward_parts(reward, self._cache), reward, prefix=self.prefix
                )
                undo.callback(self.rewards.close)
            self.rollouts = EnginePool.start(
                self.model.path,
                self.model.revision,
                engine,
                prefix=self.prefix,
                seed=self._seed,
            )
            undo.callback(self.rollouts.close)
            if reward is not None:
                self.rewards.wait_ready()
            self._close = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._close.close()
