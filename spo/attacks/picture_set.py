"""Attack pictures in a folder: PNG files and a `manifest.json` that says what each one is.

In: pictures that `spo.attacks.picture_recipe` made. Out: a `PictureSet`, written and read. Reading
trusts nothing: every file's sha256, every picture's distance from its start picture, the model that
the set was made on, and that no two splits share a picture, a start picture or a seed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import ConfigDict, TypeAdapter, ValidationError

from spo.attacks.objectives import Objective
from spo.engines.base import EngineInfo
from spo.engines.processing import load_image
from spo.errors import ArtifactError, DataError
from spo.files import write_atomic

PictureSplit = Literal["train", "validation", "heldout"]
SPLITS: tuple[PictureSplit, ...] = ("train", "validation", "heldout")
MANIFEST = "manifest.json"
CURVE_POINTS = 64
_FORMAT = "spo-attack-pictures/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackPicture:
    """One picture of a set, as its manifest has it."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    file: str
    """Name in the set's folder, e.g. "heldout-compliance-16-03.png"."""
    sha256: str
    """Of the file."""
    split: PictureSplit
    objective: Objective
    epsilon_255: float
    """L-infinity radius around the start picture in units of 1/255; 255 is unbounded."""
    steps: int
    """Steps of the start that was kept; fewer than the recipe's where the curve was flat."""
    restarts: int
    """Starts, of which the best was kept."""
    seed: int
    """Of the draws and of random starts; no two pictures of a set share it."""
    start: str
    """Name of the start picture's file in the folder; "" where it is not known."""
    start_sha256: str
    """Of that file, or ""."""
    pairs: int
    """(prompt, target) pairs whose gradient was computed."""
    first_loss: float
    """Mean negative log-likelihood per target token of the start picture, on held-apart pairs."""
    last_loss: float
    """The same of this picture."""
    curve: tuple[tuple[int, float], ...]
    """(last step, mean loss) of at most `CURVE_POINTS` equal parts of the steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Manifest:
    """What `manifest.json` holds."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    format: Literal["spo-attack-pictures/1"]
    model: str
    recipe: int
    defence: str
    pictures: tuple[AttackPicture, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureSet:
    """A verified set of attack pictures."""

    folder: Path
    model: str
    """Identity of the model that the pictures were made on."""
    recipe: int
    """Version of the recipe that made them."""
    defence: str
    """Digest of the steering that they were made through; "" for the unsteered model."""
    pictures: tuple[AttackPicture, ...]
    transfer: bool
    """The pictures are used on another model than they were made on."""

    @classmethod
    def load(cls, folder: Path, *, model: str, transfer: bool = False) -> PictureSet:
        """Read and verify a set.

        Args:
            folder: with `manifest.json` and the pictures.
            model: identity of the model to attack, see `model_identity_of`.
            transfer: allow a set of another model; the set then says that it is one.

        Raises:
            ArtifactError: a file is missing, damaged, or not in the manifest; the manifest has an
                unknown field or another model; a picture is outside its ball; splits share one.
        """
        manifest = _read_manifest(folder / MANIFEST)
        if manifest.model != model and not transfer:
            raise ArtifactError(
                f"{folder}: the pictures were made on model {manifest.model!r}, not on {model!r}; "
                "make them for this model, or ask for them as transfer (transfer=True)"
            )
        listed = {name for p in manifest.pictures for name in (p.file, p.start) if name}
        foreign = sorted(path.name for path in folder.glob("*.png") if path.name not in listed)
        if foreign:
            raise ArtifactError(
                f"{folder}: {foreign[0]} is not in {MANIFEST} ({len(foreign)} such files); remove "
                "it, or make the set again"
            )
        for picture in manifest.pictures:
            _check_picture(folder, picture)
        _check_splits(folder, manifest.pictures)
        return cls(
            folder=folder,
            model=manifest.model,
            recipe=manifest.recipe,
            defence=manifest.defence,
            pictures=manifest.pictures,
            transfer=manifest.model != model,
        )

    def select(
        self,
        split: PictureSplit,
        *,
        objective: Objective | None = None,
        epsilon_255: float | None = None,
    ) -> tuple[AttackPicture, ...]:
        """Pictures of a split, in the manifest's order; None takes every objective or radius.

        Raises:
            ArtifactError: there is none.
        """
        found = tuple(
            picture
            for picture in self.pictures
            if picture.split == split
            and objective in (None, picture.objective)
            and epsilon_255 in (None, picture.epsilon_255)
        )
        if not found:
            kinds = sorted({(p.split, p.objective, p.epsilon_255) for p in self.pictures})
            raise ArtifactError(
                f"{self.folder} has no {split} picture of objective {objective} and radius "
                f"{epsilon_255}; it has {kinds}"
            )
        return found

    def path(self, picture: AttackPicture) -> Path:
        """Where the picture's PNG is."""
        return self.folder / picture.file


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MadePicture:
    """A picture that is in no folder yet."""

    image: Image.Image
    start: Image.Image
    """The clean picture at the same size: the centre of the ball."""
    split: PictureSplit
    objective: Objective
    epsilon_255: float
    restarts: int
    seed: int
    pairs: int
    first_loss: float
    last_loss: float
    losses: Sequence[float]
    """Of every step."""


def model_identity_of(info: EngineInfo) -> str:
    """Name and revision of a model, as a manifest has it.

    A local folder's revision changes with the JSON that its Transformers version writes; where the
    folder's makings have a digest of their own, that is the better identity.
    """
    return f"{info.model_id}@{info.model_revision}" if info.model_revision else info.model_id


def write_picture_set(
    folder: Path, made: Sequence[MadePicture], *, model: str, recipe: int, defence: str = ""
) -> PictureSet:
    """Write a set, verify it by reading it, and put it in place of an earlier one.

    Args:
        folder: the set's; it may hold an earlier set, or nothing.
        made: the pictures.
        model: identity of the model that they were made on.
        recipe: version of the recipe.
        defence: digest of the steering that they were made through.

    Raises:
        ArtifactError: the folder holds something else, or the pictures are refused.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise ArtifactError(
            f"{folder} has files and no {MANIFEST}; expected an earlier set or an empty folder: "
            "choose another folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".pictures-", dir=folder.parent))
    try:
        building.chmod(0o755)  # mkdtemp's folders are for their owner only
        pictures = [_written(building, picture, made[:place]) for place, picture in enumerate(made)]
        content = {
            "format": _FORMAT,
            "model": model,
            "recipe": recipe,
            "defence": defence,
            "pictures": [asdict(picture) for picture in pictures],
        }
        write_atomic(building / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())
        PictureSet.load(building, model=model)
        if folder.exists():
            shutil.rmtree(folder)
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return PictureSet.load(folder, model=model)


def thinned(losses: Sequence[float], points: int = CURVE_POINTS) -> tuple[tuple[int, float], ...]:
    """(last step, mean loss) of at most `points` equal parts of a curve."""
    parts = np.array_split(np.asarray(losses, dtype=np.float64), min(points, len(losses)) or 1)
    ends = np.cumsum([len(part) for part in parts])
    return tuple(
        (int(end), round(float(part.mean()), 4))
        for end, part in zip(ends, parts, strict=True)
        if len(part)
    )


def _written(folder: Path, made: MadePicture, before: Sequence[MadePicture]) -> AttackPicture:
    kind = f"{made.split}-{made.objective}-{made.epsilon_255:g}"
    number = sum(
        (other.split, other.objective, other.epsilon_255)
        == (made.split, made.objective, made.epsilon_255)
        for other in before
    )
    file = f"{kind}-{number:02d}.png"
    made.image.convert("RGB").save(folder / file, format="PNG")
    start = f"start-{_pixel_digest(made.start)[:16]}.png"
    made.start.convert("RGB").save(folder / start, format="PNG")
    return AttackPicture(
        file=file,
        sha256=_sha256(folder / file),
        split=made.split,
        objective=made.objective,
        epsilon_255=float(made.epsilon_255),
        steps=len(made.losses),
        restarts=made.restarts,
        seed=made.seed,
        start=start,
        start_sha256=_sha256(folder / start),
        pairs=made.pairs,
        first_loss=round(made.first_loss, 4),
        last_loss=round(made.last_loss, 4),
        curve=thinned(made.losses),
    )


def _read_manifest(path: Path) -> _Manifest:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"{path.parent} has no readable {MANIFEST} ({error.strerror}); expected a folder of "
            "attack pictures"
        ) from error
    try:
        return TypeAdapter(_Manifest).validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ArtifactError(
            f"{path}: expected a manifest of format {_FORMAT}, got at {place}: {first['msg']} "
            f"({error.error_count()} such places); make the set again"
        ) from error


def _check_picture(folder: Path, picture: AttackPicture) -> None:
    image = _verified(folder, picture.file, picture.sha256)
    if not picture.start:
        return
    start = _verified(folder, picture.start, picture.start_sha256)
    pixels, centre = (np.asarray(i, dtype=np.int16) for i in (image, start))
    if pixels.shape != centre.shape:
        raise ArtifactError(
            f"{folder / picture.file}: expected the size of its start picture {start.size}, got "
            f"{image.size}; make the set again"
        )
    moved = int(np.abs(pixels - centre).max())
    if moved > picture.epsilon_255:
        raise ArtifactError(
            f"{folder / picture.file}: {moved}/255 away from {picture.start}, outside its radius "
            f"of {picture.epsilon_255:g}/255; make the set again"
        )


def _verified(folder: Path, name: str, sha256: str) -> Image.Image:
    path = folder / name
    if Path(name).name != name or path.suffix != ".png" or not path.is_file():
        raise ArtifactError(
            f"{folder / MANIFEST} names {name!r}; expected a PNG file in its own folder that is "
            "there: copy the whole folder, or make the set again"
        )
    found = _sha256(path)
    if found != sha256:
        raise ArtifactError(
            f"{path}: the manifest is for sha256 {sha256[:12]}, the file has {found[:12]}; it was "
            "damaged or exchanged: restore it, or make the set again"
        )
    try:
        return load_image(str(path))
    except DataError as error:
        raise ArtifactError(str(error)) from error


def _check_splits(folder: Path, pictures: Sequence[AttackPicture]) -> None:
    """Raise ArtifactError when two splits share a picture, a start picture or a seed."""
    digests = {
        name: _pixel_digest(load_image(str(folder / name)))
        for name in {name for p in pictures for name in (p.file, p.start) if name}
    }
    marks: tuple[tuple[str, dict[Any, AttackPicture]], ...]
    for one, other in combinations(SPLITS, 2):
        left, right = ([p for p in pictures if p.split == split] for split in (one, other))
        marks = (
            ("the picture", {digests[p.file]: p for p in left}),
            ("the start picture", {digests[p.start]: p for p in left if p.start}),
            ("the seed", {p.seed: p for p in left}),
        )
        for picture in right:
            keys = (digests[picture.file], digests.get(picture.start), picture.seed)
            for (what, seen), key in zip(marks, keys, strict=True):
                if key in seen:
                    raise ArtifactError(
                        f"{folder}: {seen[key].file} ({one}) and {picture.file} ({other}) share "
                        f"{what}; splits must share none: make the set again with other starts "
                        "and seeds"
                    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _pixel_digest(image: Image.Image) -> str:
    """Digest of the pixels, whatever the file's compression."""
    rgb = image.convert("RGB")
    return hashlib.sha256(repr(rgb.size).encode() + rgb.tobytes()).hexdigest()
