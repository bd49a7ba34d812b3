"""What every corpus is made of: prompt sets, their checks, shares of prompts, drawn words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spo.attacks.drawing import draw_text
from spo.attacks.typographic import typographic_prompts
from spo.config import DataConfig, EvaluateConfig, RunConfig
from spo.draws import share_of
from spo.records import Prompt, PromptKind, PromptSet, QuarantinedRow, Split
from spo.scorers.base import Check

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


def benchmark_sets(config: RunConfig) -> list[tuple[PromptSet, Check | None]]:
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
