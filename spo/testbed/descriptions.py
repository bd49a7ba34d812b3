"""True, partial and wrong descriptions of a drawn scene, with their truth known exactly.

A description is a set of claims (an object with some of its colour, kind and place; a count; a
word) and a style to say them in. Claims and scenes share one numbering of facts, so that whether
a description holds for any scene is a subset test.
"""

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from spo.testbed.scenes import (
    COLOURS,
    COLUMNS,
    COUNT_WORDS,
    KINDS,
    ROWS,
    Scene,
    SceneObject,
    caption,
)

PLACES = tuple(
    SceneObject(kind=KINDS[0], colour="red", row=row, column=column).place
    for row, column in product(range(len(ROWS)), range(len(COLUMNS)))
)
_COLOUR_NAMES = tuple(COLOURS)
_CANONICAL = 0
_STYLES = 6
_ADDED_WORDS = ("lamp", "river", "seven", "hqtz", "open", "maple", "stop", "wrk", "cloud", "ink")


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Says that an object with these attributes is there, e.g. `Claim(colour="red")`."""

    colour: str | None = None
    """Colour, or None where it is left open."""
    kind: str | None = None
    """Shape, or None where it is left open."""
    place: str | None = None
    """Grid cell, or None where it is left open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What is claimed about a scene and how, e.g. `Description(count=2, style=1)`."""

    claims: tuple[Claim, ...] = ()
    """Objects that are said to be there."""
    count: int | None = None
    """How many shapes are said to be there in all, 1 to 3, or None."""
    word: str | None = None
    """The word said to be written, or None."""
    style: int = 0
    """Which wording; 0 is that of `scenes.caption`."""


FACTS = (len(_COLOUR_NAMES) + 1) * (len(KINDS) + 1) * (len(PLACES) + 1) + len(COUNT_WORDS)
"""Number of facts that claims and scenes are numbered by (words apart)."""


def canonical(scene: Scene) -> Description:
    """Everything about the scene, in the wording of `scenes.caption`."""
    claims = tuple(Claim(colour=o.colour, kind=o.kind, place=o.place) for o in scene.objects)
    return Description(claims=claims, count=len(claims), word=scene.word, style=_CANONICAL)


def sample_description(scene: Scene, rng: random.Random) -> Description:
    """A true description: canonical, paraphrased or partial, in about equal shares."""
    whole = canonical(scene)
    share = rng.random()
    if share < 0.3:
        return whole
    if share < 0.6:
        return replace(whole, style=rng.randint(1, _STYLES - 1))
    chosen = rng.sample(whole.claims, rng.randint(1, len(whole.claims)))
    claims = tuple(_thinned(claim, rng) for claim in chosen)
    word = scene.word if rng.random() < 0.4 else None
    count = whole.count if rng.random() < 0.3 else None
    if (word or count) and rng.random() < 0.3:
        claims = ()
    return Description(claims=claims, count=count, word=word, style=rng.randint(1, _STYLES - 1))


def sample_wrong(scene: Scene, true: Description, rng: random.Random) -> Description:
    """A description like `true` in form with one thing changed, so that it is wrong of `scene`."""
    while True:
        wrong = _changed(true, rng)
        if not holds(wrong, scene):
            return wrong


def holds(description: Description, scene: Scene) -> bool:
    """Whether everything that the description claims is so in the scene."""
    if description.word is not None and description.word != scene.word:
        return False
    return claim_facts(description) <= scene_facts(scene)


def claim_facts(description: Description) -> frozenset[int]:
    """Numbers of the facts that must hold, words apart."""
    facts = {_fact(claim.colour, claim.kind, claim.place) for claim in description.claims}
    if description.count is not None:
        facts.add(FACTS - len(COUNT_WORDS) + description.count)
    return frozenset(facts)


def scene_facts(scene: Scene) -> frozenset[int]:
    """Numbers of all facts that hold in the scene, words apart."""
    facts = {FACTS - len(COUNT_WORDS) + len(scene.objects)}
    for shape in scene.objects:
        options = ((shape.colour, None), (shape.kind, None), (shape.place, None))
        facts.update(_fact(*attributes) for attributes in product(*options))
    return frozenset(facts)


def word_number(word: str | None) -> int:
    """A number that equal words share; -1 for no word."""
    return -1 if word is None else zlib.crc32(word.encode()) & 0x7FFFFFFF


def say(description: Description) -> str:
    """The description in English."""
    if description.style == _CANONICAL:
        return _canonical_words(description)
    sentences = list(_sentences(description))
    return " ".join(sentences)


def _canonical_words(description: Description) -> str:
    objects = tuple(
        SceneObject(
            kind=claim.kind or KINDS[0],
            colour=claim.colour or _COLOUR_NAMES[0],
            row=PLACES.index(claim.place or PLACES[0]) // len(COLUMNS),
            column=PLACES.index(claim.place or PLACES[0]) % len(COLUMNS),
        )
        for claim in description.claims
    )
    said = caption(Scene(objects=objects, word=description.word, seed=0))
    right, wrong = COUNT_WORDS[description.count or 0], COUNT_WORDS[len(objects)]
    return said.replace(f"shows {wrong} ", f"shows {right} ", 1)


def _sentences(description: Description) -> Iterator[str]:
    style = description.style
    if description.count is not None:
        noun = "shape" if description.count == 1 else "shapes"
        verb = "is" if description.count == 1 else "are"
        count = COUNT_WORDS[description.count]
        yield f"There {verb} {count} {noun}." if style % 2 else f"A picture with {count} {noun}."
    phrases = [_phrase(claim, style) for claim in description.claims]
    if phrases and style == 3:
        yield "; ".join(phrases) + "."
    elif phrases and style == 5:
        yield from (f"{phrase[0].upper()}{phrase[1:]}." for phrase in phrases)
    elif phrases:
        opening = {1: "There is", 2: "I can see", 4: "The image contains"}[style]
        listed = ", ".join(phrases[:-1]) + " and " + phrases[-1] if phrases[1:] else phrases[0]
        yield f"{opening} {listed}."
    if description.word is not None:
        forms = ('It says "{}".', 'The word "{}" is written on it.', "The text reads {}.")
        yield forms[style % len(forms)].format(description.word)


def _phrase(claim: Claim, style: int) -> str:
    noun = claim.kind or "shape"
    thing = f"{claim.colour} {noun}" if claim.colour else noun
    phrase = f"{'an' if thing.startswith('o') else 'a'} {thing}"
    if claim.place is None:
        return phrase
    if style == 2 and claim.place != "centre":
        row, column = claim.place.split()
        place = {"top": "upper", "middle": "middle", "bottom": "lower"}[row]
        return f"{phrase} in the {place} {column}"
    if style == 5:
        return f"{'in' if claim.place == 'centre' else 'at'} the {claim.place} is {phrase}"
    if style == 3:
        return f"{phrase}, {claim.place}"
    return f"{phrase} {'in' if claim.place == 'centre' else 'at'} the {claim.place}"


def _thinned(claim: Claim, rng: random.Random) -> Claim:
    """The claim with none, one or two of its attributes left open."""
    gone = rng.choice(((), (), ("place",), ("place",), ("colour",), ("kind",), ("colour", "place")))
    return replace(claim, **dict.fromkeys(gone))


def _changed(true: Description, rng: random.Random) -> Description:
    ways = []
    if true.claims:
        ways += ["attribute"] * 4
    if len(true.claims) > 1:
        ways += ["exchange"] * 3
    if true.count is not None:
        ways += ["count"]
    if true.word is not None:
        ways += ["word"] * 2
    elif true.style != _CANONICAL or true.count is not None:
        ways += ["added word"]
    match rng.choice(ways):
        case "attribute":
            index = rng.randrange(len(true.claims))
            changed = _other_attribute(true.claims[index], rng)
            return replace(true, claims=(*true.claims[:index], changed, *true.claims[index + 1 :]))
        case "exchange":
            return replace(true, claims=_exchanged(true.claims, rng))
        case "count":
            return replace(true, count=rng.randint(1, 3))
        case "word":
            return replace(true, word=_other_word(true.word or "", rng))
        case _:
            return replace(true, word=rng.choice(_ADDED_WORDS))


def _other_attribute(claim: Claim, rng: random.Random) -> Claim:
    given = [name for name in ("colour", "kind", "place") if getattr(claim, name) is not None]
    name = rng.choice(given)
    values = {"colour": _COLOUR_NAMES, "kind": KINDS, "place": PLACES}[name]
    return replace(claim, **{name: rng.choice(values)})


def _exchanged(claims: tuple[Claim, ...], rng: random.Random) -> tuple[Claim, ...]:
    first, second = rng.sample(range(len(claims)), 2)
    name = rng.choice(("colour", "kind", "place"))
    mixed = list(claims)
    mixed[first] = replace(claims[first], **{name: getattr(claims[second], name)})
    mixed[second] = replace(claims[second], **{name: getattr(claims[first], name)})
    return tuple(mixed)


def _other_word(word: str, rng: random.Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(_ADDED_WORDS)
    position = rng.randrange(len(word))
    letter = rng.choice("abcdefghijklmnopqrstuvwxyz")
    return word[:position] + letter + word[position + 1 :]


def _fact(colour: str | None, kind: str | None, place: str | None) -> int:
    number = 0 if colour is None else 1 + _COLOUR_NAMES.index(colour)
    number = number * (len(KINDS) + 1) + (0 if kind is None else 1 + KINDS.index(kind))
    return number * (len(PLACES) + 1) + (0 if place is None else 1 + PLACES.index(place))
