"""What a caller holds in a list, texts and pictures, as `Prompt` records."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Literal, TypeVar

from PIL import Image

from spo.errors import ConfigError, DataError
from spo.records import Prompt, PromptFormat, PromptKind

Item = str | tuple[str | Path | Image.Image, str]
"""A text, or a picture (an object of Pillow or a path) with a text."""
Form = Literal["chat", "plain"]
"""`chat`: a user's turn through the model's template; `plain`: a text that the model continues."""
_Words = TypeVar("_Words", bound=StrEnum)


def prompts_of(
    items: Sequence[Item], form: str, kind: PromptKind, folder: Path, name: str
) -> list[Prompt]:
    """One prompt for each item, in order.

    Args:
        items: texts, or (picture, text) pairs.
        form: see `Form`.
        kind: what a good answer looks like.
        folder: where pictures that have no file yet are written; records carry paths.
        name: begins the ids, and names the list in messages.

    Raises:
        DataError: the list is empty or no list, or an item is of another form.
    """
    if isinstance(items, str) or not items:
        raise DataError(
            f"{name}: expected a list of texts or (picture, text) pairs, got {items!r}; a single "
            "one goes into a list, too"
        )
    layout = member_of(PromptFormat, form, "form")
    prompts = []
    for number, item in enumerate(items):
        picture, text = (None, item) if isinstance(item, str) else _pair(item, name, number)
        prompts.append(
            Prompt(
                prompt_id=f"{name}-{number:05d}",
                text=text,
                kind=kind,
                format=layout,
                image=None if picture is None else _path(picture, folder),
            )
        )
    return prompts


def member_of(kind: type[_Words], value: str, name: str) -> _Words:
    """The member of an enumeration; ConfigError with all of them where there is none."""
    try:
        return kind(value)
    except ValueError as error:
        known = [member.value for member in kind]
        raise ConfigError(f"{name}: expected one of {known}, got {value!r}") from error


def _pair(item: object, name: str, number: int) -> tuple[str | Path | Image.Image, str]:
    if isinstance(item, tuple) and len(item) == 2:
        picture, text = item
        if isinstance(picture, str | Path | Image.Image) and isinstance(text, str):
            return picture, text
    raise DataError(
        f"{name} {number}: expected a text or a pair (picture, text) with a Pillow picture or a "
        f"path, got {item!r}"
    )


def _path(picture: str | Path | Image.Image, folder: Path) -> str:
    if not isinstance(picture, Image.Image):
        return str(picture)
    pixels = picture.convert("RGB")
    digest = hashlib.sha256(repr(pixels.size).encode() + pixels.tobytes()).hexdigest()
    path = folder / f"{digest[:24]}.png"
    if not path.is_file():
        pixels.save(path)
    return str(path)
