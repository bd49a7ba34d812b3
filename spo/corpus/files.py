"""The user's own files as a corpus: training prompts and evaluation sets out of JSONL."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from spo.config import DataConfig, EvaluateConfig, RunConfig
from spo.corpus.base import (
    PICTURE_SIZE,
    EvaluationInputs,
    benchmark_sets,
    greedy,
    sampled,
    target_sentences,
    with_drawn_words,
)
from spo.datasets.prompts import read_prompts
from spo.engines.processing import undecodable
from spo.errors import ConfigError, DataError
from spo.records import Prompt, PromptKind, QuarantinedRow


def file_prompts(
    config: DataConfig, cache: Path, seed: int
) -> tuple[list[Prompt], list[QuarantinedRow]]:
    """Prompts of Stage II, a share of them attacked."""
    prompts, bad = read_prompts(Path(config.train))
    prompts, damaged = _decodable(prompts)
    bad += damaged
    harm = [p for p in prompts if p.kind is PromptKind.HARM][: config.harm_prompts]
    benign = [p for p in prompts if p.kind is PromptKind.BENIGN][: config.benign_prompts]
    return with_drawn_words(harm + benign, config, cache, seed, PICTURE_SIZE), bad


def file_inputs(config: RunConfig) -> EvaluationInputs:
    """Prompt sets, exact checks and the attack's material; all held out from training."""
    prompts, bad = read_prompts(Path(config.data.heldout))
    harm = tuple(p for p in prompts if p.kind is PromptKind.HARM)[: config.evaluate.harm_prompts]
    benign = tuple(p for p in prompts if p.kind is PromptKind.BENIGN)[: config.evaluate.scenes]
    sets = [sampled("plain", harm, config.evaluate)]
    start, targets = _attack_material(config.evaluate)
    if start is not None:
        pictured = tuple(replace(prompt, image=str(start)) for prompt in harm)
        sets.append(sampled("image", pictured, config.evaluate))
    if benign:
        sets.append(greedy("benign", benign, config.evaluate.caption_tokens))
    benchmarks = benchmark_sets(config)
    sets += [part for part, _ in benchmarks]
    if not harm:
        raise DataError(f"{config.data.heldout} has no prompt of kind 'harm' to evaluate on")
    return EvaluationInputs(
        sets=tuple(sets),
        checks={part.condition: check for part, check in benchmarks if check},
        attack_starts=() if start is None else (start,),
        attack_targets=targets,
        attacked="image" if start is not None else None,
        quarantined=tuple(bad),
    )


def _decodable(prompts: list[Prompt]) -> tuple[list[Prompt], list[QuarantinedRow]]:
    """Prompts whose picture can be decoded, and the others with the reason."""
    reasons = undecodable(prompts)
    good = [prompt for prompt in prompts if prompt.image not in reasons]
    bad = [
        QuarantinedRow(row_id=prompt.prompt_id, reason=reasons[prompt.image])
        for prompt in prompts
        if prompt.image in reasons
    ]
    return good, bad


def _attack_material(config: EvaluateConfig) -> tuple[Path | None, tuple[str, ...]]:
    """Clean picture and target sentences of picture attacks on a user's own prompts."""
    if not any(attack.kind == "pgd" for attack in config.attacks):
        return None, ()
    if config.attack_targets_file is None or config.attack_picture is None:
        raise ConfigError(
            "a picture attack on your own prompts needs evaluate.attack_picture (a clean picture) "
            "and evaluate.attack_targets_file (one harmful sentence a line); without a picture "
            "attack set evaluate.attacks=[]"
        )
    return config.attack_picture, target_sentences(config.attack_targets_file)
