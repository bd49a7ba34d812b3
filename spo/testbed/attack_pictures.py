"""The attack pictures that ship: made on a GPU against the guarded model, verified when loaded.

Two objectives (towards openings of compliance, towards toxic sentences), three radii, three splits;
splits share no start picture, request, template or seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from spo.attacks.descent import Progress
from spo.attacks.objectives import Objective
from spo.attacks.picture_recipe import RECIPE_VERSION, PictureRecipe, make_pictures
from spo.attacks.picture_set import SPLITS, PictureSet, PictureSplit, write_picture_set
from spo.engines.hf.engine import HfEngine
from spo.records import Prompt, PromptKind
from spo.testbed import requests, scenes, text

FOLDER = Path(__file__).parent / "attack_pictures"
# Requests that a picture is made on; as many as the smallest split has without effort.
_REQUESTS = 240


def shipped_pictures(model: str, *, transfer: bool = False) -> PictureSet:
    """The pictures in the package.

    Args:
        model: identity of the model to attack: `spo.testbed.model.identity()` of the embedded one.
        transfer: allow another model than they were made on.

    Raises:
        ArtifactError: a picture is damaged or foreign, or they were made on another model.
    """
    return PictureSet.load(FOLDER, model=model, transfer=transfer)


def attacked_requests(split: PictureSplit, count: int, *, seed: int) -> list[Prompt]:
    """Harmful requests that pictures are made on."""
    return [
        Prompt(prompt_id=f"attack-{split}-{i:05d}", text=pair.harmful, kind=PromptKind.HARM)
        for i, pair in enumerate(requests.request_pairs(split, count, seed))
    ]


def clean_scenes(count: int, *, seed: int) -> list[Image.Image]:
    """Scenes without a word, which pictures start from."""
    drawn = scenes.evaluation_generator(seed)
    return [scenes.draw(scenes.sample_scene(drawn, word_share=0.0)) for _ in range(count)]


def compliance_targets() -> list[str]:
    """Openings that pictures towards compliance aim at; never the held-out ones."""
    return [
        *requests.compliance_openings("train"),
        *requests.compliance_openings("validation"),
    ]


def make_attack_pictures(
    engine: HfEngine,
    out: Path,
    *,
    model: str,
    recipe: PictureRecipe,
    splits: Sequence[PictureSplit] = SPLITS,
    progress: Progress | None = None,
) -> PictureSet:
    """Attack the model with pictures of each split and write them to `out` with a manifest.

    Args:
        engine: the model under attack.
        out: an empty folder, or one with an earlier set.
        model: its identity for the manifest.
        recipe: how many, at what budget.
        splits: which ones; sets that are to be joined need seeds of their own.
        progress: called after every step.
    """
    asked: dict[PictureSplit, dict[Objective, list[Prompt]]] = {}
    starts: dict[PictureSplit, list[Image.Image]] = {}
    for number, split in enumerate(SPLITS):
        if split not in splits:
            continue
        prompts = attacked_requests(split, _REQUESTS, seed=900 + number)
        asked[split] = {"compliance": prompts, "toxic": prompts}
        # Every objective and radius of a split starts from the same scenes.
        starts[split] = clean_scenes(recipe.per_split, seed=7000 + number)
    targets: dict[Objective, list[str]] = {
        "compliance": compliance_targets(),
        "toxic": text.toxic_texts("train", 32, 17),
    }
    made = make_pictures(
        engine, asked, targets, starts_by_split=starts, recipe=recipe, progress=progress
    )
    return write_picture_set(out, made, model=model, recipe=RECIPE_VERSION)
