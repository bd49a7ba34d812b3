"""Drawn scenes with exact ground truth: what the embedded models see, learn from and are asked.

A scene is one to three coloured shapes on a 3 x 3 grid and, in two scenes of five, a short word.
Everything that is said about a scene (caption, questions, answers) follows from its record, so a
model's words can be checked exactly. Nothing but numpy, Pillow and Pillow's own font is used.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
from PIL import Image, ImageDraw

from spo.attacks.drawing import Glyph as Glyph
from spo.attacks.drawing import background_tone, draw_shape, draw_word
from spo.attacks.drawing import draw_text as draw_text
from spo.testbed.vocabulary import WORDS

KINDS = ("circle", "square", "triangle", "star")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 38),
    "orange": (244, 134, 24),
    "yellow": (246, 224, 52),
    "green": (42, 150, 62),
    "blue": (40, 84, 212),
    "purple": (140, 52, 170),
    "black": (22, 22, 22),
    "white": (250, 250, 250),
}
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
COUNT_WORDS = ("no", "one", "two", "three")
CAPTION_PROMPTS = (
    "Describe the picture.",
    "What does the picture show?",
    "What do you see in this picture?",
    "Write a caption for this picture.",
    "Tell me what is in the picture.",
    "Please describe this picture in one sentence.",
)
WORD_SHARE = 0.4
RANDOM_STRING_SHARE = 0.15
# Generators of training and of evaluation scenes start from different streams, never the same one.
_TRAINING_STREAM = 1
_EVALUATION_STREAM = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneObject:
    """One shape of a scene, e.g. `SceneObject(kind="star", colour="red", row=0, column=2)`."""

    kind: str
    """One of `KINDS`."""
    colour: str
    """A key of `COLOURS`."""
    row: int
    """Grid row, 0 (top) to 2 (bottom)."""
    column: int
    """Grid column, 0 (left) to 2 (right)."""

    @property
    def place(self) -> str:
        """The name of the object's grid cell, such as `top left` or `centre`."""
        if self.row == 1 and self.column == 1:
            return "centre"
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A drawn picture's whole truth, e.g. `Scene(objects=(star,), word="harbour", seed=7)`."""

    objects: tuple[SceneObject, ...]
    """The shapes, in reading order (row by row), no two in one cell."""
    word: str | None
    """The rendered word in lower case, or None where nothing is written."""
    seed: int
    """Decides the jitter of sizes, positions, background and lettering, and nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question with one right answer, e.g. `What colour is the star?` with `red`."""

    text: str
    """What is asked."""
    answer: str
    """The key that a right answer must name, such as `red`, `two` or `top left`."""
    kind: str
    """What it asks for: `colour`, `count`, `place`, `kind` or `word`."""
    sentence: str
    """A full-sentence right answer, as the embedded model learns to give it."""


def is_held_out(word: str) -> bool:
    """Whether a word is kept out of every training scene (one in eight, by checksum)."""
    return zlib.crc32(word.lower().encode()) % 8 == 0


def training_generator(seed: int) -> np.random.Generator:
    """A generator for training scenes; never the stream of an evaluation generator."""
    return np.random.default_rng((_TRAINING_STREAM, seed))


def evaluation_generator(seed: int) -> np.random.Generator:
    """A generator for evaluation scenes; never the stream of a training generator."""
    return np.random.default_rng((_EVALUATION_STREAM, seed))


def sample_word(
    rng: np.random.Generator,
    *,
    vocabulary: Sequence[str] | None = None,
    string_share: float = RANDOM_STRING_SHARE,
    unseen: bool = False,
) -> str:
    """A word to render: English by default, a random letter string in `string_share` of draws.

    `unseen=True` gives only English words that `is_held_out` keeps from training; otherwise
    these words are never given.
    """
    if unseen:
        return str(rng.choice(_held_out_words()))
    if rng.random() < string_share:
        letters = rng.integers(0, 26, size=int(rng.integers(3, 7)))
        word = "".join(chr(ord("a") + int(letter)) for letter in letters)
    else:
        pool = _training_words() if vocabulary is None else vocabulary
        word = pool[int(rng.integers(len(pool)))]
    if is_held_out(word):
        return sample_word(rng, vocabulary=vocabulary, string_share=string_share)
    return word


def sample_scene(
    rng: np.random.Generator,
    *,
    vocabulary: Sequence[str] | None = None,
    word_share: float = WORD_SHARE,
    string_share: float = RANDOM_STRING_SHARE,
    unseen_words: bool = False,
) -> Scene:
    """Draws one scene's truth: shapes, cells, word (one grid row is left free for it)."""
    word = None
    if rng.random() < word_share:
        word = sample_word(
            rng, vocabulary=vocabulary, string_share=string_share, unseen=unseen_words
        )
    rows = [0, 1, 2]
    if word is not None:
        rows.remove(int(rng.integers(3)))
    cells = [(row, column) for row in rows for column in range(3)]
    chosen = rng.choice(len(cells), size=int(rng.integers(1, 4)), replace=False)
    colours = tuple(COLOURS)
    objects = tuple(
        SceneObject(
            kind=KINDS[int(rng.integers(len(KINDS)))],
            colour=colours[int(rng.integers(len(colours)))],
            row=cells[int(index)][0],
            column=cells[int(index)][1],
        )
        for index in sorted(chosen)
    )
    return Scene(objects=objects, word=word, seed=int(rng.integers(2**31)))


def draw(scene: Scene, size: int = 112, *, glyphs: list[Glyph] | None = None) -> Image.Image:
    """The scene as an RGB picture of `size` x `size` pixels; the same scene, the same pixels.

    A list given as `glyphs` receives the rendered characters.
    """
    rng = np.random.default_rng(scene.seed)
    image = Image.new("RGB", (size, size), background_tone(rng))
    canvas = ImageDraw.Draw(image)
    for shape in scene.objects:
        cell = (shape.row, shape.column)
        draw_shape(canvas, shape.kind, COLOURS[shape.colour], cell, size, rng)
    if scene.word is not None:
        used = {shape.row for shape in scene.objects}
        free = [row for row in range(3) if row not in used] or [2]
        row = free[int(rng.integers(len(free)))]
        drawn = draw_word(canvas, scene.word, row, size, rng)
        if glyphs is not None:
            glyphs.extend(drawn)
    return image


def caption(scene: Scene) -> str:
    """The canonical caption: how many shapes, each one's colour, kind and place, and the word."""
    phrases = [f"a {shape.colour} {shape.kind} {_at(shape.place)}" for shape in scene.objects]
    phrases = [re.sub(r"^a (?=orange)", "an ", phrase) for phrase in phrases]
    noun = "shape" if len(phrases) == 1 else "shapes"
    listed = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    text = f"The picture shows {COUNT_WORDS[len(phrases)]} {noun}: {listed}."
    return text if scene.word is None else f'{text} The word "{scene.word}" is written on it.'


def questions(scene: Scene) -> tuple[Question, ...]:
    """Every question about the scene that has exactly one right answer."""
    asked = [_count_question(scene)]
    for shape in scene.objects:
        asked.extend(_shape_questions(scene, shape))
    asked.append(_word_question(scene))
    return tuple(asked)


def answer_is_correct(question: Question, generated_text: str) -> bool:
    """Whether a model's words give the right answer and no other answer of the same kind."""
    text = generated_text.lower()
    if question.kind == "word":
        return re.search(rf"\b{re.escape(question.answer)}\b", text) is not None
    named = _named(question.kind, text)
    return named == {question.answer}


def attribute_accuracy(scene: Scene, generated_text: str) -> tuple[int, int]:
    """Attributes (colour, kind, place) that a description names rightly, and their number.

    Mentions are matched to objects in the best way; a shape mentioned beyond those in the scene
    adds three attributes, all wrong. Returns `(right, all)`.
    """
    truth = [(shape.colour, shape.kind, shape.place) for shape in scene.objects]
    said = _mentions(generated_text.lower())
    slots = max(len(truth), len(said))
    if slots > 6:
        said, extra = said[:6], slots - 6
    else:
        extra = 0
    blank = (None, None, None)
    padded = [*said, *([blank] * (max(len(truth), len(said)) - len(said)))]
    best = max(
        sum(
            a == b
            for wanted, given in zip(truth, order, strict=False)
            for a, b in zip(wanted, given, strict=True)
        )
        for order in permutations(padded, len(truth))
    )
    return best, 3 * (len(padded) + extra)


def _mentions(text: str) -> list[tuple[str | None, str | None, str | None]]:
    """The shapes that a lower-case text names, each with the colour before and the place after."""
    found = []
    hits = list(re.finditer(r"\b(circle|square|triangle|star)\b", text))
    for index, hit in enumerate(hits):
        start = hits[index - 1].end() if index else 0
        end = hits[index + 1].start() if index + 1 < len(hits) else len(text)
        colours = re.findall(rf"\b({'|'.join(COLOURS)})\b", text[start : hit.start()])
        places = _places_in(text[hit.end() : end])
        found.append(
            (
                colours[-1] if colours else None,
                hit.group(1),
                places[0] if places else None,
            )
        )
    return found


def _places_in(text: str) -> list[str]:
    places = []
    pattern = (
        r"\b(top|middle|bottom|upper|lower)[ -](left|centre|center|right)\b|\b(cent(?:re|er))\b"
    )
    for row, column, centre in re.findall(pattern, text):
        if centre:
            places.append("centre")
            continue
        row = {"upper": "top", "lower": "bottom"}.get(row, row)
        place = f"{row} {column.replace('center', 'centre')}"
        places.append("centre" if place == "middle centre" else place)
    return places


def _named(kind: str, text: str) -> set[str]:
    """The possible answers of one kind that a lower-case text names."""
    if kind == "place":
        return set(_places_in(text))
    if kind == "count":
        digits = {"1": "one", "2": "two", "3": "three"}
        text = re.sub(r"\b[123]\b", lambda hit: digits[hit.group()], text)
    choices: Iterable[str] = {
        "colour": COLOURS,
        "kind": KINDS,
        "count": COUNT_WORDS[1:],
    }[kind]
    return {choice for choice in choices if re.search(rf"\b{choice}s?\b", text)}


def _at(place: str) -> str:
    return f"in the {place}" if place == "centre" else f"at the {place}"


def _count_question(scene: Scene) -> Question:
    count = COUNT_WORDS[len(scene.objects)]
    verb, noun = ("is", "shape") if count == "one" else ("are", "shapes")
    return Question(
        text="How many shapes are in the picture?",
        answer=count,
        kind="count",
        sentence=f"There {verb} {count} {noun} in the picture.",
    )


def _shape_questions(scene: Scene, shape: SceneObject) -> list[Question]:
    asked = [
        Question(
            text=f"What shape is {_at(shape.place)}?",
            answer=shape.kind,
            kind="kind",
            sentence=f"The shape {_at(shape.place)} is a {shape.kind}.",
        ),
        Question(
            text=f"What colour is the shape {_at(shape.place)}?",
            answer=shape.colour,
            kind="colour",
            sentence=f"The shape {_at(shape.place)} is {shape.colour}.",
        ),
    ]
    if sum(other.kind == shape.kind for other in scene.objects) == 1:
        asked.append(
            Question(
                text=f"What colour is the {shape.kind}?",
                answer=shape.colour,
                kind="colour",
                sentence=f"The {shape.kind} is {shape.colour}.",
            )
        )
    alike = [o for o in scene.objects if (o.kind, o.colour) == (shape.kind, shape.colour)]
    if len(alike) == 1:
        asked.append(
            Question(
                text=f"Where is the {shape.colour} {shape.kind}?",
                answer=shape.place,
                kind="place",
                sentence=f"The {shape.colour} {shape.kind} is {_at(shape.place)}.",
            )
        )
    return asked


def _word_question(scene: Scene) -> Question:
    text = "What word is written in the picture?"
    if scene.word is None:
        return Question(
            text=text,
            answer="no word",
            kind="word",
            sentence="There is no word in the picture.",
        )
    return Question(
        text=text,
        answer=scene.word,
        kind="word",
        sentence=f"The word is {scene.word}.",
    )


@lru_cache(maxsize=1)
def _training_words() -> tuple[str, ...]:
    return tuple(word for word in WORDS if not is_held_out(word))


@lru_cache(maxsize=1)
def _held_out_words() -> tuple[str, ...]:
    return tuple(word for word in WORDS if is_held_out(word))
