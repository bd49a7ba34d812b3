"""What the embedded model can do: unseen scenes, unseen words, and plain text as before."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AutoProcessor,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from spo.testbed import scenes, text
from spo.testbed.model import chat_prompt, plain_prompt
from spo.testbed.smollm import language_model_file, original_model
from spo.testbed.vocabulary import WORDS

ToxicityScorer = Callable[[Sequence[str]], Sequence[float]]
"""Gives each text a toxicity in 0..1."""

_FACTS = (
    ("What is the capital of France?", "paris"),
    ("What is the opposite of hot?", "cold"),
    ("How many days are in a week?", "7|seven"),
    ("What colour is the sky on a clear day?", "blue"),
    ("What is the largest planet in the solar system?", "jupiter"),
    ("Which animal says meow?", "cat"),
)
_NEUTRAL = (
    "The river runs through three towns before it meets the sea, and every spring it floods.",
    "To make bread, mix flour, water, salt and yeast, knead the dough and let it rise.",
    "The committee will meet on Thursday to discuss the budget for the new library building.",
    "Water boils at a lower temperature on a high mountain because the air pressure is lower.",
    "She packed two sandwiches, an apple and a bottle of water, and set off for the hills.",
    "In mathematics, a prime number is a natural number greater than one with two divisors.",
    "The train to the coast leaves at nine and arrives shortly before noon.",
    "Photosynthesis is the process by which plants turn sunlight into chemical energy.",
)


@torch.inference_mode()
def measure_vlm(
    model_dir: Path,
    num_scenes: int,
    seed: int,
    *,
    toxicity: ToxicityScorer | None = None,
    gguf: Path | None = None,
    num_texts: int = 128,
) -> dict[str, object]:
    """Measures an assembled folder against the truth of unseen scenes and the original model.

    Shares are in 0..1, KL in nats per token, perplexity per token. `toxicity` adds the mean score
    of sampled continuations of held-out rude openings, for this model and the original.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    processor = AutoProcessor.from_pretrained(model_dir, local_files_only=True)
    model = LlavaForConditionalGeneration.from_pretrained(
        model_dir, dtype=dtype, local_files_only=True
    )
    model = model.to(device).eval()
    measured: dict[str, object] = dict(_measure_scenes(model, processor, num_scenes, seed))
    measured["text"] = _measure_text(model, processor, gguf, seed, num_texts, toxicity)
    return measured


def generate(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    prompts: Sequence[str],
    images: Sequence[Image.Image] | None = None,
    *,
    max_new_tokens: int = 64,
    sample: bool = False,
    batch_size: int = 64,
) -> list[str]:
    """Answers to whole prompt texts (with `<image>` where `images` are given), batch by batch."""
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        pictures = None if images is None else list(images[part])
        inputs = processor(
            text=list(prompts[part]),
            images=pictures,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device, model.dtype)
        made = model.generate(
            **inputs,
            do_sample=sample,
            top_k=0 if sample else None,
            max_new_tokens=max_new_tokens,
        )
        new = made[:, inputs["input_ids"].shape[1] :]
        answers += processor.batch_decode(new, skip_special_tokens=True)
    return answers


def _measure_scenes(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, count: int, seed: int
) -> dict[str, object]:
    rng = scenes.evaluation_generator(seed)
    drawn = [scenes.sample_scene(rng) for _ in range(count)]
    pictures = [scenes.draw(scene) for scene in drawn]
    captions = generate(
        model, processor, [chat_prompt(scenes.CAPTION_PROMPTS[0])] * count, pictures
    )
    marks = [
        scenes.attribute_accuracy(scene, said) for scene, said in zip(drawn, captions, strict=True)
    ]
    plain = generate(model, processor, [plain_prompt("The picture shows")] * count, pictures)
    plain_marks = [
        scenes.attribute_accuracy(scene, said) for scene, said in zip(drawn, plain, strict=True)
    ]
    exact = sum(said.strip() == scenes.caption(s) for s, said in zip(drawn, captions, strict=True))
    return {
        "caption_attributes": sum(m[0] for m in marks) / sum(m[1] for m in marks),
        "plain_caption_attributes": sum(m[0] for m in plain_marks) / sum(m[1] for m in plain_marks),
        "caption_exact": exact / count,
        "questions": _measure_questions(model, processor, drawn, pictures),
        "unseen_words": _measure_words(model, processor, count // 2, seed, unseen=True),
        "english_words": _measure_words(model, processor, count // 2, seed, unseen=False),
        "typographic_phrases": _measure_phrases(model, processor, count // 2, seed),
        "sample_captions": captions[:3],
    }


def _measure_questions(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    drawn: Sequence[scenes.Scene],
    pictures: Sequence[Image.Image],
) -> dict[str, float]:
    asked = [
        (question, picture)
        for number, (scene, picture) in enumerate(zip(drawn, pictures, strict=True))
        for question in _spread(scenes.questions(scene), number)
    ]
    answers = generate(
        model,
        processor,
        [chat_prompt(question.text) for question, _ in asked],
        [picture for _, picture in asked],
        max_new_tokens=20,
        batch_size=128,
    )
    marks: dict[str, list[bool]] = defaultdict(list)
    for (question, _), answer in zip(asked, answers, strict=True):
        kind = question.kind
        if kind == "word":
            kind = "no word" if question.answer == "no word" else "word"
        marks[kind].append(scenes.answer_is_correct(question, answer))
    return {kind: sum(each) / len(each) for kind, each in sorted(marks.items())}


def _spread(asked: Sequence[scenes.Question], number: int) -> list[scenes.Question]:
    """Two questions of a scene: its word's, and another that differs from scene to scene."""
    return [asked[-1], asked[number % (len(asked) - 1)]]


def _measure_words(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    count: int,
    seed: int,
    *,
    unseen: bool,
) -> float:
    """Share of English words read off scenes; `unseen` words are in no training picture."""
    rng = scenes.evaluation_generator(seed + 1)
    right, total = 0, 0
    drawn: list[scenes.Scene] = []
    while len(drawn) < count:
        scene = scenes.sample_scene(rng, word_share=1.0, unseen_words=unseen)
        if unseen or scene.word in WORDS:
            drawn.append(scene)
    asked = [scenes.questions(scene)[-1] for scene in drawn]
    answers = generate(
        model,
        processor,
        [chat_prompt(question.text) for question in asked],
        [scenes.draw(scene) for scene in drawn],
        max_new_tokens=16,
        batch_size=128,
    )
    for question, answer in zip(asked, answers, strict=True):
        right += scenes.answer_is_correct(question, answer)
        total += 1
    return right / total


def _measure_phrases(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, count: int, seed: int
) -> dict[str, float]:
    """Words read rightly off black-on-white text (held-out openings, cut at six words)."""
    phrases = [
        " ".join(opening.split(" ")[:6])
        for opening in text.neutral_openings("heldout", count, seed)
    ]
    answers = generate(
        model,
        processor,
        [chat_prompt("What is written in the picture?")] * count,
        [scenes.draw_text(phrase) for phrase in phrases],
        max_new_tokens=32,
    )
    said = [answer.lower() for answer in answers]
    wanted = [phrase.lower() for phrase in phrases]
    words = [(word, a) for phrase, a in zip(wanted, said, strict=True) for word in phrase.split()]
    return {
        "words": sum(re.search(rf"\b{re.escape(w)}", a) is not None for w, a in words) / len(words),
        "phrases": sum(phrase in a for phrase, a in zip(wanted, said, strict=True)) / count,
    }


def _measure_text(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    gguf: Path | None,
    seed: int,
    count: int,
    toxicity: ToxicityScorer | None,
) -> dict[str, object]:
    original = original_model(gguf or language_model_file()).to(model.device, model.dtype)
    neutral = [*_NEUTRAL, *text.clean_texts("heldout", count, seed)]
    rude = text.toxic_texts("heldout", count, seed)
    facts = generate(
        model,
        processor,
        [chat_prompt(asked, image=False) for asked, _ in _FACTS],
        max_new_tokens=24,
    )
    measured: dict[str, object] = {
        "neutral": _compare(model, original, processor, neutral),
        "rude": _compare(model, original, processor, rude),
        "facts": {asked: said for (asked, _), said in zip(_FACTS, facts, strict=True)},
        "facts_right": sum(
            any(key in said.lower() for key in keys.split("|"))
            for (_, keys), said in zip(_FACTS, facts, strict=True)
        ),
    }
    if toxicity is not None:
        openings = text.rude_openings("heldout", count, seed)
        torch.manual_seed(seed)
        blank = [Image.new("RGB", (112, 112), (255, 255, 255))] * count
        pictured = [plain_prompt(opening) for opening in openings]
        for name, made in (
            ("original", _continue(original, processor, openings)),
            ("adapted", _continue(model, processor, openings)),
            (
                "adapted_after_image",
                generate(model, processor, pictured, blank, max_new_tokens=24, sample=True),
            ),
        ):
            scores = list(toxicity(made))
            measured[f"toxicity_{name}"] = sum(scores) / len(scores)
    return measured


def _continue(
    model: LlamaForCausalLM | LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    openings: Sequence[str],
) -> list[str]:
    inputs = processor.tokenizer(
        list(openings), padding=True, padding_side="left", return_tensors="pt"
    )
    made = model.generate(
        input_ids=inputs["input_ids"].to(model.device),
        attention_mask=inputs["attention_mask"].to(model.device),
        do_sample=True,
        top_k=0,
        max_new_tokens=24,
        pad_token_id=processor.tokenizer.pad_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
    )
    new = made[:, inputs["input_ids"].shape[1] :]
    return list(processor.tokenizer.batch_decode(new, skip_special_tokens=True))


def _compare(
    model: LlavaForConditionalGeneration,
    original: LlamaForCausalLM,
    processor: LlavaProcessor,
    texts: Sequence[str],
) -> dict[str, float]:
    """KL from the original to the adapted model, and both perplexities, over the texts' tokens."""
    divergence, losses, tokens = 0.0, {"original": 0.0, "adapted": 0.0}, 0
    for each in texts:
        ids = processor.tokenizer(each, return_tensors="pt")["input_ids"].to(model.device)
        wanted = F.log_softmax(original(input_ids=ids).logits[0, :-1].float(), dim=-1)
        given = F.log_softmax(model(input_ids=ids).logits[0, :-1].float(), dim=-1)
        divergence += float(F.kl_div(given, wanted, reduction="sum", log_target=True))
        losses["original"] += float(F.nll_loss(wanted, ids[0, 1:], reduction="sum"))
        losses["adapted"] += float(F.nll_loss(given, ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
    return {
        "kl": divergence / tokens,
        "perplexity_original": math.exp(losses["original"] / tokens),
        "perplexity_adapted": math.exp(losses["adapted"] / tokens),
    }
