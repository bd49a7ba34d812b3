"""How `spo/testbed/weights/vlm.safetensors` was trained: one GPU, a few minutes.

A small vision tower and a projector learn from drawn scenes together with a low-rank adapter on
SmolLM2. At the same time the adapted model is held to the original one on plain text and chat,
with and without a picture before it, so that it goes on knowing and speaking as it did.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import CLIPVisionModel, LlamaForCausalLM, PreTrainedTokenizerBase

from spo.testbed import model as assembly
from spo.testbed import scenes
from spo.testbed.training import distillation
from spo.testbed.training.vlm_data import (
    IGNORED,
    LESSONS,
    NO_LETTER,
    Sample,
    SampleStream,
    encode,
)

# Two letters at most have their middle in one patch: one in its left, one in its right half.
_LETTER_SLOTS = 2
_NO_LETTER_WEIGHT = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class VlmTraining:
    """Settings of one training run, e.g. `VlmTraining(out=Path("weights"), minutes=7.5)`."""

    out: Path
    """Folder for `vlm_tower.safetensors`, `vlm_adapter.safetensors` and `vlm.json`."""
    minutes: float = 7.5
    """Wall time of the training steps, evaluation and sampling of texts not counted."""
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
    """Which tasks: a key of `LESSONS`. The shipped weights had `scenes`, then `reading`."""
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


class AdaptedLinear(nn.Module):
    """A frozen linear map with a trainable low-rank update beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(base.weight.detach(), requires_grad=False)
        rank, device = assembly.LORA_RANK, base.weight.device
        bound = 1.0 / math.sqrt(base.in_features)
        start = torch.empty(rank, base.in_features, device=device).uniform_(-bound, bound)
        self.a = nn.Parameter(start)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in the dtype of `x`."""
        low = F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))
        return F.linear(x, self.weight) + assembly.LORA_SCALE * low


class VisionLanguageModel(nn.Module):
    """Tower, projector and adapted language model, as they are trained."""

    def __init__(self, language: LlamaForCausalLM) -> None:
        super().__init__()
        config = assembly.vision_config()
        width = language.config.hidden_size
        self.tower = CLIPVisionModel(config)
        self.projector = nn.Sequential(
            nn.Linear(config.hidden_size, width), nn.GELU(), nn.Linear(width, width)
        )
        # Only a teacher of the tower: nothing of it is kept after training.
        self.letters = nn.Sequential(
            nn.LayerNorm(config.hidden_size),
            nn.Linear(config.hidden_size, _LETTER_SLOTS * (NO_LETTER + 1)),
        )
        self.language = language
        language.requires_grad_(False)
        for block in language.model.layers:
            for name in assembly.LORA_MODULES:
                parent, child = name.split(".")
                part = getattr(block, parent)
                setattr(part, child, AdaptedLinear(getattr(part, child)))

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Final hidden states [batch, length, width] for ids with the pictures' tokens in place.

        The second value holds letter logits [pictures, 49, 2, 27].

        `images` holds one uint8 picture for every row of `ids` that has picture tokens, in order.
        """
        embedded = self.language.model.embed_tokens(ids)
        pixels = images.float().div_(127.5).sub_(1.0)
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            patches = self.tower(pixel_values=pixels).last_hidden_state[:, 1:]
            features = self.projector(patches)
            letters = self.letters(patches).unflatten(-1, (_LETTER_SLOTS, NO_LETTER + 1))
        slots = (ids == assembly.IMAGE_TOKEN_ID).unsqueeze(-1)
        embedded = embedded.masked_scatter(slots, features.to(embedded.dtype))
        hidden = self.language.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return hidden, letters

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits of hidden states."""
        return F.linear(hidden, self.language.model.embed_tokens.weight)

    def load_trained(self, state: dict[str, Tensor]) -> None:
        """Takes over weights as `trained_state` names them."""
        own = dict(self._named())
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)

    def trained_state(self) -> dict[str, Tensor]:
        """Tower, projector and adapter in float16, named as `vlm.safetensors` stores them."""
        return {name: value.detach().half().cpu().contiguous() for name, value in self._named()}

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self.tower.named_parameters():
            yield f"vision_tower.vision_model.{name.removeprefix('vision_model.')}", value
        for target, source in (("linear_1", self.projector[0]), ("linear_2", self.projector[2])):
            for name, value in source.named_parameters():
                yield f"multi_modal_projector.{target}.{name}", value
        for layer, block in enumerate(self.language.model.layers):
            for module in assembly.LORA_MODULES:
                adapted = block.get_submodule(module)
                yield f"lora.{layer}.{module}.a", adapted.a
                yield f"lora.{layer}.{module}.b", adapted.b


def train(config: VlmTraining) -> dict[str, object]:
    """Trains, saves into `config.out` (also on the way) and measures; returns what it measured."""
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gguf = config.gguf or assembly.language_model_file()
    tokenizer = assembly.read_tokenizer(gguf)
    teacher = original_model(gguf).to(device, torch.bfloat16)
    started = time.monotonic()
    corpus = distillation.write_corpus(teacher, tokenizer, config.texts, config.seed)
    print(f"{len(corpus.texts)} texts in {time.monotonic() - started:.0f} s", flush=True)
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
    )
    exams = {
        "words": word_exam(tokenizer, unseen=False),
        "unseen_words": word_exam(tokenizer, unseen=True),
    }
    log = _run_steps(config, student, teacher, corpus, stream, exams)
    save(student, config, log)
    report = {"log": log}
    if config.eval_scenes:
        report["measured"] = _measure(config, gguf)
        (config.out / "vlm.json").write_text(json.dumps(report, indent=1))
        print(json.dumps(report["measured"], indent=1), flush=True)
    return report


def original_model(gguf: Path) -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct as it is, in float32, not trainable."""
    text_config, state = assembly.read_language_model(gguf)
    language = LlamaForCausalLM(text_config)
    language.load_state_dict(state, strict=False)
    language.tie_weights()
    return language.eval().requires_grad_(False)


def save(student: VisionLanguageModel, config: VlmTraining, log: list[dict[str, float]]) -> None:
    """Writes the weights as two files of at most 16 MiB, and the log."""
    config.out.mkdir(parents=True, exist_ok=True)
    state = student.trained_state()
    adapter = {name: value for name, value in state.items() if name.startswith("lora.")}
    tower = {name: value for name, value in state.items() if name not in adapter}
    save_file(tower, config.out / "vlm_tower.safetensors")
    save_file(adapter, config.out / "vlm_adapter.safetensors")
    (config.out / "vlm.json").write_text(json.dumps({"log": log}, indent=1))


def join(folder: Path, target: Path) -> None:
    """Joins the two files of a training run into the one that `assemble` reads."""
    state = assembly.read_weights(folder / "vlm_tower.safetensors")
    state.update(assembly.read_weights(folder / "vlm_adapter.safetensors"))
    save_file({name: value.half() for name, value in state.items()}, target)


def answer_loss(student: VisionLanguageModel, hidden: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the learned tokens; a sample of n tokens weighs as the square root of n.

    `hidden` [batch, length, width]; `labels` [batch, length] with `IGNORED` where nothing is
    learned. Short answers (a word) would drown among captions if every token weighed the same.
    """
    targets = labels[:, 1:]
    learned = targets != IGNORED
    counts = learned.sum(dim=1, keepdim=True).clamp(min=1)
    weights = counts.float().rsqrt().expand_as(targets)[learned]
    losses = F.cross_entropy(
        student.logits(hidden[:, :-1][learned]).float(), targets[learned], reduction="none"
    )
    return (losses * weights).sum() / weights.sum()


def letter_loss(logits: Tensor, letters: Tensor) -> Tensor:
    """Cross-entropy of the letters [batch, 49, 2] under logits [batch, 49, 2, 27]."""
    weight = torch.ones(NO_LETTER + 1, device=logits.device)
    weight[NO_LETTER] = _NO_LETTER_WEIGHT
    return F.cross_entropy(
        logits.float().flatten(0, 2), letters.flatten(), weight=weight, ignore_index=IGNORED
    )


def word_exam(
    tokenizer: PreTrainedTokenizerBase, *, unseen: bool, count: int = 256
) -> dict[str, Tensor]:
    """Unseen scenes with the question for their English word, encoded like training batches."""
    rng = scenes.evaluation_generator(7)
    samples = []
    for _ in range(count):
        scene = scenes.sample_scene(rng, word_share=1.0, string_share=0.0, unseen_words=unseen)
        question = scenes.questions(scene)[-1]
        segments = (
            (assembly.chat_prompt(question.text), False),
            (f"{question.sentence}<|im_end|>", True),
        )
        samples.append(Sample(image=scenes.draw(scene), segments=segments, glyphs=()))
    return encode(samples, tokenizer)


@torch.no_grad()
def exam_result(student: VisionLanguageModel, exam: dict[str, Tensor]) -> float:
    """Share of answers whose every token is the likeliest one (the right ones before it given)."""
    device = student.projector[0].weight.device
    images, ids, labels = (exam[name].to(device) for name in ("images", "ids", "labels"))
    # Another batch size would compile the blocks once more.
    with torch.compiler.set_stance("force_eager"):
        hidden, _ = student(images, ids)
    targets = labels[:, 1:]
    learned = targets != IGNORED
    right = torch.ones_like(targets, dtype=torch.bool)
    right[learned] = student.logits(hidden[:, :-1][learned]).argmax(dim=-1) == targets[learned]
    return float(right.all(dim=1).float().mean())


def text_loss(
    student: VisionLanguageModel,
    hidden: Tensor,
    positions: Tensor,
    teacher: LlamaForCausalLM,
    batch: distillation.TextBatch,
) -> Tensor:
    """Mean KL from the original model to the adapted one over the texts' tokens.

    `hidden` [batch, length, width] of the adapted model; `positions` [batch, text length] says
    where in it each token of the text stands.
    """
    with torch.no_grad():
        original = teacher.model(input_ids=batch.ids, use_cache=False).last_hidden_state
        wanted = F.linear(original[batch.mask], teacher.model.embed_tokens.weight).float()
        wanted = F.log_softmax(wanted, dim=-1)
    places = positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
    given = student.logits(torch.gather(hidden, 1, places)[batch.mask]).float()
    given = F.log_softmax(given, dim=-1)
    return F.kl_div(given, wanted, reduction="sum", log_target=True) / batch.mask.sum()


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
    adapter, tower = [], []
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
            print(json.dumps({k: round(v, 4) for k, v in log[-1].items()}), flush=True)
        if done - saved_at >= 0.25:
            saved_at = done
            save(student, config, log)


def _step(
    config: VlmTraining,
    student: VisionLanguageModel,
    teacher: LlamaForCausalLM,
    corpus: distillation.Corpus,
    batch: dict[str, Tensor],
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses of one step: answers, texts alone, texts behind a picture, letters."""
    device = student.projector[0].weight.device
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
        letter_loss(letters[:first], batch["letters"].to(device, non_blocking=True)),
    )


def _measure(config: VlmTraining, gguf: Path) -> dict[str, object]:
    from spo.testbed.measure import measure_vlm

    folder = config.out / "assembled"
    folder.mkdir(exist_ok=True)
    weights = config.out / "vlm.safetensors"
    join(config.out, weights)
    assembly.write_folder(folder, gguf, weights)
    measured = measure_vlm(folder, config.eval_scenes, config.seed, gguf=gguf)
    for path in [*folder.iterdir(), weights]:
        path.unlink()
    folder.rmdir()
    return measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the settings of `VlmTraining` that a user may want to change."""
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--gguf", type=Path, default=None)
    parser.add_argument("--batch-size", type=int, default=448)
    parser.add_argument("--text-batch-size", type=int, default=96)
    parser.add_argument("--texts", type=int, default=24000)
    parser.add_argument("--max-steps", type=int, default=0)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--eval-scenes", type=int, default=512)
    parser.add_argument("--lesson", choices=sorted(LESSONS), default="scenes")
    parser.add_argument("--start", type=Path, default=None)
    parser.add_argument("--text-weight", type=float, default=1.0)
    parser.add_argument("--tower-rate", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", dest="compile", action="store_false")


def main(arguments: list[str] | None = None) -> None:
    """The command line of this recipe; see `add_arguments`."""
    parser = argparse.ArgumentParser(prog="train-vlm", description=__doc__)
    add_arguments(parser)
    train(VlmTraining(**vars(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()
