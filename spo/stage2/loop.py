"""The preference loop, on one page: a function that tests run on fakes in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from spo.records import Batch
from spo.stage2.learner import Update
from spo.vector import SteeringVector


class Learner(Protocol):
    """Improves a vector by one batch."""

    @property
    def vector(self) -> SteeringVector: ...

    def update(self, batch: Batch, *, rank: int, world: int) -> Update: ...


def train(
    learner: Learner,
    next_batch: Callable[[int, SteeringVector], Batch],
    *,
    steps: Iterable[int],
    after_step: Callable[[Update, SteeringVector], None],
    shard: tuple[int, int] = (0, 1),
) -> SteeringVector:
    """The preference loop.

    Args:
        learner: holds the vector and its optimiser.
        next_batch: publishes the vector as version `step`, samples, scores; asked again for a step
            it returns the same batch.
        steps: steps still to run.
        after_step: records figures and saves a checkpoint.
        shard: (rank, number of workers): which groups of a batch this worker learns from.
    """
    rank, world = shard
    for step in steps:
        batch = next_batch(step, learner.vector)
        update = learner.update(batch, rank=rank, world=world)
        after_step(update, learner.vector)
    return learner.vector
