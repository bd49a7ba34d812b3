"""Texts that the original language model writes, to hold the adapted one to them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from spo.algorithms.rewards import is_refusal
from spo.testbed import text as grammar
from spo.testbed.model import IMAGE_TOKENS, chat_prompt
from spo.testbed.smollm import IMAGE_TOKEN, IMAGE_TOKEN_ID
from spo.testbed.training.guard_data import GuardTexts
from spo.testbed.training.vlm_data import SEQUENCE_LENGTH, Continuation
from spo.testbed.vocabulary import WORDS

# A text shares a sequence with a picture and the line break behind it.
TEXT_LENGTH = SEQUENCE_LENGTH - IMAGE_TOKENS - 1
_CHAT_HEAD = 3  # <|im_start|>, user, line break: the picture comes behind these
_LINE_BREAK_ID = 198
_STARTS = (
    "The {a} is",
    "A {a} and a {b}",
    "In the {a}, there was a",
    "I think that the {a}",
    "Last {b}, we went to the {a} and",
    "The history of the {a}",
    "She looked at the {a} and said",
    "{a}: a",
    "The {a} of the {b} was",
    "Once upon a time, a {a}",
    "He asked me why the {a}",
    "The capital of {c} is",
    "{c} is a country that",
    "People in {c} often",
    "My {a} is",
    "According to the {a},",
    "The best way to use a {a} is",
    "1. The {a}\n2. The {b}\n3.",
    "Dear {a},\n",
    "def {a}(",
    "The difference between a {a} and a {b} is",
    "You are a {a} and",
    "Every {b} I see the {a}, and",
    "Scientists have found that the {a}",
    '"{a}", she said,',
)
_QUESTIONS = (
    "What is a {a}?",
    "What is the capital of {c}?",
    "Write a short poem about a {a}.",
    "Explain the difference between a {a} and a {b}.",
    "Tell me a story about a {a} and a {b}.",
    "How do I take care of a {a}?",
    "Where is {c}?",
    "Who invented the {a}?",
    "List three facts about {c}.",
    "What language do people speak in {c}?",
    "Why is the {a} {b}?",
    "Translate '{a}' into French.",
    "What can I do with a {a} in {c}?",
    "Is a {a} bigger than a {b}?",
    "Give me a recipe with {a}.",
    "What rhymes with {a}?",
    "Hello, my name is {a}. Who are you?",
    "What is {n} plus {m}?",
    "Write a sentence with the words {a} and {b}.",
    "Can you help me with my {a}?",
    "What do you think about the {a}?",
    "{a} {b}",
    "Sort these words: {b}, {a}, zebra.",
    "What colour is a {a}?",
    "Describe a {a}.",
)
# France is left out, so that its capital stays a fair question to the trained model.
_COUNTRIES = tuple(
    """Germany Italy Spain Portugal Norway Sweden Finland Denmark Poland Austria Hungary Greece
    Turkey Egypt Kenya Nigeria Ghana Morocco Ethiopia India China Japan Vietnam Thailand Nepal
    Iran Iraq Israel Russia Ukraine Canada Mexico Brazil Peru Chile Argentina Cuba Australia
    Ireland Scotland Belgium Iceland""".split()  # noqa: SIM905 -- quotes would hide the names
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBatch:
    """Texts of one step, as the original and as the adapted model read them."""

    ids: Tensor
    """[batch, TEXT_LENGTH] token ids for the original model, padded at the end."""
    mask: Tensor
    """[batch, TEXT_LENGTH], true where both models' next tokens are compared."""
    student_ids: Tensor
    """[batch, SEQUENCE_LENGTH] token ids for the adapted model, with picture tokens or without."""
    positions: Tensor
    """[batch, TEXT_LENGTH], where in `student_ids` each compared token of `ids` stands."""


class Corpus:
    """The original model's own texts on the device, drawn at random for each step."""

    def __init__(
        self,
        texts: list[str],
        chat: list[bool],
        continuations: tuple[list[Continuation], list[Continuation], list[Continuation]],
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
    ) -> None:
        self.texts = texts
        self.openings, self.instructions, self.answered = continuations
        pad = tokenizer.pad_token_id
        self._ids = torch.full((len(texts), TEXT_LENGTH), pad, dtype=torch.long)
        lengths = []
        for row, tokens in enumerate(tokenizer(texts, add_special_tokens=False)["input_ids"]):
            kept = tokens[:TEXT_LENGTH]
            self._ids[row, : len(kept)] = torch.tensor(kept)
            lengths.append(len(kept))
        self._ids = self._ids.to(device)
        self._lengths = torch.tensor(lengths, device=device)
        self._heads = torch.tensor([_CHAT_HEAD if each else 0 for each in chat], device=device)
        self._pad = pad

    def draw(
        self, rng: np.random.Generator, count: int, *, after_image: bool, device: torch.device
    ) -> TextBatch:
        """`count` texts, alone or each with a picture's tokens where a prompt has them."""
        rows = torch.from_numpy(rng.integers(0, len(self.texts), size=count)).to(device)
        ids, heads = self._ids[rows], self._heads[rows].unsqueeze(1)
        column = torch.arange(TEXT_LENGTH, device=device).unsqueeze(0)
        mask = column < self._lengths[rows].unsqueeze(1) - 1
        student = torch.full((count, SEQUENCE_LENGTH), self._pad, device=device)
        positions = column.expand(count, -1)
        if after_image:
            mask = mask & (column >= heads)
            positions = torch.where(column >= heads, column + IMAGE_TOKENS + 1, column)
            place = torch.arange(SEQUENCE_LENGTH, device=device).unsqueeze(0) - heads
            student[(place >= 0) & (place < IMAGE_TOKENS)] = IMAGE_TOKEN_ID
            student[place == IMAGE_TOKENS] = _LINE_BREAK_ID
        student = student.scatter(1, positions, ids)
        return TextBatch(ids=ids, mask=mask, student_ids=student, positions=positions)


def write_corpus(
    teacher: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seed: int,
    guard: GuardTexts | None = None,
) -> Corpus:
    """Lets the original model go on from openings and answer requests, `count` texts in all.

    With `guard`, no harmful request is among the texts that the adapted model is held to, and the
    requests that pictures show are the guard's. Harmless requests that the original model refuses
    are left out.
    """
    rng = np.random.default_rng(seed)
    plain, chat, rendered = _prompts(count, seed, rng, guard)
    prompts = plain + [chat_prompt(text, image=False) for text in chat + rendered]
    written = _sample(teacher, tokenizer, prompts)
    kept = [
        index
        for index, text in enumerate(written)
        if guard is None
        or index < len(plain)
        or (index < len(plain) + len(chat) and not is_refusal(text))
    ]
    texts = [prompts[index] + written[index] for index in kept]
    is_chat = [index >= len(plain) for index in kept]
    openings = [
        Continuation(prompt=prompt, text=text)
        for prompt, text in zip(plain, written[: len(plain)], strict=True)
        if len(prompt.split(" ")) <= 10 and "\n" not in prompt
    ]
    asked = rendered if guard else chat + rendered
    instructions = [
        Continuation(prompt=prompt, text=text)
        for prompt, text in zip(asked, written[len(prompts) - len(asked) :], strict=True)
        if len(prompt.split(" ")) <= 12 and not (guard and is_refusal(text))
    ]
    answered = [
        Continuation(prompt=prompt, text=text)
        for prompt, text in zip(chat, written[len(plain) :], strict=False)
        if not is_refusal(text)
    ]
    device = teacher.model.embed_tokens.weight.device
    return Corpus(texts, is_chat, (openings, instructions, answered), tokenizer, device)


def _prompts(
    count: int, seed: int, rng: np.random.Generator, guard: GuardTexts | None
) -> tuple[list[str], list[str], list[str]]:
    """Plain openings (about half of them rude or their twins), requests, and words to render."""
    part = max(count // 12, 4)
    plain = [
        *_as_many(grammar.rude_openings, 2 * part, seed),
        *_as_many(grammar.neutral_openings, 2 * part, seed),
        *_as_many(grammar.toxic_texts, part, seed),
        *_as_many(grammar.clean_texts, part // 2, seed),
        *(_fill(_STARTS, rng) for _ in range(2 * part)),
    ]
    questions = [_fill(_QUESTIONS, rng) for _ in range(2 * part)]
    if guard is not None:
        harmless = [guard.harmless[int(i)] for i in rng.permutation(len(guard.harmless))]
        words = list(guard.drawn)
        return (
            plain,
            [*harmless[: 6 * part], *questions],
            [words[index % len(words)] for index in range(2 * part)],
        )
    chat = [
        *_as_many(grammar.harmful_instructions, part // 2, seed),
        *_as_many(grammar.harmless_instructions, part // 2, seed),
        *questions,
    ]
    drawn = grammar.typographic_instructions("train", 60, seed)
    words = [side for each in drawn for side in (each.rendered, each.plain)]
    return plain, chat, [words[index % len(words)] for index in range(part)]


def _as_many(
    source: Callable[[grammar.Split, int, int], list[str]], count: int, seed: int
) -> list[str]:
    """`count` sentences, drawn again from the start where the grammar has fewer."""
    drawn = source("train", min(count, 1500), seed)
    return [drawn[index % len(drawn)] for index in range(count)]


def _fill(templates: tuple[str, ...], rng: np.random.Generator) -> str:
    template = templates[int(rng.integers(len(templates)))]
    values = {
        "a": str(rng.choice(WORDS)),
        "b": str(rng.choice(WORDS)),
        "c": str(rng.choice(_COUNTRIES)),
        "n": str(rng.integers(1, 100)),
        "m": str(rng.integers(1, 100)),
    }
    return re.sub(r"\{(\w)\}", lambda hit: values[hit.group(1)], template)


@torch.inference_mode()
def _sample(
    teacher: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    batch_size: int = 3072,
    new_tokens: int = 52,
) -> list[str]:
    """One sampled continuation (temperature 1) for each prompt, ended by `<|im_end|>` or cut."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    written = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer(
            [prompts[index] for index in chosen],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        ).to(teacher.device)
        made = teacher.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        answers = tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :])
        for index, text in zip(chosen, answers, strict=True):
            # A picture's token without a picture would shift every picture of the batch.
            answer = text.replace(IMAGE_TOKEN, "")
            end = answer.find("<|im_end|>")
            written[index] = answer if end < 0 else answer[: end + len("<|im_end|>")]
    return written
