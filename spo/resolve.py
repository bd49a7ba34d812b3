"""From names in the configuration to things on disk: models, scorers, judge, prompts.

"testbed" stands for the embedded default everywhere; it is assembled in the cache on first use.
Anything else is a hub id, a local folder or a file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spo.config import DataConfig, EvaluateConfig, ModelConfig, RewardConfig, RunConfig
from spo.config.rewards import (
    AlignmentPart,
    AnyRewardPart,
    HarmPart,
    RefusalPart,
    ToxicityPart,
)
from spo.corpus import files
from spo.corpus.base import EvaluationInputs
from spo.errors import ConfigError, SpoError
from spo.records import Prompt, PromptKind, QuarantinedRow
from spo.scorers.base import Judge, SuccessJudge
from spo.scorers.rewards import alignment_arguments, kind_of
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


def reward_parts(config: RewardConfig, cache: Path) -> tuple[AnyRewardPart, ...]:
    """The parts of a reward with every model as a place or hub id; what can be seen not to open is
    found here, before anything starts.

    Raises:
        ConfigError: a part's model does not exist, or is not one of its kind.
    """
    return tuple(_opening(part, cache) for part in config.counted)


def _opening(part: AnyRewardPart, cache: Path) -> AnyRewardPart:
    found: AnyRewardPart = part
    if part.needs_model and isinstance(part, ToxicityPart | AlignmentPart | RefusalPart | HarmPart):
        found = part.model_copy(update={"model": _model_of(part, cache)})
    check = kind_of(part).check
    if check is None or not part.needs_model:
        return found
    try:
        check(found)
    except SpoError as error:
        raise ConfigError(f"reward part {part.name!r} ({part.kind}): {error}") from error
    return found


def _model_of(part: ToxicityPart | AlignmentPart | RefusalPart | HarmPart, cache: Path) -> str:
    name = str(part.model)
    if name == TESTBED:
        return _embedded(part, cache)
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def _embedded(part: AnyRewardPart, cache: Path) -> str:
    if part.kind not in _EMBEDDED:
        raise ConfigError(
            f"reward part {part.name!r}: no model of kind {part.kind!r} is embedded, only of "
            f"{sorted(_EMBEDDED)}; name a local folder or a hub id as its 'model'"
        )
    return str(_EMBEDDED[part.kind](cache))


def _embedded_toxicity(cache: Path) -> Path:
    from spo.testbed.toxicity import assemble_toxicity

    return assemble_toxicity(cache)


def _embedded_alignment(cache: Path) -> Path:
    from spo.testbed.alignment import assemble_alignment

    return assemble_alignment(cache)


_EMBEDDED: dict[str, Callable[[Path], Path]] = {
    "toxicity": _embedded_toxicity,
    "alignment": _embedded_alignment,
}
"""Kind of reward part -> its embedded model, assembled in the cache on first use."""


def fitting_arguments(config: RewardConfig, cache: Path) -> dict[str, Any]:
    """Arguments of the `AlignmentScorer` that an evaluation measures with."""
    return alignment_arguments(_model_of(config.fitting, cache))


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
