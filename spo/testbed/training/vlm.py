"""How `spo/testbed/weights/vlm.safetensors` was trained: one GPU, a few minutes.

A small vision tower and a projector learn from drawn scenes together with a low-rank adapter on
SmolLM2. At the same time the adapted model is held to the original one on plain text and chat,
with and without a picture before it, so that it goes on knowing and speaking as it did.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from spo.testbed import model as assembly
from spo.testbed.smollm import language_model_file, original_model, read_tokenizer
from spo.testbed.training import distillation
from spo.testbed.training.guard_data import guard_texts
from spo.testbed.training.vlm_data import LESSONS, SampleStream
from spo.testbed.training.vlm_network import VisionLanguageModel
from spo.testbed.training.vlm_objectives import (
    answer_loss,
    exam_result,
    letter_loss,
    text_loss,
    word_exam,
)

logger = logging.getLogger(__name__)
WEIGHTS_NAME = "vlm.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class VlmTraining:
    """Settings of one training run, e.g. `VlmTraining(out=Path("weights"), minutes=7.5)`."""

    out: Path
    """Folder for `vlm.safetensors` and `vlm.json`."""
    minutes: float = 7.3
    """Wall time of the steps; sampling the texts and measuring come on top."""
    gguf: Path | None = None
    """The language model's GGUF; None takes the installed package's."""
    batch_size: int = 448
    """Drawn samples in a step."""
    text_batch_size: int = 96
    """Distilled texts in a step; as many again stand behind a picture."""
    texts: int = 24000
    """Texts that the original model writes for the distillation."""
    text_weight: float = 1.0
    """Weight of the distillation loss beside the answers' loss."""
    letter_weight: float = 1.0
    """Weight of the letters' loss; 0 leaves it out."""
    learning_rate: float = 1e-3
    """Peak rate; linear warm-up, then a cosine over the wall time."""
    tower_rate: float = 1.0
    """The tower's and the projector's rate, as a multiple of `learning_rate`."""
    lesson: str = "scenes"
    """Which tasks: a key of `LESSONS`."""
    start: Path | None = None
    """Weights to go on from; None starts with an untrained tower and adapter."""
    warmup_steps: int = 100
    """Steps until the peak rate."""
    max_steps: int = 0
    """Ends the run after so many steps where it is above 0."""
    workers: int = 12
    """Processes that draw and tokenise."""
    compile: bool = True
    """Whether to compile the decoder blocks (GPU only)."""
    eval_scenes: int = 512
    """Unseen scenes in the measurement at the end; 0 leaves it out."""
    seed: int = 0
    """Seed of everything drawn."""


def train(config: VlmTraining) -> dict[str, object]:
    """Gives both lessons one after the other and measures; returns the logs and the figures.

    This is how the shipped weights came about, but for their first lesson: it had no letter loss
    and drew from a far larger vocabulary, and taught no reading. `config` is the first lesson's;
    the second goes on from what the first one saved.
    """
    first = replace(config, lesson="scenes")
    second = replace(
        config,
        lesson="reading",
        start=config.out / WEIGHTS_NAME,
        minutes=config.minutes * 0.73,
        texts=max(config.texts * 10 // 24, 12),
        text_weight=2 * config.text_weight,
        tower_rate=1.5 * config.tower_rate,
        seed=config.seed + 1,
    )
    report: dict[str, object] = {each.lesson: train_lesson(each) for each in (first, second)}
    if config.eval_scenes:
        report["measured"] = _measure(config)
    (config.out / "vlm.json").write_text(json.dumps(report, indent=1))
    return report


def train_lesson(config: VlmTraining) -> list[dict[str, float]]:
    """Trains on one lesson's tasks and saves into `config.out` (also on the way); the log."""
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gguf = config.gguf or language_model_file()
    tokenizer = read_tokenizer(gguf)
    teacher = original_model(gguf).to(device, torch.bfloat16)
    started = time.monotonic()
    guard = guard_texts(config.seed) if LESSONS[config.lesson].refuse else None
    corpus = distillation.write_corpus(teacher, tokenizer, config.texts, config.seed, guard)
    logger.info("%d texts in %.0f s", len(corpus.texts), time.monotonic() - started)
    student = VisionLanguageModel(copy.deepcopy(teacher)).to(device)
    if config.start is not None:
        student.load_trained(assembly.read_weights(config.start))
    if config.compile and device.type == "cuda":
        for block in [*student.language.model.layers, *teacher.model.layers]:
            block.compile(dynamic=False)
    stream = SampleStream(
        tokenizer,
        (corpus.openings, corpus.instructions),
        config.batch_size,
        config.seed,
        LESSONS[config.lesson],
        guard.harmful if guard else (),
        corpus.answered if guard else (),
    )
    exams = {
        "words": word_exam(tokenizer, unseen=False),
        "unseen_words": word_exam(tokenizer, unseen=True),
    }
    log = _run_steps(config, student, teacher, corpus, stream, exams)
    save(student, config.out)
    return log


def save(student: VisionLanguageModel, folder: Path) -> None:
    """Writes the weights as the one file that `assemble` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(student.trained_state(), folder / WEIGHTS_NAME)


def _batches(config: VlmTraining, stream: SampleStream) -> Iterator[dict[str, Tensor]]:
    return iter(
        DataLoader(
            stream,
            batch_size=None,
            num_workers=config.workers,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=2 if config.workers else None,
        )
    )


def _optimiser(config: VlmTraining, student: VisionLanguageModel) -> torch.optim.AdamW:
    adapter: list[nn.Parameter] = []
    tower: list[nn.Parameter] = []
    for name, value in student.named_parameters():
        if value.requires_grad:
            (adapter if name.startswith("language.") else tower).append(value)
    groups = [
        {"params": adapter, "peak": config.learning_rate},
        {"params": tower, "peak": config.learning_rate * config.tower_rate},
    ]
    return torch.optim.AdamW(
        groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=torch.cuda.is_available()
    )


def _run_steps(
    config: VlmTraining,
    student: VisionLanguageModel,
    teacher: LlamaForCausalLM,
    corpus: distillation.Corpus,
    stream: SampleStream,
    exams: dict[str, dict[str, Tensor]],
) -> list[dict[str, float]]:
    batches = _batches(config, stream)
    trainable = [value for value in student.parameters() if value.requires_grad]
    optimiser = _optimiser(config, student)
    rng = np.random.default_rng(config.seed)
    log: list[dict[str, float]] = []
    saved_at = 0.0
    started = time.monotonic()
    step = 0
    while True:
        elapsed = time.monotonic() - started
        done = elapsed / (60 * config.minutes)
        if config.max_steps:
            done = max(done, step / config.max_steps)
        if done >= 1.0:
            return log
        stream.progress.value = done
        rate = min(1.0, (step + 1) / config.warmup_steps)
        rate *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimiser.param_groups:
            group["lr"] = rate * group["peak"]
        losses = _step(config, student, teacher, corpus, next(batches), rng)
        answers, alone, behind, letters = losses
        total = answers + config.text_weight * (alone + behind) / 2
        (total + config.letter_weight * letters).backward()
        norm = nn.utils.clip_grad_norm_(trainable, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step += 1
        if step % 25 == 0 or step <= 3:
            values = torch.stack([*losses, norm]).tolist()
            names = ("answers", "text", "text_after_image", "letters", "norm")
            log.append(
                {"step": step, "s": round(elapsed, 1), **dict(zip(names, values, strict=True))}
            )
            if step % 100 == 0:
                log[-1].update({name: exam_result(student, each) for name, each in exams.items()})
            logger.info("%s", {name: round(value, 4) for name, value in log[-1].items()})
        if done - saved_at >= 0.25:
            saved_at = done
            save(student, config.out)


def _step(
    config: VlmTraining,
    student: VisionLanguageModel,
    teacher: LlamaForCausalLM,
    corpus: distillation.Corpus,
    batch: dict[str, Tensor],
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses of one step: answers, texts alone, texts behind a picture, letters."""
    device = student.device
    images, ids, labels = (
        batch[name].to(device, non_blocking=True) for name in ("images", "ids", "labels")
    )
    alone = corpus.draw(rng, config.text_batch_size, after_image=False, device=device)
    behind = corpus.draw(rng, config.text_batch_size, after_image=True, device=device)
    rows = torch.cat([ids, behind.student_ids, alone.student_ids])
    pictures = torch.cat([images, images[: config.text_batch_size]])
    hidden, letters = student(pictures, rows)
    first, second = len(ids), len(ids) + len(behind.ids)
    return (
        answer_loss(student, hidden[:first], labels),
        text_loss(student, hidden[second:], alone.positions, teacher, alone),
        text_loss(student, hidden[first:second], behind.positions, teacher, behind),
        letter_loss(letters[: len(images)], batch["letters"].to(device, non_blocking=True)),
    )


def _measure(config: VlmTraining) -> dict[str, object]:
    from spo.testbed.measure import measure_vlm

    gguf = config.gguf or language_model_file()
    with tempfile.TemporaryDirectory() as folder:
        assembly.write_folder(Path(folder), gguf, config.out / WEIGHTS_NAME)
        return measure_vlm(Path(folder), config.eval_scenes, config.seed, gguf=gguf)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the settings of `VlmTraining` that a user may want to change."""
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=7.3)
    parser.add_argument("--gguf", type=Path, default=None)
    parser.add_argument("--batch-size", type=int, default=448)
    parser.add_argument("--text-batch-size", type=int, default=96)
    parser.add_argument("--texts", type=int, default=24000)
    parser.add_argument("--max-steps", type=int, default=0)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--eval-scenes", type=int, default=512)
    parser.add_argument("--no-compile", dest="compile", action="store_false")


def main(arguments: list[str] | None = None) -> None:
    """The command line of this recipe; see `add_arguments`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog="train-vlm", description=__doc__)
    add_arguments(parser)
    train(VlmTraining(**vars(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()
