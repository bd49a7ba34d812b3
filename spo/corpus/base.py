"""`Corpus`, what a run is made on, and what every corpus is made of.

There are two: the embedded testbed's (`spo.testbed.corpus`) and the user's own files
(`spo.corpus.files`). `spo.resolve.open_corpus` alone knows which one a configuration means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from spo.attacks.drawing import draw_text
from spo.attacks.typographic import typographic_prompts
from spo.config import (
    ContinuationSource,
    CorpusSettings,
    DataConfig,
    EvaluateConfig,
    InstructionSource,
    TypographicSource,
)
from spo.draws import share_of
from spo.records import Prompt, PromptKind, PromptSet, QuarantinedRow, Side, Split
from spo.scorers.base import Check

Sides = Sequence[tuple[Side, Prompt]]
"""A contrast: prompts, each with its side."""
TwoSided = InstructionSource | ContinuationSource | TypographicSource
"""Sources that have both sides of one corpus where they name no data set."""

PICTURE_SIZE = 336
"""Side of a drawn picture for models other than the testbed's, which sees 112."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationInputs:
    """What an evaluation runs on."""

    sets: tuple[PromptSet, ...]
    checks: Mapping[str, Check]
    attack_starts: tuple[Path, ...] = ()
    """Clean pictures that picture attacks start from, in turn; none when no attack is run."""
    attack_targets: tuple[str, ...] = ()
    attack_prompts: tuple[Prompt, ...] = ()
    """Training prompts that one picture for all prompts is made on."""
    attacked: str | None = None
    """Condition whose pictures are attacked."""
    picture_size: int | None = None
    """Side of drawn pictures in pixels; None takes the usual one."""
    quarantined: tuple[QuarantinedRow, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackMaterial:
    """What picture attacks in the loop of Stage II are made from."""

    requests: list[Prompt]
    """Training prompts that one picture is to work on."""
    starts: list[Path]
    """Clean pictures."""
    targets: tuple[str, ...]
    """Harmful sentences; not those of the evaluation."""
    asks_requests: bool = False
    """Whether an attacked training prompt asks one of `requests` instead of its own words."""


class Corpus(Protocol):
    """What a run is made on. Nothing is read or drawn before it is asked for.

    Every method raises `DataError` for files that cannot be used and `ConfigError` for settings
    that do not go together. Prompts that choices are made on, held out from training and evaluation
    alike, are to be `validation_inputs`, of the same record as `evaluation_inputs`.
    """

    def training_prompts(self) -> tuple[list[Prompt], list[QuarantinedRow]]:
        """Prompts of Stage II, a share of them with drawn words; and rows that cannot be used."""
        ...

    def contrast(self, source: TwoSided, seed: int) -> Sides:
        """`source.rows` prompts on each side, for a source that names no data set of its own."""
        ...

    def calibration_prompts(self) -> tuple[list[Prompt], list[QuarantinedRow]]:
        """Benign prompts, from whose generations come h0 and the mean norms; and unusable rows."""
        ...

    def evaluation_inputs(self) -> EvaluationInputs:
        """Prompt sets with their exact checks, and the attacks' material; held out."""
        ...

    def attack_starts(self, count: int, seed: int) -> list[Path]:
        """Clean pictures, for an attacked source of Stage I that names none."""
        ...

    def attack_prompts(self, count: int, seed: int) -> list[Prompt]:
        """Harmful prompts to attack with, for such a source that names none."""
        ...

    def attack_targets(self, count: int, seed: int) -> list[str]:
        """Harmful sentences to raise the likelihood of, for such a source that names none."""
        ...

    def loop_attack(self, prompts: Sequence[Prompt], seed: int) -> AttackMaterial:
        """What attacks in the loop of Stage II are made from.

        Args:
            prompts: the training prompts.
            seed: another one than the evaluation's.
        """
        ...


def sampled(condition: str, prompts: tuple[Prompt, ...], config: EvaluateConfig) -> PromptSet:
    return PromptSet(
        condition=condition,
        prompts=prompts,
        samples=config.samples_per_prompt,
        max_tokens=config.max_tokens,
        temperature=1.0,
    )


def greedy(condition: str, prompts: tuple[Prompt, ...], max_tokens: int) -> PromptSet:
    return PromptSet(
        condition=condition, prompts=prompts, samples=1, max_tokens=max_tokens, temperature=0.0
    )


def benchmark_sets(config: CorpusSettings) -> list[tuple[PromptSet, Check | None]]:
    """One condition for each benchmark and kind of prompt; questions come with their check."""
    from spo.datasets import CHECKS, load_prompts

    settings = config.evaluate
    sets: list[tuple[PromptSet, Check | None]] = []
    for benchmark in settings.benchmarks:
        prompts = load_prompts(benchmark, cache=config.cache, seed=config.seed, split=Split.HELDOUT)
        check = CHECKS.get(benchmark.format)
        for kind in PromptKind:
            part = tuple(prompt for prompt in prompts if prompt.kind is kind)
            if not part:
                continue
            name = f"{benchmark.format} {Path(benchmark.path).stem} {kind.value}"
            made = (
                greedy(name, part, settings.caption_tokens)
                if check
                else sampled(name, part, settings)
            )
            sets.append((replace(made, alignment=False), check))
    return sets


def harmful_share(prompts: Sequence[Prompt], fraction: float, draw: str) -> list[Prompt]:
    """A share of the harmful prompts, chosen by a hash of their ids; `draw` names the draw."""
    return [
        prompt
        for prompt in prompts
        if prompt.kind is PromptKind.HARM and share_of(f"{draw}/{prompt.prompt_id}") < fraction
    ]


def target_sentences(file: Path) -> tuple[str, ...]:
    """What picture attacks aim at: one sentence a line."""
    return tuple(line.strip() for line in file.read_text().splitlines() if line.strip())


def with_drawn_words(
    prompts: Sequence[Prompt], config: DataConfig, cache: Path, seed: int, size: int
) -> list[Prompt]:
    """A share of the harmful prompts, chosen by id, asked through a picture of their words."""
    if not config.typographic_fraction:
        return list(prompts)
    side = config.picture_size or size

    attacked = harmful_share(prompts, config.typographic_fraction, f"typographic/{seed}")
    drawn = typographic_prompts(attacked, lambda text: draw_text(text, side), cache / "typographic")
    by_id = {prompt.prompt_id: prompt for prompt in drawn}
    return [by_id.get(prompt.prompt_id, prompt) for prompt in prompts]
