"""Sample answers side by side, chosen by a stated rule, and the pictures that go with them."""

from __future__ import annotations

import base64
import functools
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from spo.records import EvaluatedAnswer, EvaluationReport
from spo.report.headline import final_defence
from spo.report.metrics import condition_name, conditions_of, defence_name, defences_of

_Key = tuple[str, str]
"""Condition and prompt id."""
VEIL_FROM = 0.25
"""Answers judged at least this toxic, or not judged, are blurred until asked for."""
PER_CONDITION = 3
WORST = 3
_MAX_PIXELS = 50_000_000
_SAMPLE_PIXELS = 320
_ATTACK_PIXELS = 448

CHOICE = (
    f"For each condition the {PER_CONDITION} prompts are evenly spaced over the list, whatever "
    f"their answers; after them come the {WORST} answers that the judge found most toxic with the "
    "final defence. Always the first sample."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownAnswer:
    """One answer of a card."""

    defence: str
    name: str
    text: str
    toxicity: float | None
    veiled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One prompt with what every defence answered."""

    prompt: str
    picture: str | None
    """data: address, or None where there is none or it cannot be read."""
    picture_note: str
    """Why a picture that belongs here is not shown; "" otherwise."""
    answers: tuple[ShownAnswer, ...]
    condition: str = ""
    """In words, where a group mixes conditions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardGroup:
    """The cards of one condition."""

    title: str
    cards: tuple[Card, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackPictures:
    """The clean picture, the attacked one and what lies between."""

    clean: str
    attacked: str
    difference: str
    """Difference, enlarged to the full range around grey; "" where sizes differ."""
    largest: int | None
    """Largest change of any colour value, in 1/255; None where sizes differ."""


def card_groups(report: EvaluationReport, folder: Path) -> list[CardGroup]:
    """Cards by condition, then the worst answers of the final defence."""
    first: dict[_Key, dict[str, EvaluatedAnswer]] = {}
    for answer in sorted(report.answers, key=lambda a: a.sample):
        first.setdefault((answer.condition, answer.prompt_id), {}).setdefault(
            answer.defence, answer
        )
    order = list(dict.fromkeys((a.condition, a.prompt_id) for a in report.answers))
    defences = defences_of(report)

    def card(key: _Key, *, mixed: bool = False) -> Card:
        rows = [first[key][defence] for defence in defences if defence in first[key]]
        return _card(rows, folder, condition_name(report, key[0]) if mixed else "")

    groups = []
    for condition in conditions_of(report):
        keys = _spaced([key for key in order if key[0] == condition], PER_CONDITION)
        title = condition_name(report, condition)
        cards = tuple(card(key) for key in keys)
        groups.append(CardGroup(title=title[:1].upper() + title[1:], cards=cards))
    final = final_defence(report)
    judged = [
        (rows[final].measures["toxicity"], key)
        for key, rows in first.items()
        if final in rows and "toxicity" in rows[final].measures
    ]
    worst = [key for _, key in sorted(judged, key=lambda item: -item[0])[:WORST]]
    if final and worst:
        title = f"Most toxic answers with {defence_name(final)}"
        cards = tuple(card(key, mixed=True) for key in worst)
        groups.append(CardGroup(title=title, cards=cards))
    return groups


def _spaced(keys: Sequence[_Key], count: int) -> list[_Key]:
    if len(keys) <= count:
        return list(keys)
    return [keys[round(i * (len(keys) - 1) / (count - 1))] for i in range(count)]


def _card(answers: Sequence[EvaluatedAnswer], folder: Path, condition: str) -> Card:
    one = answers[0]
    picture, note = None, ""
    if one.image:
        image = open_picture(one.image, folder)
        if image is None:
            note = f"The picture {Path(one.image).name} is no longer there or cannot be read."
        else:
            picture = _embedded(one.image, folder)
    return Card(
        prompt=one.prompt,
        picture=picture,
        picture_note=note,
        answers=tuple(_shown(answer) for answer in answers),
        condition=condition,
    )


def _shown(answer: EvaluatedAnswer) -> ShownAnswer:
    toxicity = answer.measures.get("toxicity")
    return ShownAnswer(
        defence=answer.defence,
        name=defence_name(answer.defence),
        text=answer.answer.strip() or "(no text)",
        toxicity=toxicity,
        veiled=toxicity is None or toxicity >= VEIL_FROM,
    )


def open_picture(path: str, folder: Path) -> Image.Image | None:
    """A picture as RGB, from its path as it is or relative to the run folder; None without it."""
    for candidate in (Path(path), folder / path):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(candidate) as image:
                    if image.size[0] * image.size[1] > _MAX_PIXELS:
                        return None
                    return image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
    return None


@functools.lru_cache(maxsize=64)
def _embedded(path: str, folder: Path) -> str | None:
    image = open_picture(path, folder)
    return None if image is None else data_address(image, _SAMPLE_PIXELS)


def data_address(image: Image.Image, largest: int) -> str:
    """A picture as a data: address, scaled down to `largest` pixels on its longer side."""
    small = image.copy()
    small.thumbnail((largest, largest))
    buffer = io.BytesIO()
    if small.size == image.size:
        small.save(buffer, format="PNG", optimize=True)
        return png_address(buffer.getvalue())
    small.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def png_address(png: bytes) -> str:
    """PNG bytes as a data: address."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def attack_pictures(clean: str | None, attacked: str | None, folder: Path) -> AttackPictures | None:
    """The pair of pictures of an attack; None unless both can be read."""
    before = open_picture(clean, folder) if clean else None
    after = open_picture(attacked, folder) if attacked else None
    if before is None or after is None:
        return None
    difference, largest = "", None
    if before.size != after.size:
        before = ImageOps.fit(before, after.size)
    else:
        change = np.asarray(after, dtype=np.int16) - np.asarray(before, dtype=np.int16)
        largest = int(np.abs(change).max())
        scaled = 128 + change * (127 / max(largest, 1))
        enlarged = Image.fromarray(scaled.round().astype(np.uint8))
        difference = data_address(enlarged, _ATTACK_PIXELS)
    return AttackPictures(
        clean=data_address(before, _ATTACK_PIXELS),
        attacked=data_address(after, _ATTACK_PIXELS),
        difference=difference,
        largest=largest,
    )
