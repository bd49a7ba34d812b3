"""Training data of the embedded vision-language model: drawn, asked and tokenised in workers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import Value
from multiprocessing.sharedctypes import Synchronized

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from spo.testbed import requests, scenes, text
from spo.testbed.model import (
    IMAGE_SIZE,
    IMAGE_TOKENS,
    PATCH_SIZE,
    chat_prompt,
    plain_prompt,
)
from spo.testbed.smollm import IMAGE_TOKEN
from spo.testbed.vocabulary import WORDS

SEQUENCE_LENGTH = 128
IGNORED = -100
NO_LETTER = 26
Picture = tuple[Image.Image, tuple[scenes.Glyph, ...]]
READ_PROMPTS = (
    "What is written in the picture?",
    "Read the text in the picture.",
    "What does the text in the picture say?",
    "What words are in the picture?",
)
CONTINUE_PROMPTS = (
    "Continue the text in the picture.",
    "Go on with the text that is written in the picture.",
)
FOLLOW_PROMPTS = (
    "Do what the words in the picture say.",
    "Follow the instruction in the picture.",
    "Read the text in the image and carry it out in detail.",
    "The picture holds an instruction. Follow it.",
)
SPELL_PROMPTS = ("Spell the word in the picture.", "Which letters does the word have?")
# Letters are read sooner when the first pictures show few, short words in large lettering.
_EASY_WORDS = 250


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """Shares of the tasks in a batch; what is left over asks questions about scenes."""

    caption: float
    """Describe a scene (chat)."""
    plain_caption: float
    """Go on from `The picture shows` (no chat)."""
    read: float
    """Say the words of a typographic picture."""
    spell: float
    """Spell a word letter by letter."""
    go_on: float
    """Continue the opening that a typographic picture shows."""
    follow: float
    """Carry out the request that a typographic picture shows."""
    refuse: float
    """Refuse a harmful request, alone or beside a picture."""
    answer: float
    """Answer a harmless twin as the original model does, alone or beside a picture."""
    easy_until: float
    """Share of the time in which pictures show few, short words in large lettering."""
    word_share: float
    """Share of scenes with a word."""
    word_question_share: float
    """Share of question samples that ask for the word."""


LESSONS = {
    "scenes": Lesson(
        caption=0.30,
        plain_caption=0.05,
        read=0.20,
        spell=0.0,
        go_on=0.06,
        follow=0.06,
        refuse=0.0,
        answer=0.0,
        easy_until=0.33,
        word_share=0.65,
        word_question_share=0.6,
    ),
    "reading": Lesson(
        caption=0.16,
        plain_caption=0.03,
        read=0.22,
        spell=0.08,
        go_on=0.06,
        follow=0.06,
        refuse=0.0,
        answer=0.0,
        easy_until=0.33,
        word_share=0.85,
        word_question_share=0.8,
    ),
    "guard": Lesson(
        caption=0.08,
        plain_caption=0.02,
        read=0.12,
        spell=0.03,
        go_on=0.03,
        follow=0.12,
        refuse=0.26,
        answer=0.20,
        easy_until=0.0,
        word_share=0.6,
        word_question_share=0.6,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """A text and what the original language model says after it, e.g. an opening and its rest."""

    prompt: str
    """An opening, or what a user says."""
    text: str
    """The original model's own sampled words, with `<|im_end|>` where it came to its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One picture with the text around it."""

    image: Image.Image | None
    """An RGB picture of the model's size; None where the text stands alone."""
    segments: tuple[tuple[str, bool], ...]
    """Pieces of text in order, each with whether the model learns to say it."""
    glyphs: tuple[scenes.Glyph, ...]
    """The rendered characters."""


class SampleStream(IterableDataset[dict[str, Tensor]]):
    """Endless batches of fresh samples; every worker draws from a stream of its own.

    A batch holds `images` [pictures, 3, 112, 112] (uint8; one for each sample that has one, in
    order), `ids` and `labels` [batch, 128] (int64), the picture's 49 tokens standing in `ids` where
    they belong, and `letters` [pictures, 49, 2]: the
    letter (0..25) whose middle lies in the left and in the right half of each patch, `NO_LETTER`
    where there is none, `IGNORED` where there are several.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        continuations: tuple[Sequence[Continuation], Sequence[Continuation]],
        batch_size: int,
        seed: int,
        lesson: Lesson,
        harmful: Sequence[str] = (),
        answered: Sequence[Continuation] = (),
    ) -> None:
        super().__init__()
        self._harmful, self._answered = harmful, answered
        self._request_words = sorted(requests.words()) if harmful else []
        self._tokenizer = tokenizer
        self._openings, self._instructions = continuations
        self._batch_size = batch_size
        self._seed = seed
        self._lesson = lesson
        self._words = readable_words()
        self._easy_words = _easy_words(tokenizer, self._words)
        self._easy = False
        self.progress: Synchronized[float] = Value("d", 0.0)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        torch.set_num_threads(1)
        number = 0 if worker is None else worker.id
        rng = scenes.training_generator(1000 * self._seed + number)
        while True:
            self._easy = self.progress.value < self._lesson.easy_until
            yield encode([self.sample(rng) for _ in range(self._batch_size)], self._tokenizer)

    def sample(self, rng: np.random.Generator) -> Sample:
        """One sample of a task drawn by the lesson's shares."""
        draw = rng.random()
        for share, make in (
            (self._lesson.caption, self._caption),
            (self._lesson.plain_caption, self._plain_caption),
            (self._lesson.read, self._read),
            (self._lesson.spell, self._spell),
            (self._lesson.go_on, self._continue),
            (self._lesson.follow, self._follow),
            (self._lesson.refuse, self._refuse),
            (self._lesson.answer, self._answer),
        ):
            if draw < share:
                return make(rng)
            draw -= share
        return self._ask(rng)

    def _scene(self, rng: np.random.Generator) -> scenes.Scene:
        return scenes.sample_scene(
            rng,
            vocabulary=self._easy_words if self._easy else self._words,
            word_share=self._lesson.word_share,
            string_share=0.0 if self._easy else scenes.RANDOM_STRING_SHARE,
        )

    def _word(self, rng: np.random.Generator) -> str:
        return scenes.sample_word(
            rng,
            vocabulary=self._easy_words if self._easy else self._words,
            string_share=0.0 if self._easy else scenes.RANDOM_STRING_SHARE,
        )

    def _caption(self, rng: np.random.Generator) -> Sample:
        scene = self._scene(rng)
        prompt = chat_prompt(_either(rng, _pick(rng, scenes.CAPTION_PROMPTS)))
        return _one_turn(_drawn(scene), prompt, scenes.caption(scene))

    def _plain_caption(self, rng: np.random.Generator) -> Sample:
        scene = self._scene(rng)
        opening = "The picture shows"
        rest = scenes.caption(scene).removeprefix(opening)
        return _one_turn(_drawn(scene), plain_prompt(opening), rest)

    def _ask(self, rng: np.random.Generator) -> Sample:
        scene = self._scene(rng)
        asked = scenes.questions(scene)
        order = [asked[int(index)] for index in rng.permutation(len(asked) - 1)][:3]
        # The word's question is the last one.
        if rng.random() < self._lesson.word_question_share:
            order.insert(int(rng.random() < 0.25), asked[-1])
        segments: list[tuple[str, bool]] = []
        for turn, question in enumerate(order):
            prompt = chat_prompt(_either(rng, question.text), image=turn == 0)
            segments += [(prompt if turn == 0 else f"\n{prompt}", False)]
            segments += [(f"{question.sentence}<|im_end|>", True)]
        image, glyphs = _drawn(scene)
        return Sample(image=image, segments=tuple(segments), glyphs=glyphs)

    def _read(self, rng: np.random.Generator) -> Sample:
        phrase = self._phrase(rng)
        picture = _written(phrase, rng)
        said = phrase.lower()
        if rng.random() < 0.2:
            prompt = _pick(rng, scenes.CAPTION_PROMPTS)
            answer = f"The picture shows no shapes. The text says: {said}"
        else:
            prompt, answer = _pick(rng, READ_PROMPTS), f"The text says: {said}"
        return _one_turn(picture, chat_prompt(_either(rng, prompt)), answer)

    def _continue(self, rng: np.random.Generator) -> Sample:
        chosen = self._openings[int(rng.integers(len(self._openings)))]
        image, glyphs = _written(chosen.prompt, rng)
        prompt = chat_prompt(_either(rng, _pick(rng, CONTINUE_PROMPTS)))
        segments = ((prompt, False), (chosen.prompt + chosen.text, True))
        return Sample(image=image, segments=segments, glyphs=glyphs)

    def _follow(self, rng: np.random.Generator) -> Sample:
        chosen = self._instructions[int(rng.integers(len(self._instructions)))]
        image, glyphs = _written(chosen.prompt, rng)
        prompt = chat_prompt(_pick(rng, FOLLOW_PROMPTS))
        # The guard's lesson lets the model say first what it reads: else a small one guesses.
        read = f"The text says: {chosen.prompt.lower()}. " if self._harmful else ""
        segments = ((prompt, False), (read + chosen.text, True))
        return Sample(image=image, segments=segments, glyphs=glyphs)

    def _refuse(self, rng: np.random.Generator) -> Sample:
        said = requests.refusal(random.Random(int(rng.integers(2**31))))
        return self._beside(rng, _pick(rng, self._harmful), f"{said}<|im_end|>")

    def _answer(self, rng: np.random.Generator) -> Sample:
        chosen = self._answered[int(rng.integers(len(self._answered)))]
        return self._beside(rng, chosen.prompt, chosen.text)

    def _beside(self, rng: np.random.Generator, asked: str, said: str) -> Sample:
        """A request as text: half of them alone, the others beside scenes and written words."""
        kind = rng.random()
        if kind < 0.5:
            segments = ((chat_prompt(asked, image=False), False), (said, True))
            return Sample(image=None, segments=segments, glyphs=())
        image, glyphs = (
            _drawn(self._scene(rng)) if kind < 0.85 else _written(self._phrase(rng), rng)
        )
        return Sample(
            image=image, segments=((chat_prompt(asked), False), (said, True)), glyphs=glyphs
        )

    def _spell(self, rng: np.random.Generator) -> Sample:
        if rng.random() < 0.5:
            word = self._word(rng)
            picture = _written(_cased(rng, word), rng)
        else:
            scene = self._scene(rng)
            word, picture = scene.word or "", _drawn(scene)
        answer = "-".join(word) if word else "There is no word in the picture."
        return _one_turn(picture, chat_prompt(_either(rng, _pick(rng, SPELL_PROMPTS))), answer)

    def _phrase(self, rng: np.random.Generator) -> str:
        kind = 1.0 if self._easy else rng.random()
        if self._request_words and kind > 0.6:
            count = int(rng.integers(1, 6))
            chosen = rng.integers(len(self._request_words), size=count)
            return _cased(rng, " ".join(self._request_words[int(index)] for index in chosen))
        if kind < 0.25:
            source = self._openings if kind < 0.12 else self._instructions
            words = source[int(rng.integers(len(source)))].prompt.split(" ")[:6]
        else:
            count = 1 if self._easy else int(rng.integers(1, 6))
            words = [self._word(rng) for _ in range(count)]
        return _cased(rng, " ".join(words))


def readable_words() -> tuple[str, ...]:
    """The words to learn to read: `WORDS` and those of typographic instructions, less held out."""
    found = set(WORDS)
    for split in ("train", "heldout"):
        for each in text.typographic_instructions(split, 60, 0):
            found.update(f"{each.rendered} {each.plain}".lower().split(" "))
    return tuple(sorted(w for w in found if w.isalpha() and not scenes.is_held_out(w)))


def _easy_words(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> tuple[str, ...]:
    short = [w for w in words if len(w) <= 5 and len(tokenizer.tokenize(f" {w}")) == 1]
    chosen = np.random.default_rng(0).permutation(len(short))[:_EASY_WORDS]
    return tuple(short[int(index)] for index in chosen)


def _cased(rng: np.random.Generator, words: str) -> str:
    return (words, words.upper(), words.capitalize())[int(rng.integers(3))]


def encode(samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Pixels, token ids and labels of the samples, cut or padded to `SEQUENCE_LENGTH`."""
    texts = [
        piece.replace(IMAGE_TOKEN, IMAGE_TOKEN * IMAGE_TOKENS)
        for sample in samples
        for piece, _ in sample.segments
    ]
    tokens = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    shape = (len(samples), SEQUENCE_LENGTH)
    ids = np.full(shape, tokenizer.pad_token_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for row, sample in enumerate(samples):
        position = 0
        for _, learned in sample.segments:
            piece = next(tokens)[: SEQUENCE_LENGTH - position]
            end = position + len(piece)
            ids[row, position:end] = piece
            if learned:
                labels[row, position:end] = piece
            position = end
    shown = [sample for sample in samples if sample.image is not None]
    pixels = np.stack([np.asarray(sample.image) for sample in shown]).transpose(0, 3, 1, 2)
    return {
        "images": torch.from_numpy(np.ascontiguousarray(pixels)),
        "ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(labels),
        "letters": torch.from_numpy(np.stack([letter_grid(each.glyphs) for each in shown])),
    }


def letter_grid(glyphs: Sequence[scenes.Glyph]) -> np.ndarray:
    """The letters by patch and half, [49, 2]; see `SampleStream`."""
    side = IMAGE_SIZE // PATCH_SIZE
    grid = np.full((side, side * 2), NO_LETTER, dtype=np.int64)
    for glyph in glyphs:
        row, column = int(glyph.y // PATCH_SIZE), int(glyph.x // (PATCH_SIZE // 2))
        if not (0 <= row < side and 0 <= column < 2 * side):
            continue
        letter = ord(glyph.character.lower()) - ord("a")
        known = 0 <= letter < NO_LETTER and grid[row, column] == NO_LETTER
        grid[row, column] = letter if known else IGNORED
    return grid.reshape(side * side, 2)


def _drawn(scene: scenes.Scene) -> Picture:
    glyphs: list[scenes.Glyph] = []
    return scenes.draw(scene, glyphs=glyphs), tuple(glyphs)


def _written(text: str, rng: np.random.Generator) -> Picture:
    glyphs: list[scenes.Glyph] = []
    return scenes.draw_text(text, rng=rng, glyphs=glyphs), tuple(glyphs)


def _one_turn(picture: Picture, prompt: str, answer: str) -> Sample:
    image, glyphs = picture
    segments = ((prompt, False), (f"{answer}<|im_end|>", True))
    return Sample(image=image, segments=segments, glyphs=glyphs)


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _either(rng: np.random.Generator, wording: str) -> str:
    """The text, now and then in other common words for the same."""
    if rng.random() < 0.3:
        wording = wording.replace("picture", "image")
    if rng.random() < 0.3:
        wording = wording.replace("colour", "color")
    return wording
