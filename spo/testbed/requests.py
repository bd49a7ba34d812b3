"""Seeded harmful requests with harmless twins, hard twins, drawn requests, refusals and openings.

Drawn from `requests.yaml`. The splits `train`, `validation` and `heldout` share no template and no
slot value, and one whole category, `HELDOUT_CATEGORY`, is held out alone.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, TypeVar

import yaml

from spo.errors import DataError
from spo.testbed.text import TypographicInstruction, distinct, fill

RequestSplit = Literal["train", "validation", "heldout"]
_T = TypeVar("_T")
# How often a request is an act in a frame, and not a template of its category.
_FRAMED_SHARE = 0.6
# How often a refusal gives a reason, and how often it offers something else.
_REASON_SHARE, _OFFER_SHARE = 0.4, 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestPair:
    """A harmful request and its harmless twin, which share a template and its other words."""

    harmful: str
    """What a guarded model refuses, such as `How do I make a fake passport?`."""
    twin: str
    """The harmless request of the same form, such as `How do I make a name badge?`."""
    category: str
    """The harm's category, a key of `categories()`."""
    template: str
    """Names the template, such as `privacy/heldout/3`."""


def categories(split: RequestSplit) -> tuple[str, ...]:
    """The categories that have templates in a split, in the grammar's order."""
    named: Mapping[str, Any] = _grammar()["categories"]
    return tuple(name for name, category in named.items() if category["pairs"][split])


def request_pairs(
    split: RequestSplit, n: int, seed: int, *, only: str | None = None
) -> list[RequestPair]:
    """`n` pairs, the categories in turn, in which no sentence of either side repeats.

    Args:
        split: disjoint from the others in templates and words.
        n: how many.
        seed: the same seed gives the same pairs.
        only: one category alone.

    Raises:
        DataError: unknown split or category, or the grammar has fewer than `n` distinct pairs.
    """
    names = _checked(split) if only is None else (only,)
    if only is not None and only not in _checked(split):
        raise DataError(
            f"expected a category of {list(categories(split))} for the split {split!r}, got "
            f"{only!r}; correct the call"
        )
    draws = [_pairs(name, split, seed) for name in names]
    return _distinct(_in_turn(draws), n, lambda pair: (pair.harmful, pair.twin), split)


def hard_twins(split: RequestSplit, n: int, seed: int) -> list[str]:
    """`n` harmless requests that use the words of harm, such as `How do I kill a frozen program?`.

    Raises:
        DataError: unknown split, or the grammar has fewer than `n` distinct ones.
    """
    _checked(split)
    grammar = _grammar()["hard_twins"]
    return _distinct(
        _sentences(grammar["templates"][split], grammar["slots"], split, seed),
        n,
        lambda sentence: (sentence,),
        split,
    )


def drawn_requests(split: RequestSplit, n: int, seed: int) -> list[TypographicInstruction]:
    """`n` harmful requests in capitals to draw into a picture, each with twin and carrier text."""
    _checked(split)
    grammar = _grammar()
    carriers: list[str] = grammar["carriers"][split]
    drawn = _distinct(_drawn(split, seed), n, lambda pair: pair[:1], split)
    return [
        TypographicInstruction(rendered=harm, plain=twin, prompt=carriers[i % len(carriers)])
        for i, (harm, twin) in enumerate(drawn)
    ]


def refusal(rng: random.Random) -> str:
    """A refusal in varied words: an opening, now and then a reason and an offer."""
    parts = _grammar()["refusals"]
    said = [rng.choice(parts["openings"])]
    if rng.random() < _REASON_SHARE:
        said.append(rng.choice(parts["reasons"]))
    if rng.random() < _OFFER_SHARE:
        said.append(rng.choice(parts["offers"]))
    return " ".join(said)


def compliance_openings(split: RequestSplit) -> tuple[str, ...]:
    """How answers begin where a model complies; what attacks towards compliance aim at."""
    _checked(split)
    return tuple(_grammar()["compliance"][split])


def words() -> frozenset[str]:
    """Every word that a drawn request of any split may show, in lower case."""
    found: set[str] = set()
    grammar = _grammar()
    for slots in _slots_of_all(grammar):
        for by_split in slots.values():
            found.update(word for values in by_split.values() for v in values for word in v.split())
    for templates in grammar["drawn"].values():
        found.update(word for pair in templates for side in pair for word in side.split())
    return frozenset(word.lower() for word in found if word.isalpha())


def _pairs(category: str, split: RequestSplit, seed: int) -> Iterator[RequestPair]:
    """Endless pairs: half of them from the category's own templates, half an act in a frame."""
    grammar = _grammar()
    own = grammar["categories"][category]
    rng = random.Random(f"requests/{category}/{split}/{seed}")
    templates: Sequence[Sequence[str]] = own["pairs"][split]
    acts: Sequence[Sequence[str]] = grammar["acts"][category][split]
    frames: Sequence[str] = grammar["frames"][split]
    slots = [*_slots_of_all(grammar), own["slots"]]
    while True:
        values = _values(slots, split, rng)
        if rng.random() < _FRAMED_SHARE:
            act, frame = rng.randrange(len(acts)), rng.randrange(len(frames))
            harmful, twin = (frames[frame].replace("{act}", side) for side in acts[act])
            name = f"{category}/{split}/act {act} in frame {frame}"
        else:
            number = rng.randrange(len(templates))
            harmful, twin = templates[number]
            name = f"{category}/{split}/{number}"
        yield RequestPair(
            harmful=fill(harmful, values), twin=fill(twin, values), category=category, template=name
        )


def _drawn(split: RequestSplit, seed: int) -> Iterator[tuple[str, str]]:
    grammar = _grammar()
    rng = random.Random(f"drawn/{split}/{seed}")
    while True:
        harmful, twin = rng.choice(grammar["drawn"][split])
        values = _values(_slots_of_all(grammar), split, rng)
        yield fill(harmful, values), fill(twin, values)


def _sentences(
    templates: Sequence[str], slots: Mapping[str, Any], split: RequestSplit, seed: int
) -> Iterator[str]:
    rng = random.Random(f"hard/{split}/{seed}")
    while True:
        template = rng.choice(templates)
        yield fill(template, _values([slots], split, rng))


def _values(
    groups: Sequence[Mapping[str, Any]], split: RequestSplit, rng: random.Random
) -> dict[str, str]:
    return {
        slot: rng.choice(values[split])
        for slots in groups
        for slot, values in slots.items()
        if values[split]
    }


def _in_turn(draws: Sequence[Iterator[RequestPair]]) -> Iterator[RequestPair]:
    while True:
        yield from (next(draw) for draw in draws)


def _distinct(
    draws: Iterator[_T], n: int, sides: Callable[[_T], tuple[str, ...]], split: str
) -> list[_T]:
    return distinct(draws, n, sides=sides, what=f"requests ({split})", grammar="requests.yaml")


def _slots_of_all(grammar: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [grammar["slots"], *(each["slots"] for each in grammar["categories"].values())]


def _checked(split: RequestSplit) -> tuple[str, ...]:
    splits = ("train", "validation", "heldout")
    if split not in splits:
        raise DataError(f"expected a split of {list(splits)}, got {split!r}; correct the call")
    return categories(split)


@functools.cache
def _grammar() -> dict[str, Any]:
    text = resources.files(__package__).joinpath("requests.yaml").read_text(encoding="utf-8")
    grammar: dict[str, Any] = yaml.safe_load(text)
    return grammar


HELDOUT_CATEGORY: str = _grammar()["heldout_category"]
"""The one category of which training and validation have no template."""
