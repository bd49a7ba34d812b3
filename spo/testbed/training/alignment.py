"""How the embedded alignment model was trained: a contrast over drawn scenes with exact truth.

Every picture meets all descriptions of the batch, each picture's own wrong ones (one thing
changed) and sentences about other matters. Which description is true of which picture is known,
so a partial description that happens to fit another picture is never taken for a mistake.
"""

import json
import logging
import math
import multiprocessing
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import nn

from spo.testbed import text
from spo.testbed.alignment import (
    CONTEXT_LENGTH,
    END,
    IMAGE_SIZE,
    PAD,
    START,
    model_config,
)
from spo.testbed.descriptions import (
    FACTS,
    claim_facts,
    sample_description,
    sample_wrong,
    say,
    scene_facts,
    word_number,
)
from spo.testbed.scenes import draw, sample_scene, training_generator
from spo.testbed.vocabulary import WORDS

logger = logging.getLogger(__name__)

_VARIANTS = 4
_WRONG = 3
_MOST_CLAIMS = 4
_MOST_FACTS = 28
_CHUNK = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignmentRecipe:
    """The settings that made the shipped weights."""

    scenes: int = 98_304
    """Drawn scenes, each with four descriptions and three wrong ones to each."""
    steps: int = 8000
    """Optimiser steps at most."""
    seconds: float = 150.0
    """Time for the optimiser; the learning rate reaches zero at whichever bound comes first."""
    batch_size: int = 1024
    """Pictures per step."""
    learning_rate: float = 1e-3
    """Peak learning rate; warm-up over 3 % of the run, then cosine to zero."""
    vocabulary_size: int = 1024
    """Pieces of the byte-level tokenizer."""
    workers: int = 16
    """Processes that draw."""
    seed: int = 0
    """Seed of scenes, descriptions and order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneBatch:
    """Scenes and descriptions as arrays; `n` scenes, `v` variants, `w` wrong ones per variant."""

    images: npt.NDArray[np.uint8]
    """(n, size, size, 3) pixels."""
    facts: npt.NDArray[np.int16]
    """(n, most facts) facts that hold, padded with -1."""
    words: npt.NDArray[np.int32]
    """(n,) number of the rendered word, -1 for none."""
    tokens: npt.NDArray[np.int16]
    """(n, v, 1 + w, length) token ids; the first is true, the others are wrong."""
    claims: npt.NDArray[np.int16]
    """(n, v, 1 + w, most claims) claimed facts, padded with -1."""
    claimed_words: npt.NDArray[np.int32]
    """(n, v, 1 + w) number of the claimed word, -1 for none."""


def build_tokenizer(recipe: AlignmentRecipe) -> Tokenizer:
    """A lower-casing byte-level BPE learnt on descriptions, rendered words and made sentences."""
    rng = training_generator(recipe.seed)
    choose = random.Random(recipe.seed)
    corpus = [say(sample_description(sample_scene(rng), choose)) for _ in range(4000)]
    corpus += list(WORDS) + other_sentences(600, recipe.seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (START, END)],
    )
    return tokenizer


def other_sentences(n: int, seed: int) -> list[str]:
    """Sentences that describe no scene: `n` of each kind that the testbed makes, and fragments."""
    made = ["", ".", "I cannot help with that.", "I'm sorry, but I can't do that.", "Yes.", "No."]
    for make in (
        text.toxic_texts,
        text.clean_texts,
        text.rude_openings,
        text.harmful_instructions,
        text.harmless_instructions,
    ):
        made += make("train", n, seed)
    return made


def make_batch(job: tuple[int, int, str]) -> SceneBatch:
    """Draw and describe scenes; `job` is (first seed, number of scenes, tokenizer as JSON)."""
    seed, n, serialised = job
    tokenizer = _padding_tokenizer(serialised)
    rng = training_generator(seed)
    choose = random.Random(seed)
    shape = (n, _VARIANTS, 1 + _WRONG)
    batch = SceneBatch(
        images=np.zeros((n, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8),
        facts=np.full((n, _MOST_FACTS), -1, np.int16),
        words=np.full(n, -1, np.int32),
        tokens=np.zeros((*shape, CONTEXT_LENGTH), np.int16),
        claims=np.full((*shape, _MOST_CLAIMS), -1, np.int16),
        claimed_words=np.full(shape, -1, np.int32),
    )
    for row in range(n):
        scene = sample_scene(rng)
        batch.images[row] = np.asarray(draw(scene, IMAGE_SIZE))
        facts = sorted(scene_facts(scene))
        batch.facts[row, : len(facts)] = facts
        batch.words[row] = word_number(scene.word)
        said = []
        for variant in range(_VARIANTS):
            true = sample_description(scene, choose)
            wrong = [sample_wrong(scene, true, choose) for _ in range(_WRONG)]
            for place, description in enumerate((true, *wrong)):
                claimed = sorted(claim_facts(description))
                batch.claims[row, variant, place, : len(claimed)] = claimed
                batch.claimed_words[row, variant, place] = word_number(description.word)
                said.append(say(description))
        ids = [encoding.ids for encoding in tokenizer.encode_batch(said)]
        batch.tokens[row] = np.asarray(ids, np.int16).reshape(*shape[1:], -1)
    return batch


def train_alignment(out: Path, recipe: AlignmentRecipe, device: str = "cpu") -> dict[str, float]:
    """Train; write `alignment.safetensors`, `alignment_tokenizer.json`, `alignment.json`.

    Returns the last loss, the steps and the seconds. How well the model does is measured apart,
    through open_clip itself, by `spo.testbed.measure_alignment`.
    """
    torch.manual_seed(recipe.seed)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(recipe)
    tokenizer.save(str(out / "alignment_tokenizer.json"))
    started = time.monotonic()
    data = _draw_all(recipe, tokenizer.to_str())
    logger.info("drew %d scenes in %.0f s", len(data.images), time.monotonic() - started)
    model = _new_model(tokenizer.get_vocab_size(), out).to(device)
    others = _tokens_of(tokenizer, other_sentences(400, recipe.seed)).to(device)
    figures = _optimise(model, data, others, recipe)
    state = {name: t.detach().half().cpu().contiguous() for name, t in model.state_dict().items()}
    save_file(state, out / "alignment.safetensors")
    (out / "alignment.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")
    return figures


def contrast_loss(similarity: torch.Tensor, truth: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each picture's own true description, both ways.

    Args:
        similarity: (pictures, descriptions) scaled cosines.
        truth: the same shape; whether the description holds for the picture.
        own: (pictures,) column of each picture's own true description.

    Columns that hold for a picture without being its own are left out of that picture's choice,
    and pictures for which an own description holds are left out of that description's choice.
    """
    rows = torch.arange(len(own), device=own.device)
    excluded = truth.clone()
    excluded[rows, own] = False
    masked = similarity.masked_fill(excluded, -torch.inf)
    to_text = nn.functional.cross_entropy(masked, own)
    to_image = nn.functional.cross_entropy(masked[:, own].T, rows)
    return (to_text + to_image) / 2


def truth_matrix(
    facts: torch.Tensor, words: torch.Tensor, claims: torch.Tensor, claimed_words: torch.Tensor
) -> torch.Tensor:
    """Which description holds for which scene, (scenes, descriptions) booleans.

    Args:
        facts: (scenes, k) facts that hold, padded with -1.
        words: (scenes,) rendered word, -1 for none.
        claims: (descriptions, j) claimed facts, padded with -1.
        claimed_words: (descriptions,) claimed word, -1 for no claim.
    """
    held, claimed = _one_hot(facts), _one_hot(claims)
    met = held @ claimed.T >= claimed.sum(dim=1) - 0.5
    word_met = (claimed_words[None] == words[:, None]) | (claimed_words[None] == -1)
    return met & word_met


def _one_hot(numbers: torch.Tensor) -> torch.Tensor:
    hot = torch.zeros(len(numbers), FACTS + 1, device=numbers.device)
    hot.scatter_(1, torch.where(numbers < 0, FACTS, numbers).long(), 1.0)
    return hot[:, :FACTS]


def _new_model(vocabulary_size: int, out: Path) -> open_clip.CLIP:
    name = "spo-testbed-alignment"
    file = out / f"{name}.json"
    file.write_text(json.dumps(model_config(vocabulary_size)), encoding="utf-8")
    open_clip.add_model_config(file)
    model: open_clip.CLIP = open_clip.create_model(name)
    file.unlink()
    return model


def _draw_all(recipe: AlignmentRecipe, tokenizer: str) -> SceneBatch:
    # Seeds start high so that the tokenizer's corpus and these scenes are different draws.
    jobs = [
        (1000 + recipe.seed * 1_000_000 + chunk, min(_CHUNK, recipe.scenes), tokenizer)
        for chunk in range(math.ceil(recipe.scenes / _CHUNK))
    ]
    if recipe.workers == 1:
        parts = [make_batch(job) for job in jobs]
    else:
        with multiprocessing.get_context("spawn").Pool(recipe.workers) as pool:
            parts = pool.map(make_batch, jobs, chunksize=1)
    names = SceneBatch.__dataclass_fields__
    return SceneBatch(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    )


def _optimise(
    model: open_clip.CLIP, data: SceneBatch, others: torch.Tensor, recipe: AlignmentRecipe
) -> dict[str, float]:
    device = others.device
    arrays = {
        name: torch.from_numpy(getattr(data, name)).to(device)
        for name in SceneBatch.__dataclass_fields__
    }
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
    )
    started, loss_value, step = time.monotonic(), math.nan, 0
    model.train()
    for step, rows in enumerate(_row_batches(len(data.images), recipe)):
        share = max(step / recipe.steps, (time.monotonic() - started) / recipe.seconds)
        if share >= 1:
            break
        rate = recipe.learning_rate * _schedule(share)
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss = _batch_loss(model, arrays, others, rows.to(device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(50.0))
        if step % 100 == 0:
            loss_value = loss.item()
            logger.info("step %d, loss %.4f, %.0f s", step, loss_value, time.monotonic() - started)
    return {"steps": float(step), "loss": loss_value, "seconds": time.monotonic() - started}


def _schedule(share: float) -> float:
    """Part of the peak learning rate at this share of the run."""
    return min(share / 0.03, 1.0) * 0.5 * (1 + math.cos(math.pi * share)) + 1e-3


def _batch_loss(
    model: open_clip.CLIP, arrays: dict[str, torch.Tensor], others: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    n, device = len(rows), others.device
    variant = torch.randint(_VARIANTS, (n,), device=device)
    tokens = arrays["tokens"][rows, variant].flatten(0, 1).long()
    claims = arrays["claims"][rows, variant].flatten(0, 1)
    claimed_words = arrays["claimed_words"][rows, variant].flatten()
    truth = truth_matrix(arrays["facts"][rows], arrays["words"][rows], claims, claimed_words)
    unrelated = others[torch.randint(len(others), (max(1, n // 16),), device=device)]
    truth = torch.cat([truth, truth.new_zeros(n, len(unrelated))], dim=1)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        images = model.encode_image(_augmented(arrays["images"][rows]), normalize=True)
        texts = model.encode_text(torch.cat([tokens, unrelated]), normalize=True)
    similarity = model.logit_scale.exp() * images.float() @ texts.float().T
    own = torch.arange(n, device=device) * (1 + _WRONG)
    return contrast_loss(similarity, truth, own)


def _augmented(images: torch.Tensor) -> torch.Tensor:
    """Bytes (n, h, w, 3) to (n, 3, h, w) in -1..1, shifted by up to 3 pixels, with light noise."""
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    down, right = (int(torch.randint(-3, 4, ())) for _ in range(2))
    pixels = torch.roll(pixels, (down, right), dims=(2, 3))
    pixels = pixels * (1 + 0.1 * torch.randn(len(pixels), 1, 1, 1, device=pixels.device))
    return (pixels + 0.04 * torch.randn_like(pixels)).clamp(-1, 1)


def _row_batches(n: int, recipe: AlignmentRecipe) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(recipe.seed)
    size = min(recipe.batch_size, n)
    while True:
        order = torch.randperm(n, generator=generator)
        yield from order[: n - n % size].split(size)


def _tokens_of(tokenizer: Tokenizer, sentences: list[str]) -> torch.Tensor:
    padding = _padding_tokenizer(tokenizer.to_str())
    return torch.tensor([encoding.ids for encoding in padding.encode_batch(sentences)])


def _padding_tokenizer(serialised: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(serialised)
    tokenizer.enable_truncation(CONTEXT_LENGTH)
    tokenizer.enable_padding(pad_id=0, pad_token=PAD, length=CONTEXT_LENGTH)
    return tokenizer
