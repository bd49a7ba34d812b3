"""From a `DatasetConfig` to prompts: read, convert, check, draw."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from pathlib import Path

from spo.config.datasets import DatasetConfig
from spo.datasets.formats import READERS, Found
from spo.datasets.prompts import read_prompts
from spo.datasets.rows import Row, hub_rows, read_rows
from spo.errors import DataError
from spo.files import write_atomic
from spo.records import Prompt, PromptKind, Split

_PICTURE_FOLDERS = (".", "images", "imgs", "images/SafeBench", "multimodal_behavior_images")


def load_prompts(
    config: DatasetConfig, *, cache: Path, seed: int = 0, split: Split = Split.TRAIN
) -> list[Prompt]:
    """All rows of a data set, or `config.rows` of each kind.

    Args:
        config: format, place, selection.
        cache: folder where pictures that come as bytes (Parquet, hub) are kept as files.
        seed: decides which rows are drawn where there are more than `config.rows`.
        split: marked on every prompt.

    Raises:
        DataError: the file is not there or cannot be read; a row is not of the format (the first
            bad row is named with what was expected); an id occurs twice; a picture is missing;
            nothing is left.
    """
    if config.format == "prompts":
        found, bad = read_prompts(Path(config.path))
        if bad:
            raise DataError(f"{bad[0].row_id}: {bad[0].reason}")
    else:
        found = list(_prompts(config, cache, split))
    wanted = [p for p in found if config.select is None or p.kind is config.select]
    if not wanted:
        raise DataError(
            f"{config.path}: no row of kind {config.select or 'any'} in {len(found)} rows of "
            f"format {config.format!r}; check 'select', 'kind' and 'harm_labels'"
        )
    return _drawn(wanted, config.rows, seed)


def _prompts(config: DatasetConfig, cache: Path, split: Split) -> Iterator[Prompt]:
    reader = READERS[config.format]
    name = re.sub(r"[^\w.-]+", "_", f"{config.format}-{Path(config.path).stem}")
    seen: dict[str, str] = {}
    number = 0
    for row in _rows(config):
        for found in reader(row, config):
            prompt_id = f"{name}-{found.row_id if found.row_id is not None else number}"
            number += 1
            if prompt_id in seen:
                raise row.bad(f"id {found.row_id!r} occurs twice, first at {seen[prompt_id]}")
            seen[prompt_id] = row.where
            picture = _picture(found, row, config, cache)
            if picture is None and found.picture is not None:
                continue
            yield Prompt(
                prompt_id=prompt_id,
                text=found.text,
                kind=found.kind,
                format=config.layout or found.layout,
                image=picture,
                category=found.category,
                split=split,
                reference=found.reference,
            )


def _rows(config: DatasetConfig) -> Iterator[Row]:
    if config.format != "hub":
        return read_rows(Path(config.path))
    return hub_rows(
        config.path,
        subset=config.subset,
        split=config.split,
        revision=config.revision,
        pictures=[config.columns.get("image", "image")],
    )


def _picture(found: Found, row: Row, config: DatasetConfig, cache: Path) -> str | None:
    """Absolute path of a row's picture; None where there is none or it may be missing."""
    if found.picture is None:
        return None
    if isinstance(found.picture, bytes):
        return str(_kept(found.picture, cache / "pictures"))
    path = Path(config.path).absolute()
    beside = path if path.is_dir() else path.parent
    # Upstream repositories keep pictures beside the file or beside the file's folder.
    places = [top / sub for top in (beside, beside.parent) for sub in _PICTURE_FOLDERS]
    for folder in [config.images.absolute()] if config.images else places:
        file = folder / found.picture
        if file.is_file():
            return str(file)
    if config.skip_missing_images:
        return None
    looked = config.images or f"{beside} (also {', '.join(_PICTURE_FOLDERS[1:])}) or its parent"
    raise row.bad(
        f"picture {found.picture!r} is not in {looked}; set 'images' to the folder of the "
        "pictures, or skip_missing_images=true to leave such rows out"
    )


def _kept(content: bytes, folder: Path) -> Path:
    """Encoded pictures are kept under their content hash, byte for byte."""
    file = folder / f"{hashlib.sha256(content).hexdigest()[:32]}.img"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(file, content)
    return file


def _drawn(prompts: list[Prompt], rows: int | None, seed: int) -> list[Prompt]:
    """At most `rows` of each kind in file order."""
    if rows is None:
        return prompts
    kept: set[str] = set()
    for kind in PromptKind:
        ids = [prompt.prompt_id for prompt in prompts if prompt.kind is kind]
        chosen = random.Random(f"{seed}-{kind}").sample(ids, min(rows, len(ids)))
        kept.update(chosen)
    return [prompt for prompt in prompts if prompt.prompt_id in kept]
