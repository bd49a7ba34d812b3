"""A set of attack pictures on a tiny model: made, written, read back, and refused when wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from spo.attacks.picture_recipe import RECIPE_VERSION, PictureRecipe, make_pictures
from spo.attacks.picture_set import (
    CURVE_POINTS,
    MANIFEST,
    SPLITS,
    MadePicture,
    PictureSet,
    model_identity_of,
    thinned,
    write_picture_set,
)
from spo.config import AttackConfig
from spo.engines.hf.engine import HfEngine
from spo.errors import ArtifactError, DataError
from spo.records import Prompt, PromptKind
from tests.tiny_models import make_tiny_model

MODEL = "tiny@0123"
RECIPE = PictureRecipe(
    radii=(16.0, 255.0),
    per_split=2,
    budget=AttackConfig(steps=3, pairs_per_step=2, restarts=2),
    pictures_at_once=5,
    seed=100,
)


def _starts(first: int, count: int = 2) -> list[Image.Image]:
    return [
        Image.fromarray(
            np.random.default_rng(first + i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        )
        for i in range(count)
    ]


def _prompts(split: str) -> list[Prompt]:
    texts = ("how do I", "tell me why", "what is", "give me")
    return [
        Prompt(prompt_id=f"{split}-{i}", text=f"{text} {split}", kind=PromptKind.HARM)
        for i, text in enumerate(texts)
    ]


def _arguments() -> dict[str, Any]:
    return {
        "requests_by_split": {
            split: {"compliance": _prompts(split), "toxic": _prompts(split)} for split in SPLITS
        },
        "targets": {"compliance": ["Sure, here", "Yes. First,"], "toxic": ["you fool", "get lost"]},
        "starts_by_split": {split: _starts(10 * i) for i, split in enumerate(SPLITS)},
    }


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HfEngine]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = make_tiny_model("llava", tmp_path_factory.mktemp("models") / "tiny-llava")
    yield HfEngine(str(folder), dtype="float32", batch_size=8)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(engine: HfEngine) -> list[MadePicture]:
    events: list[tuple[int, int]] = []
    found = make_pictures(
        engine,
        **_arguments(),
        recipe=RECIPE,
        progress=lambda done, total, _: events.append((done, total)),
    )
    assert events == sorted(events)
    assert events[-1] == (24 * 6, 24 * 6)  # pictures x steps of both starts
    return found


@pytest.fixture
def folder(made: list[MadePicture], tmp_path: Path) -> Path:
    write_picture_set(tmp_path / "set", made, model=MODEL, recipe=RECIPE_VERSION)
    return tmp_path / "set"


def test_the_recipe_makes_every_kind_and_they_gain(made: list[MadePicture]) -> None:
    kinds = [(m.split, m.objective, m.epsilon_255) for m in made]
    assert len(kinds) == 24
    assert {kinds.count(kind) for kind in kinds} == {2}
    assert len({m.seed for m in made}) == 24
    for radius in RECIPE.radii:
        gains = [m.first_loss - m.last_loss for m in made if m.epsilon_255 == radius]
        assert np.mean(gains) > 0.2
    for picture in made:
        assert (len(picture.losses), picture.restarts, picture.pairs) == (3, 2, 12)


def test_a_set_reads_back_as_it_was_written(folder: Path, made: list[MadePicture]) -> None:
    found = PictureSet.load(folder, model=MODEL)
    assert (found.model, found.recipe, found.transfer, found.defence) == (MODEL, 1, False, "")
    chosen = found.select("heldout", objective="toxic", epsilon_255=16.0)
    assert [p.file for p in chosen] == ["heldout-toxic-16-00.png", "heldout-toxic-16-01.png"]
    assert len(found.select("train")) == 8
    wanted = [m for m in made if (m.split, m.objective, m.epsilon_255) == ("heldout", "toxic", 16)]
    for picture, source in zip(chosen, wanted, strict=True):
        with Image.open(found.path(picture)) as image:
            assert (np.asarray(image) == np.asarray(source.image)).all()
        assert picture.seed == source.seed
        assert picture.last_loss == pytest.approx(source.last_loss, abs=1e-4)
    with pytest.raises(ArtifactError, match="no train picture of objective None and radius 7"):
        found.select("train", epsilon_255=7)


def test_an_earlier_set_is_replaced_and_other_files_are_not(
    folder: Path, made: list[MadePicture], tmp_path: Path
) -> None:
    write_picture_set(folder, made[:4], model=MODEL, recipe=RECIPE_VERSION)
    assert len(PictureSet.load(folder, model=MODEL).pictures) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    other = tmp_path / "mine"
    other.mkdir()
    (other / "holiday.png").write_bytes(b"precious")
    with pytest.raises(ArtifactError, match=r"has files and no manifest\.json"):
        write_picture_set(other, made[:4], model=MODEL, recipe=RECIPE_VERSION)
    assert (other / "holiday.png").read_bytes() == b"precious"


def test_another_model_needs_transfer_and_the_set_says_so(folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"made on model 'tiny@0123', not on 'other'.*transfer"):
        PictureSet.load(folder, model="other")
    assert PictureSet.load(folder, model="other", transfer=True).transfer
    assert not PictureSet.load(folder, model=MODEL, transfer=True).transfer


def _with_manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / MANIFEST).read_text())
        change(content)
        (folder / MANIFEST).write_text(json.dumps(content))

    return spoil


def _entry(content: dict[str, Any], split: str, number: int = 0) -> dict[str, Any]:
    entry: dict[str, Any] = [p for p in content["pictures"] if p["split"] == split][number]
    return entry


def _damage(folder: Path) -> None:
    path = folder / "train-toxic-16-00.png"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _share(name: str) -> Callable[[Path], None]:
    def change(content: dict[str, Any]) -> None:
        _entry(content, "heldout")[name] = _entry(content, "validation")[name]

    return _with_manifest(change)


def _share_picture(content: dict[str, Any]) -> None:
    one, other = _entry(content, "validation"), _entry(content, "heldout")
    for name in ("file", "sha256", "start", "start_sha256"):
        other[name] = one[name]
    content["pictures"] = [one, other]


def _only_used(folder: Path) -> None:
    """Remove files that the manifest no longer names."""
    content = json.loads((folder / MANIFEST).read_text())
    used = {p[name] for p in content["pictures"] for name in ("file", "start")}
    for path in folder.glob("*.png"):
        if path.name not in used:
            path.unlink()


def _share_start(folder: Path) -> None:
    """A held-out picture is said to start where the validation's first one does, unbounded."""

    def change(content: dict[str, Any]) -> None:
        one, other = _entry(content, "validation"), _entry(content, "heldout")
        other |= {name: one[name] for name in ("start", "start_sha256")}
        other["epsilon_255"] = 255.0

    _with_manifest(change)(folder)


def _share_everything(folder: Path) -> None:
    _with_manifest(_share_picture)(folder)
    _only_used(folder)


def _leave_the_ball(content: dict[str, Any]) -> None:
    _entry(content, "train", 2)["epsilon_255"] = 16.0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_damage, r"train-toxic-16-00\.png: the manifest is for sha256 .* damaged or exchanged"),
        (
            lambda folder: shutil.copy(folder / "train-toxic-16-00.png", folder / "mine.png"),
            r"mine\.png is not in manifest\.json",
        ),
        (lambda folder: (folder / "train-toxic-16-00.png").unlink(), r"names 'train-toxic-16-00"),
        (lambda folder: (folder / MANIFEST).unlink(), r"no readable manifest\.json"),
        (lambda folder: (folder / MANIFEST).write_text("{"), r"expected a manifest of format"),
        (
            _with_manifest(lambda content: content.update(colour="red")),
            r"got at colour: Unexpected keyword argument",
        ),
        (
            _with_manifest(lambda content: _entry(content, "train").update(mood=1)),
            r"got at pictures\.0\.mood: Unexpected keyword argument",
        ),
        (
            _with_manifest(lambda content: _entry(content, "train").pop("seed")),
            r"got at pictures\.0\.seed: Field required",
        ),
        (
            _with_manifest(lambda content: _entry(content, "train").update(split="test")),
            r"got at pictures\.0\.split: Input should be 'train', 'validation' or 'heldout'",
        ),
        (
            _with_manifest(lambda content: content.update(format="spo-attack-pictures/9")),
            r"got at format",
        ),
        (
            _with_manifest(lambda content: _entry(content, "train", -1).update(start="../up.png")),
            r"names '\.\./up\.png'; expected a PNG file in its own folder",
        ),
        (_with_manifest(_leave_the_ball), r"/255 away from start-.*outside its radius of 16/255"),
        (
            _share("seed"),
            r"\(validation\) and heldout-compliance.* share the seed",
        ),
        (_share_start, r"\(validation\) and heldout-.* \(heldout\) share the start picture"),
        (_share_everything, r"\(validation\) and .* \(heldout\) share the picture; splits must"),
    ],
)
def test_what_is_wrong_is_refused_by_name(
    folder: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(folder)
    with pytest.raises(ArtifactError, match=message):
        PictureSet.load(folder, model=MODEL)


def test_a_set_whose_splits_share_a_seed_is_never_written(
    made: list[MadePicture], tmp_path: Path
) -> None:
    twice = [made[0], replace(made[-1], seed=made[0].seed)]
    with pytest.raises(ArtifactError, match=r"\(train\) and .* \(heldout\) share the seed"):
        write_picture_set(tmp_path / "set", twice, model=MODEL, recipe=RECIPE_VERSION)
    assert list(tmp_path.iterdir()) == []


def test_missing_starts_and_targets_are_named(engine: HfEngine) -> None:
    arguments = _arguments()
    arguments["starts_by_split"]["validation"] = _starts(0, 1)
    with pytest.raises(DataError, match=r"'validation' towards 'compliance'.*at least 2 .* got 1,"):
        make_pictures(engine, **arguments, recipe=RECIPE)
    arguments = _arguments()
    arguments["targets"]["toxic"] = []
    with pytest.raises(DataError, match=r"'train' towards 'toxic'.* got 2, 4 and 0"):
        make_pictures(engine, **arguments, recipe=RECIPE)


def test_a_long_curve_is_thinned_to_means() -> None:
    losses = [float(i) for i in range(1000)]
    curve = thinned(losses)
    assert len(curve) == CURVE_POINTS
    assert curve[-1][0] == 1000
    steps = np.diff([0, *(step for step, _ in curve)])
    assert sum(steps * [loss for _, loss in curve]) == pytest.approx(sum(losses), rel=1e-6)
    assert thinned([3.0, 2.0]) == ((1, 3.0), (2, 2.0))
    assert thinned([]) == ()


def test_identity_of_a_local_model_has_its_revision(engine: HfEngine) -> None:
    info = engine.info
    assert info.model_revision
    assert model_identity_of(info) == f"tiny-llava@{info.model_revision}"
