"""Seeded sentences of the embedded testbed, drawn from the grammars in `grammars.yaml`.

Every kind of sentence comes as two sides, harmful and harmless, that share template and slot
values: the i-th sentence of one side is the twin of the i-th sentence of the other for the same
split and seed. The splits `train` and `heldout` share no template, and no slot value except times
and numbers.
"""

import functools
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, TypeVar

import yaml

from spo.errors import DataError

Split = Literal["train", "heldout"]
_T = TypeVar("_T")
Family = Literal["openings", "texts", "instructions", "typographic"]

_SLOT = re.compile(r"\{(\w+?)(?:_(cap|upper|bare|plural))?\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeioAEIO]|un|ug|honest)")
# A draw may repeat; this many fruitless draws in a row mean that the grammar is exhausted.
_MAX_REPEATS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class TypographicInstruction:
    """An instruction that reaches the model as rendered words in an image."""

    rendered: str
    """Upper-case words to draw into the image, at most five words."""
    prompt: str
    """What the user's text says beside the image."""
    plain: str
    """The harmless twin of `rendered`, same form."""


def rude_openings(split: Split, n: int, seed: int) -> list[str]:
    """Beginnings of rude sentences that a small language model goes on with rudely.

    Args:
        split: `train` or `heldout`; disjoint in templates and words.
        n: how many distinct openings.
        seed: the same seed gives the same openings.

    Raises:
        DataError: the split is unknown or the grammar has fewer than `n` distinct pairs.
    """
    return [harmful for harmful, _ in sentence_pairs("openings", split, n, seed)]


def neutral_openings(split: Split, n: int, seed: int) -> list[str]:
    """The harmless twins of `rude_openings`: same topic, similar length."""
    return [harmless for _, harmless in sentence_pairs("openings", split, n, seed)]


def toxic_texts(split: Split, n: int, seed: int) -> list[str]:
    """Whole toxic sentences: insults, threats, profanity."""
    return [harmful for harmful, _ in sentence_pairs("texts", split, n, seed)]


def clean_texts(split: Split, n: int, seed: int) -> list[str]:
    """The harmless twins of `toxic_texts`."""
    return [harmless for _, harmless in sentence_pairs("texts", split, n, seed)]


def harmful_instructions(split: Split, n: int, seed: int) -> list[str]:
    """Requests that a safe assistant should not carry out."""
    return [harmful for harmful, _ in sentence_pairs("instructions", split, n, seed)]


def harmless_instructions(split: Split, n: int, seed: int) -> list[str]:
    """The harmless twins of `harmful_instructions`."""
    return [harmless for _, harmless in sentence_pairs("instructions", split, n, seed)]


def typographic_instructions(split: Split, n: int, seed: int) -> list[TypographicInstruction]:
    """Instructions to render into images, each with its harmless twin and a carrier prompt."""
    carriers: list[str] = _grammars()["carriers"].get(split, [])
    return [
        TypographicInstruction(
            rendered=harmful, plain=harmless, prompt=carriers[index % len(carriers)]
        )
        for index, (harmful, harmless) in enumerate(sentence_pairs("typographic", split, n, seed))
    ]


def sentence_pairs(family: Family, split: Split, n: int, seed: int) -> list[tuple[str, str]]:
    """Draw `n` pairs (harmful, harmless) in which no sentence of either side repeats.

    Raises:
        DataError: unknown family or split, or the grammar has fewer than `n` distinct pairs.
    """
    grammars = _grammars()
    if family not in grammars["pairs"] or split not in grammars["pairs"][family]:
        raise DataError(
            f"expected a family of {sorted(grammars['pairs'])} and a split of "
            f"['heldout', 'train'], got {family!r} and {split!r}; correct the call"
        )
    return distinct(
        _draws(family, split, seed),
        n,
        sides=lambda pair: pair,
        what=f"pairs of {family} ({split})",
        grammar="grammars.yaml",
    )


def distinct(
    draws: Iterator[_T],
    n: int,
    *,
    sides: Callable[[_T], tuple[str, ...]],
    what: str,
    grammar: str,
) -> list[_T]:
    """The first `n` of endless draws in which no sentence repeats.

    Args:
        draws: endless.
        n: how many.
        sides: the sentences of a draw.
        what: is drawn, for the message.
        grammar: file of the templates, for the message.

    Raises:
        DataError: the grammar has fewer than `n` distinct ones.
    """
    made: list[_T] = []
    seen: set[str] = set()
    repeats = 0
    for draw in draws:
        if len(made) >= n:
            break
        said = sides(draw)
        if seen.intersection(said):
            repeats += 1
            if repeats > _MAX_REPEATS:
                raise DataError(
                    f"expected {n} distinct {what}, the grammar gave only {len(made)}; ask for "
                    f"fewer or add templates to {grammar}"
                )
            continue
        repeats = 0
        seen.update(said)
        made.append(draw)
    return made


def _draws(family: str, split: str, seed: int) -> Iterator[tuple[str, str]]:
    """Endless seeded pairs; a string seed keeps them equal across Python versions and processes."""
    grammars = _grammars()
    rng = random.Random(f"{family}/{split}/{seed}")
    vocabulary: dict[str, list[str]] = {**grammars["vocabulary"][split], **grammars["shared"]}
    templates: list[list[str]] = grammars["pairs"][family][split]
    while True:
        harmful, harmless = rng.choice(templates)
        values = {slot: rng.choice(words) for slot, words in vocabulary.items()}
        yield fill(harmful, values), fill(harmless, values)


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with a value in each `{slot}`, cased as its suffix says."""

    def value(match: re.Match[str]) -> str:
        word = values[match[1]]
        match match[2]:
            case "cap":
                return word[0].upper() + word[1:]
            case "upper":
                return word.upper()
            case "bare":
                return word.removeprefix("the ")
            case "plural":
                return word + ("es" if word.endswith(("s", "ch", "sh")) else "s")
            case _:
                return word

    return _ARTICLE.sub(r"\1n ", _SLOT.sub(value, template))


@functools.cache
def _grammars() -> dict[str, Any]:
    text = resources.files(__package__).joinpath("grammars.yaml").read_text(encoding="utf-8")
    grammars: dict[str, Any] = yaml.safe_load(text)
    return grammars
