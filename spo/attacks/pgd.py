"""White-box PGD on the picture: pictures that make harmful answers likely.

In: an `HfEngine`, a clean picture, prompts and harmful target texts. Out: 8-bit pictures inside the
L-infinity ball around the clean one, at the processor's own resolution, so that saving one as PNG
and encoding it again gives the attacked pixels. `universal_pgd` makes one picture for all prompts
from a corpus of targets (Qi et al., arXiv 2306.13213), `prompt_pgd` one for each prompt towards its
own answer. The descent itself is in `spo.attacks.descent`; the best of several starts is kept. With
a `SteeringPlan` the gradient goes through the defence (adaptive attack); with
`plan.straight_through` it also passes a closed gate (BPDA, arXiv 1802.00420).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from torch import Tensor

from spo.attacks.descent import Descent, Goal, Look, Progress, descend
from spo.attacks.likelihood import TargetLikelihood
from spo.attacks.packed_pairs import Pair, Tokens
from spo.attacks.pixels import PixelSpace
from spo.config.evaluation import AttackConfig
from spo.engines.forward import SteeringPlan
from spo.engines.hf.engine import HfEngine
from spo.errors import DataError
from spo.records import Prompt


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """How far the attack was after some steps."""

    step: int
    """Steps done; 0 is the start."""
    loss: float
    """Loss of the 8-bit picture on the pairs that are held apart."""
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
    """The same of the clean picture, on a few fixed pairs that are in no step."""
    attacked_loss: float
    """The same of the final 8-bit picture, on the same pairs as `clean_loss`."""
    checkpoints: tuple[Checkpoint, ...] = ()
    """Of the best start, in order of steps."""
    restart_losses: tuple[float, ...] = ()
    """`attacked_loss` of every start."""
    pairs: int = 0
    """(prompt, target) pairs whose gradient was computed, over all steps and starts."""
    wall_s: float = 0.0
    """Seconds that the attack took; of pictures made together, the share of each."""

    @property
    def steps(self) -> int:
        """Steps of the best start; fewer than asked for where the curve was flat."""
        return len(self.losses)

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

    Args:
        engine: the model under test, with gradients.
        image: the clean picture, any size.
        prompts: prompts that the picture is shown with; their own pictures are ignored.
        targets: texts (or their tokens) whose likelihood after every prompt is raised.
        config: radius, steps, step size, pairs per step, restarts. A radius of 255 is unbounded.
        plan: the defence to attack through; None attacks the unsteered model.
        seed: seed of the draws and of the random starts.
        progress: called after every step.

    Raises:
        DataError: no prompts, or no target with tokens.
        EngineError: the processor does not fit, or a gradient is not finite.
    """
    goal = PictureGoal(
        image=image,
        prompts=prompts,
        targets=targets,
        epsilon_255=config.epsilon_255,
        step_size_255=config.step_size_255,
        seed=seed,
    )
    (result,) = joint_pgd(engine, [goal], config=config, plan=plan, looks=5, progress=progress)
    return result


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

    Other arguments, and errors, as in `universal_pgd`; each picture has one pair in every step.
    """
    goals = [
        PictureGoal(
            image=image,
            prompts=[prompt],
            targets=[target],
            epsilon_255=config.epsilon_255,
            step_size_255=config.step_size_255,
            seed=seed,
        )
        for prompt, target in pairs
    ]
    results: list[PgdResult] = []
    for first in range(0, len(goals), engine.batch_size):
        part = goals[first : first + engine.batch_size]
        results += joint_pgd(engine, part, config=config, plan=plan, progress=progress)
    return [replace(result, checkpoints=()) for result in results]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PictureGoal:
    """One picture of several that are attacked together; see `universal_pgd`."""

    image: Image.Image
    """The clean picture."""
    prompts: Sequence[Prompt]
    targets: Sequence[str | Sequence[int]]
    epsilon_255: float
    step_size_255: float
    seed: int


def joint_pgd(
    engine: HfEngine,
    goals: Sequence[PictureGoal],
    *,
    config: AttackConfig,
    plan: SteeringPlan | None = None,
    at_once: int | None = None,
    looks: int = 1,
    progress: Progress | None = None,
) -> list[PgdResult]:
    """Attack several pictures, each with its own prompts, targets and radius, in the same passes.

    Args:
        engine: the model under test, with gradients.
        goals: one for each picture; their sizes after the processor must be the same.
        config: steps, schedule, pairs per step, restarts; its radius and step size are not used.
        plan: the defence to attack through; None attacks the unsteered model.
        at_once: pairs in a forward pass; None takes the engine's batch size.
        looks: parts of the schedule after each of which a checkpoint is kept.
        progress: called after every step.

    Raises:
        DataError: no prompts, or no target with tokens.
        EngineError: the processor does not fit, or a gradient is not finite.
    """
    began = time.perf_counter()
    singles = [PixelSpace.of(engine, goal.image) for goal in goals]
    space = PixelSpace.stacked(singles)
    likelihood = TargetLikelihood(engine, space, plan, autocast=config.autocast, at_once=at_once)
    with placed([goal.prompts for goal in goals], singles[0]) as shown:
        aims = [
            Goal(
                prompts=prompts,
                targets=target_tokens(engine, goal.targets),
                epsilon_255=goal.epsilon_255,
                step_size_255=goal.step_size_255,
                seed=goal.seed,
            )
            for goal, prompts in zip(goals, shown, strict=True)
        ]
        starts = [
            descend(
                likelihood,
                space,
                aims,
                config,
                restart=restart,
                looks=looks,
                progress=_counted(progress, restart, config),
            )
            for restart in range(config.restarts)
        ]
    spent = (time.perf_counter() - began) / len(goals)
    return [
        _result(single, runs, spent)
        for single, runs in zip(singles, zip(*starts, strict=True), strict=True)
    ]


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
        pairs: prompts, their picture in place, and target tokens.
        plan: the defence, or None.

    Returns:
        The loss, and a (3, height, width) float32 gradient.
    """
    likelihood = TargetLikelihood(engine, space, plan)
    (loss,), gradient = likelihood.gradient(pixels[None], [pairs])
    return loss, gradient[0]


def target_loss(
    engine: HfEngine,
    space: PixelSpace,
    pixels: Tensor,
    pairs: Sequence[Pair],
    *,
    plan: SteeringPlan | None = None,
) -> float:
    """Mean negative log-likelihood per target token; arguments as in `loss_and_gradient`."""
    (loss,) = TargetLikelihood(engine, space, plan).losses(pixels[None], [pairs])
    return loss


def _result(space: PixelSpace, runs: Sequence[Descent], spent: float) -> PgdResult:
    best = min(runs, key=lambda run: run.looks[-1].loss)
    return PgdResult(
        image=space.picture(best.looks[-1].pixels),
        clean=space.picture(space.clean),
        losses=tuple(best.losses),
        clean_loss=runs[0].looks[0].loss,  # the first start is the clean picture
        attacked_loss=best.looks[-1].loss,
        checkpoints=tuple(_checkpoint(space, look) for look in best.looks),
        restart_losses=tuple(run.looks[-1].loss for run in runs),
        pairs=sum(run.pairs for run in runs),
        wall_s=spent,
    )


def _checkpoint(space: PixelSpace, look: Look) -> Checkpoint:
    return Checkpoint(step=look.step, loss=look.loss, image=space.picture(look.pixels))


def _counted(progress: Progress | None, restart: int, config: AttackConfig) -> Progress | None:
    """Progress of one start as a part of all of them."""
    if progress is None:
        return None
    return lambda done, steps, what: progress(
        restart * steps + done, config.restarts * steps, f"{config.name} {what}"
    )


@contextmanager
def placed(prompts: Sequence[Sequence[Prompt]], space: PixelSpace) -> Iterator[list[list[Prompt]]]:
    """The prompts of each picture with a clean one, which holds the place of the attacked one."""
    if not prompts or not all(prompts):
        raise DataError("the attack needs at least one prompt, got none")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "clean.png"
        space.picture(space.clean).save(place, format="PNG")
        yield [[replace(prompt, image=str(place)) for prompt in several] for several in prompts]


def target_tokens(engine: HfEngine, targets: Sequence[str | Sequence[int]]) -> list[Tokens]:
    """Token ids of every target; DataError where one has none."""
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
