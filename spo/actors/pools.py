"""Engines and reward models of one run, as one context."""

from __future__ import annotations

import uuid
from contextlib import ExitStack

from spo.actors.engine_pool import EnginePool
from spo.actors.reward_pool import RewardPool
from spo.config import RunConfig
from spo.progress import Reporter
from spo.resolve import ResolvedModel, resolve_model, reward_parts


class Pools:
    """Engines and reward models of one run, started once and shared by training and evaluation.

    Args:
        config: the run.
        reporter: told what is started.
        scoring: False leaves the reward models out, which only training asks.
    """

    def __init__(self, config: RunConfig, reporter: Reporter, *, scoring: bool = True) -> None:
        self._config = config
        self._reporter = reporter
        self._scoring = scoring
        self.prefix = f"{config.name}-{uuid.uuid4().hex[:8]}"
        self.model: ResolvedModel = resolve_model(config.model, config.cache)

    def __enter__(self) -> Pools:
        config = self._config
        self._reporter.stage(
            f"Start {config.engine.replicas} {config.engine.backend} engine(s)"
            + " and reward models" * self._scoring
        )
        with ExitStack() as undo:
            if self._scoring:  # they load while the engines do
                self.rewards = RewardPool.start(
                    reward_parts(config.reward, config.cache), config.reward, prefix=self.prefix
                )
                undo.callback(self.rewards.close)
            self.rollouts = EnginePool.start(
                self.model.path,
                self.model.revision,
                config.engine,
                prefix=self.prefix,
                seed=config.seed,
            )
            undo.callback(self.rollouts.close)
            if self._scoring:
                self.rewards.wait_ready()
            self._close = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._close.close()
