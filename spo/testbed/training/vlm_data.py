"""Training data of the embedded vision-language model: drawn, asked and tokenised in workers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from spo.testbed import scenes
from spo.testbed.model import IMAGE_TOKEN, IMAGE_TOKENS, chat_prompt, plain_prompt

SEQUENCE_LENGTH = 128
IGNORED = -100
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
# Shares of the tasks; the rest of a batch is questions about scenes, several to a picture.
_CAPTION, _PLAIN_CAPTION, _READ, _CONTINUE, _FOLLOW = 0.30, 0.05, 0.20, 0.06, 0.06
_WORD_SHARE = 0.65


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

    image: Image.Image
    """An RGB picture of the model's size."""
    segments: tuple[tuple[str, bool], ...]
    """Pieces of text in order, each with whether the model learns to say it."""


class SampleStream(IterableDataset[dict[str, Tensor]]):
    """Endless batches of fresh samples; every worker draws from a stream of its own.

    A batch holds `images` [batch, 3, 112, 112] (uint8), `ids` and `labels` [batch, 128] (int64),
    the picture's 49 tokens standing in `ids` where they belong.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        openings: Sequence[Continuation],
        instructions: Sequence[Continuation],
        batch_size: int,
        seed: int,
    ) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._openings = openings
        self._instructions = instructions
        self._batch_size = batch_size
        self._seed = seed
        self._vocabulary = readable_words(tokenizer)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        torch.set_num_threads(1)
        number = 0 if worker is None else worker.id
        rng = scenes.training_generator(1000 * self._seed + number)
        while True:
            yield encode([self.sample(rng) for _ in range(self._batch_size)], self._tokenizer)

    def sample(self, rng: np.random.Generator) -> Sample:
        """One sample of a task drawn by the shares above."""
        draw = rng.random()
        for share, make in (
            (_CAPTION, self._caption),
            (_PLAIN_CAPTION, self._plain_caption),
            (_READ, self._read),
            (_CONTINUE, self._continue),
            (_FOLLOW, self._follow),
        ):
            if draw < share:
                return make(rng)
            draw -= share
        return self._ask(rng)

    def _scene(self, rng: np.random.Generator) -> scenes.Scene:
        return scenes.sample_scene(rng, vocabulary=self._vocabulary, word_share=_WORD_SHARE)

    def _caption(self, rng: np.random.Generator) -> Sample:
        scene = self._scene(rng)
        prompt = chat_prompt(_either(rng, _pick(rng, scenes.CAPTION_PROMPTS)))
        return _one_turn(scenes.draw(scene), prompt, scenes.caption(scene))

    def _plain_caption(self, rng: np.random.Generator) -> Sample:
        scene = self._scene(rng)
        opening = "The picture shows"
        rest = scenes.caption(scene).removeprefix(opening)
        return _one_turn(scenes.draw(scene), plain_prompt(opening), rest)

    def _ask(self, rng: np.random.Generator) -> Sample:
        scene = self._scene(rng)
        asked = scenes.questions(scene)
        order = [asked[int(index)] for index in rng.permutation(len(asked) - 1)][:3]
        # The word's question is the last one; it is asked of every second scene, at any turn.
        if rng.random() < 0.6:
            order.insert(int(rng.integers(0, 2)), asked[-1])
        segments: list[tuple[str, bool]] = []
        for turn, question in enumerate(order):
            prompt = chat_prompt(_either(rng, question.text), image=turn == 0)
            segments += [(prompt if turn == 0 else f"\n{prompt}", False)]
            segments += [(f"{question.sentence}<|im_end|>", True)]
        return Sample(image=scenes.draw(scene), segments=tuple(segments))

    def _read(self, rng: np.random.Generator) -> Sample:
        text = self._phrase(rng)
        image = scenes.draw_text(text, rng=rng)
        if rng.random() < 0.2:
            prompt = _pick(rng, scenes.CAPTION_PROMPTS)
            answer = f'The picture shows no shapes. The text "{text}" is written on it.'
        else:
            prompt, answer = _pick(rng, READ_PROMPTS), f'The text says "{text}".'
        return _one_turn(image, chat_prompt(_either(rng, prompt)), answer)

    def _continue(self, rng: np.random.Generator) -> Sample:
        chosen = self._openings[int(rng.integers(len(self._openings)))]
        image = scenes.draw_text(chosen.prompt, rng=rng)
        prompt = chat_prompt(_either(rng, _pick(rng, CONTINUE_PROMPTS)))
        segments = ((prompt, False), (chosen.prompt + chosen.text, True))
        return Sample(image=image, segments=segments)

    def _follow(self, rng: np.random.Generator) -> Sample:
        chosen = self._instructions[int(rng.integers(len(self._instructions)))]
        image = scenes.draw_text(chosen.prompt, rng=rng)
        prompt = chat_prompt(_pick(rng, FOLLOW_PROMPTS))
        return Sample(image=image, segments=((prompt, False), (chosen.text, True)))

    def _phrase(self, rng: np.random.Generator) -> str:
        kind = rng.random()
        if kind < 0.25:
            source = self._openings if kind < 0.18 else self._instructions
            words = source[int(rng.integers(len(source)))].prompt.split(" ")[:9]
        else:
            count = int(rng.integers(1, 6))
            words = [scenes.sample_word(rng, vocabulary=self._vocabulary) for _ in range(count)]
        text = " ".join(words)
        style = int(rng.integers(4))
        return (text, text, text.upper(), text.capitalize())[style]


def readable_words(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Lower-case words of 3 to 8 letters that are one token each, without the held-out ones."""
    words = (token[1:] for token in tokenizer.get_vocab() if re.fullmatch(r"Ġ[a-z]{3,8}", token))
    return tuple(sorted(word for word in words if not scenes.is_held_out(word)))


def encode(samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Pixels, token ids and labels of the samples, cut or padded to `SEQUENCE_LENGTH`."""
    texts = [
        text.replace(IMAGE_TOKEN, IMAGE_TOKEN * IMAGE_TOKENS)
        for sample in samples
        for text, _ in sample.segments
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
    pixels = np.stack([np.asarray(sample.image) for sample in samples]).transpose(0, 3, 1, 2)
    return {
        "images": torch.from_numpy(np.ascontiguousarray(pixels)),
        "ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(labels),
    }


def _one_turn(image: Image.Image, prompt: str, answer: str) -> Sample:
    return Sample(image=image, segments=((prompt, False), (f"{answer}<|im_end|>", True)))


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _either(rng: np.random.Generator, text: str) -> str:
    """The text, now and then in other common words for the same."""
    if rng.random() < 0.3:
        text = text.replace("picture", "image")
    if rng.random() < 0.3:
        text = text.replace("colour", "color")
    return text
