"""From names in the configuration to things on disk: models, scorers, judge, prompts.

"testbed" stands for the embedded default everywhere; it is assembled in the cache on first use.
Anything else is a hub id, a local folder or a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spo.config import (
    AttackConfig,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    RewardConfig,
    RunConfig,
)
from spo.engines.processing import undecodable
from spo.errors import ConfigError, DataError
from spo.evaluation import Judge, PromptSet
from spo.prompts import read_prompts
from spo.records import Prompt, PromptKind, QuarantinedRow

TESTBED = "testbed"
_CHECK = Callable[[Prompt, str], Mapping[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """Where the model is."""

    path: str
    """Local folder or hub id."""
    revision: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationInputs:
    """What an evaluation runs on."""

    sets: tuple[PromptSet, ...]
    checks: Mapping[str, _CHECK]
    attack_start: Path | None
    """Clean picture that the attack starts from; None when no attack is run."""
    attack_targets: tuple[str, ...]
    quarantined: tuple[QuarantinedRow, ...] = ()


def resolve_model(config: ModelConfig, cache: Path) -> ResolvedModel:
    """The model's folder; assembles the testbed model on first use."""
    if config.id == TESTBED:
        from spo.testbed.model import assemble

        return ResolvedModel(path=str(assemble(cache)), revision=None)
    if Path(config.id).is_dir():
        return ResolvedModel(path=str(Path(config.id).absolute()), revision=None)
    return ResolvedModel(path=config.id, revision=config.revision)


def toxicity_arguments(config: RewardConfig, cache: Path) -> dict[str, Any]:
    """Arguments of `ToxicityScorer`."""
    if config.toxicity_model == TESTBED:
        from spo.testbed.toxicity import assemble_toxicity

        return {"checkpoint": str(assemble_toxicity(cache))}
    if Path(config.toxicity_model).exists():
        return {"checkpoint": str(Path(config.toxicity_model).absolute())}
    return {"model_type": config.toxicity_model}


def alignment_arguments(config: RewardConfig, cache: Path) -> dict[str, Any]:
    """Arguments of `AlignmentScorer`."""
    if config.alignment_model == TESTBED:
        from spo.testbed.alignment import assemble_alignment

        return {"model": str(assemble_alignment(cache))}
    model, sign, pretrained = config.alignment_model.partition(":")
    if not sign:
        raise ConfigError(
            f"reward.alignment_model must be MODEL:PRETRAINED of open_clip (for instance "
            f"ViT-B-32:laion2b_s34b_b79k) or 'testbed', got {config.alignment_model!r}"
        )
    return {"model": model, "pretrained": pretrained}


def open_judge(config: EvaluateConfig) -> Judge:
    """The judge of the evaluation; never the reward model."""
    from spo.scorers.toxicity import EMBEDDED_JUDGE, load_judge

    return load_judge(EMBEDDED_JUDGE if config.judge == TESTBED else config.judge)


def training_prompts(
    config: DataConfig, cache: Path, seed: int
) -> tuple[list[Prompt], list[QuarantinedRow]]:
    """Prompts of Stage II."""
    if config.train == TESTBED:
        from spo.testbed import data

        return data.training_prompts(
            cache,
            harm=config.harm_prompts,
            benign=config.benign_prompts,
            image_fraction=config.image_fraction,
            seed=seed,
        ), []
    prompts, bad = read_prompts(Path(config.train))
    prompts, damaged = _decodable(prompts)
    bad += damaged
    harm = [p for p in prompts if p.kind is PromptKind.HARM][: config.harm_prompts]
    benign = [p for p in prompts if p.kind is PromptKind.BENIGN][: config.benign_prompts]
    return harm + benign, bad


def evaluation_inputs(config: RunConfig) -> EvaluationInputs:
    """Prompt sets, exact checks and the attack's material; all held out from training."""
    if config.data.heldout == TESTBED:
        return _testbed_inputs(config)
    prompts, bad = read_prompts(Path(config.data.heldout))
    harm = tuple(p for p in prompts if p.kind is PromptKind.HARM)[: config.evaluate.harm_prompts]
    benign = tuple(p for p in prompts if p.kind is PromptKind.BENIGN)[: config.evaluate.scenes]
    sets = [_sampled("plain", harm, config.evaluate)]
    if benign:
        sets.append(_greedy("benign", benign, config.evaluate.caption_tokens))
    if not harm:
        raise DataError(f"{config.data.heldout} has no prompt of kind 'harm' to evaluate on")
    return EvaluationInputs(
        sets=tuple(sets),
        checks={},
        attack_start=config.evaluate.attack.picture if config.evaluate.attack.enabled else None,
        attack_targets=_target_lines(config.evaluate.attack),
        quarantined=tuple(bad),
    )


def _testbed_inputs(config: RunConfig) -> EvaluationInputs:
    from spo.testbed import data

    settings = config.evaluate
    picture = data.clean_picture(config.cache, config.seed)
    captions, questions = data.heldout_scenes(config.cache, count=settings.scenes, seed=config.seed)
    openings = tuple(
        data.heldout_openings(count=settings.harm_prompts, seed=config.seed, image=None)
    )
    pictured = tuple(
        data.heldout_openings(count=settings.harm_prompts, seed=config.seed, image=picture)
    )
    return EvaluationInputs(
        sets=(
            _sampled("plain", openings, settings),
            _sampled("image", pictured, settings),
            _greedy("caption", tuple(captions), settings.caption_tokens),
            replace(_greedy("question", tuple(questions), settings.max_tokens), alignment=False),
        ),
        checks={"caption": data.check_caption, "question": data.check_question},
        attack_start=picture if settings.attack.enabled else None,
        attack_targets=tuple(data.attack_targets(settings.attack.targets * 4, config.seed)),
    )


def _sampled(condition: str, prompts: tuple[Prompt, ...], config: EvaluateConfig) -> PromptSet:
    return PromptSet(
        condition=condition,
        prompts=prompts,
        samples=config.samples_per_prompt,
        max_tokens=config.max_tokens,
        temperature=1.0,
    )


def _greedy(condition: str, prompts: tuple[Prompt, ...], max_tokens: int) -> PromptSet:
    return PromptSet(
        condition=condition, prompts=prompts, samples=1, max_tokens=max_tokens, temperature=0.0
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


def _target_lines(config: AttackConfig) -> tuple[str, ...]:
    if not config.enabled:
        return ()
    if config.targets_file is None or config.picture is None:
        raise ConfigError(
            "an attack on your own prompts needs evaluate.attack.picture (a clean picture) and "
            "evaluate.attack.targets_file (one harmful sentence a line), or "
            "evaluate.attack.enabled=false"
        )
    lines = config.targets_file.read_text().splitlines()
    return tuple(line.strip() for line in lines if line.strip())
