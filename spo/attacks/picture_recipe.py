"""The whole set of attack pictures of a model: radius x objective x split, many at once.

In: an `HfEngine`, prompts and clean start pictures of each split, targets of each objective. Out:
`MadePicture`s for `write_picture_set`. Pictures share forward passes; each keeps its own ball,
pairs and seed, so none depends on its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from PIL import Image

from spo.attacks.descent import Progress
from spo.attacks.objectives import Objective
from spo.attacks.pgd import PgdResult, PictureGoal, joint_pgd
from spo.attacks.picture_set import MadePicture, PictureSplit
from spo.config.attacks import PgdConfig
from spo.engines.forward import SteeringPlan
from spo.engines.hf.engine import HfEngine
from spo.errors import DataError
from spo.records import Prompt

RECIPE_VERSION = 1
"""Raised whenever the same inputs would give other pictures."""
_WIDEST_STEP = 10.0


BUDGET = PgdConfig(
    steps=400,
    pairs_per_step=8,
    schedule="cosine",
    final_step=0.05,
    flat_steps=60,
    flat_gain=0.005,
)
"""What each shipped picture costs at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureRecipe:
    """How many pictures of which kinds, and at what budget, e.g. `PictureRecipe(per_split=2)`."""

    radii: tuple[float, ...] = (16.0, 32.0, 255.0)
    """L-infinity radii in units of 1/255."""
    per_split: int = 8
    """Pictures of each split, objective and radius."""
    budget: PgdConfig = BUDGET
    """Steps, schedule, pairs per step, restarts, early stop; radius and step size are not used."""
    pictures_at_once: int = 24
    """Pictures that share forward passes."""
    seed: int = 0
    """Of the first picture; each has the next one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Wish:
    """One picture that is to be made."""

    split: PictureSplit
    objective: Objective
    goal: PictureGoal


def make_pictures(
    engine: HfEngine,
    requests_by_split: Mapping[PictureSplit, Mapping[Objective, Sequence[Prompt]]],
    targets: Mapping[Objective, Sequence[str]],
    *,
    starts_by_split: Mapping[PictureSplit, Sequence[Image.Image]],
    recipe: PictureRecipe = PictureRecipe(),
    plan: SteeringPlan | None = None,
    progress: Progress | None = None,
) -> list[MadePicture]:
    """Make the pictures of every split, for each objective that `targets` has, at each radius.

    Args:
        engine: the model to attack, with gradients. On a GPU a forward pass has the pairs of all
            pictures that are made together; on a CPU at most the engine's batch size.
        requests_by_split: prompts that the pictures of a split and an objective are to work on.
        targets: texts that each objective makes likely.
        starts_by_split: at least `recipe.per_split` clean pictures; splits must not share one.
        recipe: how many, of which radius, at what budget.
        plan: the defence to attack through; None attacks the unsteered model.
        progress: called after every step with the steps of all pictures together.

    Raises:
        DataError: a split lacks prompts or start pictures, or an objective lacks targets.
        EngineError: the model's processor does not fit.
    """
    wishes = _wishes(requests_by_split, targets, starts_by_split, recipe)
    made: list[MadePicture] = []
    on_gpu = engine.device.type == "cuda"
    for first in range(0, len(wishes), recipe.pictures_at_once):
        part = wishes[first : first + recipe.pictures_at_once]
        results = joint_pgd(
            engine,
            [wish.goal for wish in part],
            config=recipe.budget,
            plan=plan,
            at_once=len(part) * recipe.budget.pairs if on_gpu else None,
            progress=_counted(progress, first, len(part), len(wishes)),
        )
        made += [_made(wish, result) for wish, result in zip(part, results, strict=True)]
    return made


def _wishes(
    requests_by_split: Mapping[PictureSplit, Mapping[Objective, Sequence[Prompt]]],
    targets: Mapping[Objective, Sequence[str]],
    starts_by_split: Mapping[PictureSplit, Sequence[Image.Image]],
    recipe: PictureRecipe,
) -> list[_Wish]:
    """Every picture that is to be made; those of a kind follow each other."""
    wishes: list[_Wish] = []
    for split, objective in product(requests_by_split, targets):
        starts = starts_by_split.get(split, ())
        prompts = requests_by_split[split].get(objective, ())
        if len(starts) < recipe.per_split or not prompts or not targets[objective]:
            raise DataError(
                f"attack pictures of split {split!r} towards {objective!r}: expected at least "
                f"{recipe.per_split} start pictures, a prompt and a target, got {len(starts)}, "
                f"{len(prompts)} and {len(targets[objective])}"
            )
        for radius, start in product(recipe.radii, starts[: recipe.per_split]):
            goal = PictureGoal(
                image=start,
                prompts=prompts,
                targets=targets[objective],
                epsilon_255=radius,
                step_size_255=step_size(radius),
                seed=recipe.seed + len(wishes),
            )
            wishes.append(_Wish(split=split, objective=objective, goal=goal))
    return wishes


def step_size(radius: float) -> float:
    """First step of a picture of this radius, both in units of 1/255."""
    return min(radius / 8, _WIDEST_STEP)


def _made(wish: _Wish, result: PgdResult) -> MadePicture:
    return MadePicture(
        image=result.image,
        start=result.clean,
        split=wish.split,
        objective=wish.objective,
        epsilon_255=wish.goal.epsilon_255,
        restarts=len(result.restart_losses),
        seed=wish.goal.seed,
        pairs=result.pairs,
        first_loss=result.clean_loss,
        last_loss=result.attacked_loss,
        losses=result.losses,
    )


def _counted(progress: Progress | None, before: int, here: int, every: int) -> Progress | None:
    """Progress of one batch in steps of all pictures."""
    if progress is None:
        return None
    return lambda done, steps, what: progress(
        before * steps + here * done,
        every * steps,
        f"pictures {before + 1}-{before + here} of {every}: {what}",
    )
