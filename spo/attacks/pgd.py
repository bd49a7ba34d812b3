"""White-box PGD on the picture: pictures that make harmful answers likely.

In: an `HfEngine`, a clean picture, prompts and harmful target texts. Out: 8-bit pictures inside the
L-infinity ball around the clean one, at the processor's own resolution, so that saving one as PNG
and encoding it again gives the attacked pixels. `universal_pgd` makes one picture for all prompts
from a corpus of targets (Qi et al., arXiv 2306.13213), `prompt_pgd` one for each prompt towards its
own answer. Signed steps with momentum (MI-FGSM, arXiv 1710.06081), linearly decaying; the best of
several starts is kept. With a `SteeringPlan` the gradient goes through the defence (adaptive
attack); with `plan.straight_through` it also passes a closed gate (BPDA, arXiv 1802.00420).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spo.attacks.likelihood import Tokens, target_nll, target_nlls
from spo.attacks.pixels import PixelSpace
from spo.config.evaluation import AttackConfig
from spo.engines.forward import SteeringPlan
from spo.engines.hf.engine import HfEngine
from spo.errors import DataError, EngineError
from spo.records import Prompt

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what)."""

Pair = tuple[Prompt, Tokens]
"""A prompt with the tokens that the attack wants as its answer."""

_PROBE_PROMPTS = 4
_CHECKPOINTS = 5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """How far the attack was after some steps."""

    step: int
    """Steps done; 0 is the start."""
    loss: float
    """Loss of the 8-bit picture on the fixed pairs."""
    image: Image.Image


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PgdResult:
    """An attacked picture and the evidence of how far the attack got."""

    image: Image.Image
    """Attacked picture, 8-bit RGB at the processor's resolution. Save it with `save`."""
    clean: Image.Image
    """The clean picture at the same resolution: the centre of the ball."""
    losses: tuple[float, ...]
    """Mean negative log-likelihood per target token of each step, before the step (best start)."""
    clean_loss: float
    """The same of the clean picture, on one fixed set of pairs."""
    attacked_loss: float
    """The same of the final 8-bit picture, on the same pairs as `clean_loss`."""
    checkpoints: tuple[Checkpoint, ...] = ()
    """Of the best start, in order of steps."""
    restart_losses: tuple[float, ...] = ()
    """`attacked_loss` of every start."""

    def save(self, path: Path) -> Path:
        """Write the attacked picture as PNG; DataError for a suffix that would lose pixels."""
        if path.suffix.lower() != ".png":
            raise DataError(
                f"an attacked picture must be saved as .png, got {path.name!r}: a lossy format "
                "takes the attack away"
            )
        self.image.save(path, format="PNG")
        return path


def universal_pgd(
    engine: HfEngine,
    image: Image.Image,
    *,
    prompts: Sequence[Prompt],
    targets: Sequence[str | Sequence[int]],
    config: AttackConfig,
    plan: SteeringPlan | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> PgdResult:
    """Find one picture that raises the likelihood of every target after every prompt.

    Each step draws one prompt and `config.targets` targets.

    Args:
        engine: the model under test, with gradients.
        image: the clean picture, any size.
        prompts: prompts that the picture is shown with; their own pictures are ignored.
        targets: texts (or their tokens) whose likelihood after every prompt is raised.
        config: radius, steps, step size, momentum, restarts. A radius of 255 is unbounded.
        plan: the defence to attack through; None attacks the unsteered model.
        seed: seed of the draws and of the random starts.
        progress: called after every step.

    Raises:
        DataError: no prompts, or no target with tokens.
        EngineError: the processor does not fit, or a gradient is not finite.
    """
    space = PixelSpace.of(engine, image)
    wanted = _target_tokens(engine, targets)
    with _shown(prompts, space) as shown:
        rng = np.random.default_rng(seed)
        count = min(config.targets, len(wanted))
        probe = [(p, target) for p in shown[:_PROBE_PROMPTS] for target in wanted[:count]]

        def probed(pixels: Tensor) -> float:
            return target_loss(engine, space, pixels, probe, plan=plan)

        def slope(pixels: Tensor) -> tuple[float, Tensor]:
            prompt = shown[int(rng.integers(len(shown)))]
            drawn = rng.choice(len(wanted), size=count, replace=False)
            pairs = [(prompt, wanted[i]) for i in drawn]
            return loss_and_gradient(engine, space, pixels, pairs, plan=plan)

        runs = [
            _descend(space, _start(space, config, n, seed), slope, probed, config, progress, n)
            for n in range(config.restarts)
        ]
        best = min(runs, key=lambda run: run.checkpoints[-1].loss)
        return PgdResult(
            image=best.checkpoints[-1].image,
            clean=space.picture(space.clean),
            losses=tuple(best.losses),
            clean_loss=probed(space.clean),
            attacked_loss=best.checkpoints[-1].loss,
            checkpoints=tuple(best.checkpoints),
            restart_losses=tuple(run.checkpoints[-1].loss for run in runs),
        )


def prompt_pgd(
    engine: HfEngine,
    image: Image.Image,
    *,
    pairs: Sequence[tuple[Prompt, str | Sequence[int]]],
    config: AttackConfig,
    plan: SteeringPlan | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[PgdResult]:
    """Find a picture for each prompt that makes its own target likely; batched.

    Args:
        pairs: prompts with the answer that the attack wants of each.

    Other arguments, and errors, as in `universal_pgd`; `config.targets` is not used.
    """
    space = PixelSpace.of(engine, image)
    wanted = _target_tokens(engine, [target for _, target in pairs])
    results: list[PgdResult] = []
    with _shown([prompt for prompt, _ in pairs], space) as shown:
        for first in range(0, len(shown), engine.batch_size):
            part = slice(first, first + engine.batch_size)
            found = [
                _descend_each(
                    engine,
                    space,
                    _start(space, config, n, seed),
                    shown[part],
                    wanted[part],
                    config,
                    plan,
                    progress,
                )
                for n in range(config.restarts)
            ]
            for runs in zip(*found, strict=True):
                best = min(runs, key=lambda run: run.attacked_loss)
                losses = tuple(run.attacked_loss for run in runs)
                results.append(replace(best, restart_losses=losses))
    return results


def loss_and_gradient(
    engine: HfEngine,
    space: PixelSpace,
    pixels: Tensor,
    pairs: Sequence[Pair],
    *,
    plan: SteeringPlan | None = None,
) -> tuple[float, Tensor]:
    """Mean negative log-likelihood per target token, and its gradient in the pixels.

    Args:
        engine: the model under test.
        space: normalisation.
        pixels: (3, height, width) in 0..1.
        pairs: prompts and target tokens; targets of one prompt share its forward pass.
        plan: the defence, or None.

    Returns:
        The loss, and a (3, height, width) float32 gradient.
    """
    leaf = pixels.detach().clone().requires_grad_(True)
    total = 0.0
    for prompt, targets, share in _parts(pairs, engine.batch_size):
        loss = target_nll(engine, prompt, targets, space.normalise(leaf), plan) * share
        loss.backward()
        total += float(loss.detach())
    return total, _checked(leaf.grad, total)


@torch.no_grad()
def target_loss(
    engine: HfEngine,
    space: PixelSpace,
    pixels: Tensor,
    pairs: Sequence[Pair],
    *,
    plan: SteeringPlan | None = None,
) -> float:
    """Mean negative log-likelihood per target token; arguments as in `loss_and_gradient`."""
    return sum(
        float(target_nll(engine, prompt, targets, space.normalise(pixels), plan)) * share
        for prompt, targets, share in _parts(pairs, engine.batch_size)
    )


@dataclass(slots=True, kw_only=True, eq=False)
class _Run:
    """One start."""

    losses: list[float]
    checkpoints: list[Checkpoint]


def _descend(
    space: PixelSpace,
    start: Tensor,
    slope: Callable[[Tensor], tuple[float, Tensor]],
    probed: Callable[[Tensor], float],
    config: AttackConfig,
    progress: Progress | None,
    restart: int,
) -> _Run:
    run = _Run(losses=[], checkpoints=[])
    pixels, velocity = start, torch.zeros_like(start)
    looks = _looks(config.steps)
    for step in range(config.steps + 1):
        if step in looks:
            whole = space.quantise(pixels, config.epsilon_255)
            run.checkpoints.append(
                Checkpoint(step=step, loss=probed(whole), image=space.picture(whole))
            )
        if step == config.steps:
            break
        loss, gradient = slope(pixels)
        pixels, velocity = _stepped(space, pixels, velocity, gradient, config, step)
        run.losses.append(loss)
        if progress:
            done, total = restart * config.steps + step + 1, config.restarts * config.steps
            progress(done, total, f"{config.name} loss {loss:.3f}")
    return run


def _descend_each(
    engine: HfEngine,
    space: PixelSpace,
    start: Tensor,
    prompts: Sequence[Prompt],
    targets: Sequence[Tokens],
    config: AttackConfig,
    plan: SteeringPlan | None,
    progress: Progress | None,
) -> list[PgdResult]:
    """One start of `prompt_pgd`, on (rows, 3, height, width) pictures."""
    pixels = start.expand(len(prompts), -1, -1, -1).clone()
    velocity = torch.zeros_like(pixels)
    losses: list[list[float]] = []

    def measured(values: Tensor) -> list[float]:
        with torch.no_grad():
            found: list[float] = target_nlls(
                engine, prompts, targets, space.normalise(values), plan
            ).tolist()
            return found

    for step in range(config.steps):
        leaf = pixels.detach().clone().requires_grad_(True)
        each = target_nlls(engine, prompts, targets, space.normalise(leaf), plan)
        each.sum().backward()
        losses.append(each.detach().tolist())
        gradient = _checked(leaf.grad, float(each.detach().sum()))
        pixels, velocity = _stepped(space, pixels, velocity, gradient, config, step)
        if progress:
            progress(step + 1, config.steps, f"{config.name} loss {np.mean(losses[-1]):.3f}")
    whole = space.quantise(pixels, config.epsilon_255)
    clean = measured(space.clean.expand_as(whole))
    attacked = measured(whole)
    return [
        PgdResult(
            image=space.picture(whole[row]),
            clean=space.picture(space.clean),
            losses=tuple(step[row] for step in losses),
            clean_loss=clean[row],
            attacked_loss=attacked[row],
        )
        for row in range(len(prompts))
    ]


def _stepped(
    space: PixelSpace,
    pixels: Tensor,
    velocity: Tensor,
    gradient: Tensor,
    config: AttackConfig,
    step: int,
) -> tuple[Tensor, Tensor]:
    """One signed step of momentum against the gradient, back into the ball."""
    size = gradient.abs().mean(dim=(-3, -2, -1), keepdim=True).clamp_min(1e-12)
    velocity = config.momentum * velocity + gradient / size
    reach = config.step_size_255 / 255 * (1.0 - 0.9 * step / config.steps)
    return space.project(pixels - reach * velocity.sign(), config.epsilon_255), velocity


def _start(space: PixelSpace, config: AttackConfig, restart: int, seed: int) -> Tensor:
    if restart == 0:
        return space.clean.clone()
    generator = torch.Generator().manual_seed(seed + restart)
    noise = torch.rand(space.clean.shape, generator=generator).to(space.clean.device) * 2 - 1
    return space.project(space.clean + noise * config.epsilon_255 / 255, config.epsilon_255)


def _looks(steps: int) -> set[int]:
    """Steps at which the strength curve is read: the start, the end, and between."""
    return {round(steps * part / _CHECKPOINTS) for part in range(_CHECKPOINTS + 1)}


def _checked(gradient: Tensor | None, loss: float) -> Tensor:
    if gradient is None or not torch.isfinite(gradient).all() or not math.isfinite(loss):
        raise EngineError(
            f"the picture's gradient is missing or not finite (loss {loss}); run the attack in "
            "float32 or bfloat16"
        )
    return gradient


def _parts(pairs: Sequence[Pair], size: int) -> list[tuple[Prompt, list[Tokens], float]]:
    """Pairs by prompt, at most `size` at once, each part with its share of the target tokens."""
    tokens = sum(len(target) for _, target in pairs)
    grouped: dict[Prompt, list[Tokens]] = {}
    for prompt, target in pairs:
        grouped.setdefault(prompt, []).append(target)
    return [
        (prompt, targets[at : at + size], sum(map(len, targets[at : at + size])) / tokens)
        for prompt, targets in grouped.items()
        for at in range(0, len(targets), size)
    ]


@contextmanager
def _shown(prompts: Sequence[Prompt], space: PixelSpace) -> Iterator[list[Prompt]]:
    """The prompts with the clean picture, which holds the place of the attacked one."""
    if not prompts:
        raise DataError("the attack needs at least one prompt, got none")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "clean.png"
        space.picture(space.clean).save(place, format="PNG")
        yield [replace(prompt, image=str(place)) for prompt in prompts]


def _target_tokens(
    engine: HfEngine, targets: Sequence[str | Sequence[int]]
) -> list[tuple[int, ...]]:
    tokens = [
        tuple(
            engine.prompts.tokenizer(target, add_special_tokens=False)["input_ids"]
            if isinstance(target, str)
            else target
        )
        for target in targets
    ]
    empty = [i for i, target in enumerate(tokens) if not target]
    if empty or not tokens:
        raise DataError(
            f"the attack needs targets with at least one token each, got {len(tokens)} targets of "
            f"which {empty} are empty"
        )
    return tokens
