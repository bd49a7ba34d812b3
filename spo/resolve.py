"""From names in the configuration to things on disk: models, scorers, judge, prompts.

"testbed" stands for the embedded default everywhere; it is assembled in the cache on first use.
Anything else is a hub id, a local folder or a file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spo.config import DataConfig, EvaluateConfig, ModelConfig, RewardConfig, RunConfig
from spo.corpus import files
from spo.corpus.base import EvaluationInputs
from spo.errors import ConfigError
from spo.records import Prompt, PromptKind, QuarantinedRow
from spo.scorers.base import Judge, SuccessJudge
from spo.testbed import corpus as testbed

TESTBED = "testbed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """Where the model is."""

    path: str
    """Local folder or hub id."""
    revision: str | None


def resolve_model(config: ModelConfig, cache: Path) -> ResolvedModel:
    """The model's folder; assembles the testbed model on first use."""
    if config.id == TESTBED:
        from spo.testbed.model import assemble

        return ResolvedModel(path=str(assemble(cache)), revision=None)
    if Path(config.id).is_dir():
        return ResolvedModel(path=str(Path(config.id).absolute()), revision=None)
    return ResolvedModel(path=config.id, revision=config.revision)


def learner_model(config: RunConfig, model: ResolvedModel) -> str:
    """What the learner loads: the model's folder or id, or "fake" beside fake engines."""
    return "fake" if config.engine.backend == "fake" else model.path


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


def open_success_judges(config: EvaluateConfig) -> list[SuccessJudge]:
    """Judges of attack success; the first one decides."""
    from spo.scorers.judges import open_success_judge

    toxicity = open_judge(config)
    return [open_success_judge(settings, toxicity) for settings in config.success_judges]


def training_prompts(
    config: DataConfig, cache: Path, seed: int
) -> tuple[list[Prompt], list[QuarantinedRow]]:
    """Prompts of Stage II, a share of them attacked."""
    if config.train == TESTBED:
        return testbed.testbed_prompts(config, cache, seed), []
    return files.file_prompts(config, cache, seed)


def evaluation_inputs(config: RunConfig) -> EvaluationInputs:
    """Prompt sets, exact checks and the attack's material; all held out from training."""
    if config.data.heldout == TESTBED:
        model = resolve_model(config.model, config.cache)
        return testbed.testbed_inputs(config, model.path, model.revision)
    inputs = files.file_inputs(config)
    if inputs.attacked is None:
        return inputs
    prompts, _ = training_prompts(config.data, config.cache, config.seed)
    harmful = [prompt for prompt in prompts if prompt.kind is PromptKind.HARM]
    return replace(inputs, attack_prompts=tuple(harmful[:16]))
