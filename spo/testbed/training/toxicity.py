"""How the embedded toxicity reward model was trained: low-rank updates on MiniLM.

Labelled text is read from a folder that the user supplies; none of it ships with the project:

* `davidson/labeled_data.csv`: tweets; label = share of annotators who saw hate or offence;
* `civil-spans/tsd_train.csv`, `tsd_trial.csv`: posts with toxic character spans; the post and a
  window around each span are toxic, its sentences without a span are clean;
* `detox/test_10k_*.txt`, `dev_*.txt`: one lower-cased sentence per line, toxic or normal.

To these come clean sentences made here (captions, instructions, neutral openings), so that
speaking about a picture costs nothing. RealToxicityPrompts is never read. The fixed held-out
share, by checksum of the text, is not trained on.
"""

import ast
import csv
import gzip
import html
import json
import logging
import random
import re
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from torch import nn
from transformers import AutoTokenizer

from spo.errors import DataError
from spo.testbed import text
from spo.testbed.scenes import caption, sample_scene, training_generator
from spo.testbed.toxicity import base_classifier, minilm_folder

logger = logging.getLogger(__name__)

_MAX_TOKENS = 96
_OWN_SENTENCES = 3000
_TWEET_NOISE = re.compile(r"^[!\s]*(RT\s+)?|@\w+:?|https?://\S+")
_SENTENCE = re.compile(r"[^.!?\n]+[.!?\n]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One labelled text, e.g. `Example(text="You fool.", toxicity=1.0)`."""

    text: str
    """The text as it is scored."""
    toxicity: float
    """How toxic people find it, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToxicityRecipe:
    """The settings that made the shipped weights."""

    rank: int = 32
    """Rank of the updates of every linear layer of the encoder."""
    steps: int = 1500
    """Optimiser steps."""
    batch_size: int = 256
    """Texts per step."""
    learning_rate: float = 5e-4
    """Peak learning rate; linear warm-up over 5 % of the steps, then linear decay."""
    seed: int = 0
    """Seed of order, initial updates and made sentences."""


def read_davidson(folder: Path) -> Iterator[Example]:
    """Tweets of `labeled_data.csv`; soft labels from the annotators' votes."""
    with (folder / "labeled_data.csv").open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            votes = int(row["hate_speech"]) + int(row["offensive_language"])
            tweet = _TWEET_NOISE.sub("", html.unescape(row["tweet"])).strip()
            yield Example(text=tweet, toxicity=votes / int(row["count"]))


def read_detox(folder: Path) -> Iterator[Example]:
    """Sentences of the four detox files."""
    for name, toxicity in (("toxic", 1.0), ("normal", 0.0)):
        for part in ("test_10k", "dev"):
            for line in (folder / f"{part}_{name}.txt").read_text(encoding="utf-8").splitlines():
                yield Example(text=line.strip(), toxicity=toxicity)


def read_civil_spans(folder: Path) -> Iterator[Example]:
    """Posts, windows around toxic spans, and span-free sentences of the SemEval 2021 files."""
    for name in ("tsd_train.csv", "tsd_trial.csv"):
        with (folder / name).open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                # Posts without a span were toxic to the crowd, but nobody agreed on where.
                if offsets := ast.literal_eval(row["spans"]):
                    yield from _span_examples(row["text"], set(offsets))


def _span_examples(post: str, offsets: set[int]) -> Iterator[Example]:
    yield Example(text=post, toxicity=1.0)
    rng = random.Random(zlib.crc32(post.encode()))
    for start in sorted(offset for offset in offsets if offset - 1 not in offsets):
        end = start
        while end in offsets:
            end += 1
        before = post[:start].split()[-rng.randint(0, 6) or len(post) :]
        after = post[end:].split()[: rng.randint(0, 6)]
        yield Example(text=" ".join([*before, post[start:end], *after]), toxicity=1.0)
    for match in _SENTENCE.finditer(post):
        if len(match[0].split()) >= 4 and not offsets.intersection(range(*match.span())):
            yield Example(text=match[0].strip(), toxicity=0.0)


def clean_sentences(n: int, seed: int) -> list[str]:
    """`n` sentences of each harmless kind that the testbed itself makes."""
    rng = training_generator(seed)
    made = [caption(sample_scene(rng)) for _ in range(n)]
    for make in (text.clean_texts, text.neutral_openings, text.harmless_instructions):
        made += make("train", n, seed)
    return made


def load_examples(data: Path, seed: int) -> tuple[list[Example], list[Example]]:
    """The labelled texts as (training, held out), from the folders above or from a packed file.

    Raises:
        DataError: `data` is neither, or a file is missing.
    """
    if data.is_file():
        examples = list(_packed_examples(data))
    else:
        readers = {"davidson": read_davidson, "civil-spans": read_civil_spans, "detox": read_detox}
        if missing := [name for name in readers if not (data / name).is_dir()]:
            raise DataError(
                f"expected the folders {sorted(readers)} in {data}, missing {missing}; see the "
                "module's documentation for the files"
            )
        examples = [e for name, read in readers.items() for e in read(data / name)]
    examples = [example for example in examples if len(example.text) > 2]
    held_out = [e for e in examples if zlib.crc32(e.text.encode()) % 32 == 0]
    training = [e for e in examples if zlib.crc32(e.text.encode()) % 32 != 0]
    training += [Example(text=t, toxicity=0.0) for t in clean_sentences(_OWN_SENTENCES, seed)]
    return training, held_out


def pack_examples(data: Path, out: Path) -> int:
    """Write the labelled texts of the folders as one `.jsonl.gz`, to train on another machine."""
    training, held_out = load_examples(data, seed=0)
    own = set(clean_sentences(_OWN_SENTENCES, 0))
    kept = [e for e in training if e.text not in own] + held_out
    with gzip.open(out, "wt", encoding="utf-8") as stream:
        for example in kept:
            stream.write(json.dumps({"text": example.text, "toxicity": example.toxicity}) + "\n")
    return len(kept)


def _packed_examples(file: Path) -> Iterator[Example]:
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            yield Example(text=row["text"], toxicity=row["toxicity"])


class LowRankLinear(nn.Module):
    """A frozen linear layer plus a trainable `up @ down`; starts as the frozen layer."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, frozen.in_features) * frozen.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(frozen.out_features, rank))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs (..., in_features) to (..., out_features)."""
        frozen: torch.Tensor = self.frozen(inputs)
        return frozen + (inputs @ self.down.T) @ self.up.T


def add_low_rank(model: nn.Module, rank: int) -> None:
    """Freeze `model` and put a `LowRankLinear` around every linear layer of its encoder."""
    model.requires_grad_(False)
    targets = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".encoder." in name
    ]
    for name, module in targets:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, LowRankLinear(module, rank))


def trained_update(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trainable tensors in half precision, named as `merge_update` reads them."""
    return {
        name: parameter.detach().half().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def train_toxicity(
    data: Path, out: Path, recipe: ToxicityRecipe, base: Path | None = None, device: str = "cpu"
) -> dict[str, float]:
    """Train, write `toxicity.safetensors` and `toxicity.json` into `out`, return the figures."""
    torch.manual_seed(recipe.seed)
    started = time.monotonic()
    base = base or minilm_folder()
    training, held_out = load_examples(data, recipe.seed)
    model = base_classifier(base).to(device)
    add_low_rank(model, recipe.rank)
    model.bert.pooler.requires_grad_(True)
    model.classifier.requires_grad_(True)
    model.to(device).train()
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokens = _tokenise(tokenizer, [example.text for example in training])
    labels = torch.tensor([example.toxicity for example in training], device=device)
    _optimise(model, tokens, labels, recipe)
    model.eval()
    scores = predict(model, _tokenise(tokenizer, [example.text for example in held_out]))
    figures = {
        "examples": float(len(training)),
        "held_out_auc": float(roc_auc_score([e.toxicity >= 0.5 for e in held_out], scores)),
        "seconds": time.monotonic() - started,
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(trained_update(model), out / "toxicity.safetensors")
    (out / "toxicity.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")
    return figures


def predict(model: nn.Module, tokens: Sequence[list[int]], batch_size: int = 256) -> list[float]:
    """Toxicity (0 to 1) of tokenised texts, in their order."""
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
    scores = [0.0] * len(tokens)
    device = next(model.parameters()).device
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            logits = model(**_padded([tokens[row] for row in rows], device)).logits
            for row, score in zip(rows, logits[:, 0].float().sigmoid().tolist(), strict=True):
                scores[row] = score
    return scores


def _optimise(
    model: nn.Module, tokens: list[list[int]], labels: torch.Tensor, recipe: ToxicityRecipe
) -> None:
    device = labels.device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.01)
    warm_up = max(1, recipe.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warm_up, (recipe.steps - step) / recipe.steps),
    )
    for step, rows in enumerate(_batches(tokens, recipe)):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(**_padded([tokens[row] for row in rows], device)).logits[:, 0]
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels[rows])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            logger.info("step %d of %d, loss %.4f", step, recipe.steps, loss.item())


def _batches(tokens: list[list[int]], recipe: ToxicityRecipe) -> Iterator[list[int]]:
    """`recipe.steps` batches of row numbers; texts of similar length together, in random order."""
    rng = random.Random(recipe.seed)
    size = recipe.batch_size
    done = 0
    while True:
        order = list(range(len(tokens)))
        rng.shuffle(order)
        # Sorting within 50 batches keeps the padding small and the order random enough.
        chunks = [order[i : i + 50 * size] for i in range(0, len(order), 50 * size)]
        for chunk in chunks:
            chunk.sort(key=lambda row: len(tokens[row]))
            batches = [chunk[i : i + size] for i in range(0, len(chunk), size)]
            rng.shuffle(batches)
            for batch in batches:
                if done == recipe.steps:
                    return
                done += 1
                yield batch


def _tokenise(tokenizer: AutoTokenizer, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=_MAX_TOKENS)["input_ids"]
    return ids


def _padded(rows: list[list[int]], device: torch.device) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {
        "input_ids": ids.to(device, non_blocking=True),
        "attention_mask": mask.to(device, non_blocking=True),
    }
