"""Projected gradient descent on several pictures at once, each with its own ball and pairs.

Signed steps with momentum (MI-FGSM, arXiv 1710.06081). Every picture goes through all its (prompt,
target) pairs in its own random order, a few in each step; a few more are held apart and measure how
far it is. A picture whose curve is flat goes on with the last fifth of its step sizes and ends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from spo.attacks.likelihood import TargetLikelihood
from spo.attacks.packed_pairs import Pair, Tokens
from spo.attacks.pixels import PixelSpace
from spo.config.evaluation import AttackConfig
from spo.records import Prompt

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what)."""

HELD_APART = 16
"""At most so many pairs measure a picture and are in no step."""
COOLING = 0.2
"""Share of the schedule that is run even when the curve is flat."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Goal:
    """What one picture is to reach, from where, and how far it may go."""

    prompts: Sequence[Prompt]
    targets: Sequence[Tokens]
    epsilon_255: float
    step_size_255: float
    seed: int

    def split(self, held: int = HELD_APART) -> tuple[list[Pair], Iterator[Pair]]:
        """`held` pairs that measure, and an endless stream of pairs for the steps, without those.

        At most a quarter of all pairs is held apart; with fewer than `HELD_APART` in all, the same
        ones do both.
        """
        rng = np.random.default_rng([self.seed, 0])
        count = len(self.prompts) * len(self.targets)
        order = rng.permutation(count)
        if count < HELD_APART:
            return [self._pair(i) for i in range(count)], self._stream(order, rng)
        held = min(held, count // 4)
        return [self._pair(i) for i in order[:held]], self._stream(order[held:], rng)

    def _stream(self, pool: np.ndarray, rng: np.random.Generator) -> Iterator[Pair]:
        while True:
            for number in rng.permutation(pool):
                yield self._pair(int(number))

    def _pair(self, number: int) -> Pair:
        prompt, target = divmod(int(number), len(self.targets))
        return self.prompts[prompt], self.targets[target]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Look:
    """A picture on the way."""

    step: int
    """Steps done; 0 is the start."""
    loss: float
    """Of the picture in whole grey levels, on the pairs that are held apart."""
    pixels: Tensor
    """(3, height, width) whole grey levels divided by 255."""


@dataclass(slots=True, kw_only=True, eq=False)
class Descent:
    """One start of one picture."""

    losses: list[float] = field(default_factory=list)
    """Of each step, before it."""
    looks: list[Look] = field(default_factory=list)
    """In order: first the start, last the result."""
    pairs: int = 0
    """Pairs whose gradient was computed, each time that one was."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Climber:
    """A descent while it runs."""

    probe: list[Pair]
    stream: Iterator[Pair]
    found: Descent
    place: int = 0
    """Place in the schedule of step sizes; `steps` at the end."""

    def drawn(self, count: int) -> list[Pair]:
        """Pairs of the next step; one that is there twice in a small pool is taken once."""
        return list(dict.fromkeys(next(self.stream) for _ in range(count)))


def descend(
    likelihood: TargetLikelihood,
    space: PixelSpace,
    goals: Sequence[Goal],
    config: AttackConfig,
    *,
    restart: int = 0,
    looks: int = 5,
    progress: Progress | None = None,
) -> list[Descent]:
    """Descend from one start of every picture.

    Args:
        likelihood: losses and gradients, through the defence if there is one.
        space: (pictures, 3, height, width) clean pictures, one for each goal.
        goals: what each is to reach; their radius and step size count, not the configuration's.
        config: steps, schedule, momentum, pairs per step, early stop.
        restart: 0 starts at the clean pictures, others at random places in the balls.
        looks: parts of the schedule after each of which the picture is measured and kept.
        progress: called after each step with the pictures' mean place in the schedule.
    """
    climbers = []
    for goal in goals:
        probe, stream = goal.split(min(HELD_APART, 2 * config.pairs))
        climbers.append(_Climber(probe=probe, stream=stream, found=Descent()))
    ball = _per_picture([goal.epsilon_255 for goal in goals], space.clean)
    reach = _per_picture([goal.step_size_255 / 255 for goal in goals], space.clean)
    pixels = _starts(space, goals, ball, restart)
    velocity = torch.zeros_like(pixels)
    marks = {round(config.steps * part / looks) for part in range(looks + 1)}
    _look(likelihood, space, pixels, ball, climbers, {0} & marks)
    began = time.perf_counter()
    while running := [i for i, climber in enumerate(climbers) if climber.place < config.steps]:
        index = torch.tensor(running, device=pixels.device)
        pairs = [climbers[i].drawn(config.pairs) for i in running]
        losses, gradient = likelihood.gradient(pixels[index], pairs)
        size = gradient.abs().mean(dim=(-3, -2, -1), keepdim=True).clamp_min(1e-12)
        velocity[index] = config.momentum * velocity[index] + gradient / size
        share = [step_share(config, climbers[i].place) for i in running]
        step = reach[index] * _per_picture(share, space.clean) * velocity[index].sign()
        moved = pixels.clone()
        moved[index] = pixels[index] - step
        pixels = space.project(moved, ball)
        for i, loss, several in zip(running, losses, pairs, strict=True):
            _advance(climbers[i], loss, len(several), config)
        _look(likelihood, space, pixels, ball, [climbers[i] for i in running], marks, index)
        if progress:
            done = sum(climber.place for climber in climbers) // len(climbers)
            spent = time.perf_counter() - began
            progress(done, config.steps, f"loss {np.mean(losses):.3f}, {spent:.0f} s")
    return [climber.found for climber in climbers]


def step_share(config: AttackConfig, place: int) -> float:
    """The step at a place of the schedule as a share of the first one."""
    passed = place / config.steps
    if config.schedule == "cosine":
        passed = (1.0 - math.cos(math.pi * passed)) / 2
    return 1.0 - (1.0 - config.final_step) * passed


def is_flat(losses: Sequence[float], steps: int, gain: float) -> bool:
    """Whether the mean of the last `steps` losses is less than `gain` below that before them."""
    if steps == 0 or len(losses) < 2 * steps:
        return False
    before = float(np.mean(losses[-2 * steps : -steps]))
    return before - float(np.mean(losses[-steps:])) < gain * abs(before)


def _advance(climber: _Climber, loss: float, pairs: int, config: AttackConfig) -> None:
    climber.found.losses.append(loss)
    climber.found.pairs += pairs
    climber.place += 1
    cooling = config.steps - max(1, round(config.steps * COOLING))
    if climber.place < cooling and is_flat(
        climber.found.losses, config.flat_steps, config.flat_gain
    ):
        climber.place = cooling


def _look(
    likelihood: TargetLikelihood,
    space: PixelSpace,
    pixels: Tensor,
    ball: Tensor,
    climbers: Sequence[_Climber],
    marks: set[int],
    index: Tensor | None = None,
) -> None:
    """Measure and keep those that are at one of the marks; `index` has their rows of `pixels`."""
    rows = range(len(climbers)) if index is None else index.tolist()
    due = [(row, c) for row, c in zip(rows, climbers, strict=True) if c.place in marks]
    if not due:
        return
    whole = space.quantise(pixels, ball)[[row for row, _ in due]]
    losses = likelihood.losses(whole, [climber.probe for _, climber in due])
    for (_, climber), loss, picture in zip(due, losses, whole, strict=True):
        steps = len(climber.found.losses)
        climber.found.looks.append(Look(step=steps, loss=loss, pixels=picture))


def _starts(space: PixelSpace, goals: Sequence[Goal], ball: Tensor, restart: int) -> Tensor:
    if restart == 0:
        return space.clean.clone()
    noise = torch.stack(
        [
            torch.from_numpy(
                np.random.default_rng([goal.seed, restart]).uniform(-1, 1, tuple(clean.shape))
            ).float()
            for goal, clean in zip(goals, space.clean, strict=True)
        ]
    )
    return space.project(space.clean + noise.to(space.clean.device) * ball / 255, ball)


def _per_picture(values: Sequence[float], like: Tensor) -> Tensor:
    """(pictures, 1, 1, 1) float32 on the device of `like`."""
    return torch.tensor(values, dtype=torch.float32, device=like.device).view(-1, 1, 1, 1)
