"""From names in the configuration to things on disk: models, scorers, judge, prompts.

"testbed" stands for the embedded default everywhere; it is assembled in the cache on first use.
Anything else is a hub id, a local folder or a file. No other module asks which of them it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.config import (
    CorpusSettings,
    EngineConfig,
    EvaluateConfig,
    FileSource,
    ModelConfig,
    RewardConfig,
)
from spo.errors import ConfigError

if TYPE_CHECKING:
    from spo.corpus.base import Corpus
    from spo.scorers.base import Judge, SuccessJudge

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


def learner_model(engine: EngineConfig, model: ResolvedModel) -> str:
    """What the learner loads: the model's folder or id, or "fake" beside fake engines."""
    return "fake" if engine.backend == "fake" else model.path


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedPlaces:
    """What a configuration names outside this package."""

    paths: tuple[str, ...]
    """Files and folders."""
    hub_models: tuple[str, ...]
    """Hub ids of models."""


def named_places(settings: CorpusSettings, reward: RewardConfig) -> NamedPlaces:
    """Models, checkpoints and prompt files that every node must find."""
    data, extract, model = settings.data, settings.extract, settings.model.id
    names = (model, reward.toxicity_model, settings.evaluate.judge, data.train, data.heldout)
    files = [str(source.path) for source in extract.sources if isinstance(source, FileSource)]
    files += [] if extract.calibration is None else [str(extract.calibration)]
    paths = [name for name in names if _is_path(name)] + files
    on_hub = model != TESTBED and not _is_path(model)
    return NamedPlaces(paths=tuple(dict.fromkeys(paths)), hub_models=(model,) if on_hub else ())


def _is_path(value: str) -> bool:
    """Looks like a place on a disk rather than a hub id or a name."""
    return value != TESTBED and (
        value.startswith(("/", ".", "~"))
        or Path(value).suffix in {".jsonl", ".ckpt", ".safetensors"}
    )


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


def open_corpus(settings: CorpusSettings) -> Corpus:
    """What the run is made on: the testbed, or the user's files where any are named."""
    from spo.corpus.files import FileCorpus, names_data
    from spo.testbed.corpus import EmbeddedCorpus

    def tokenizer() -> Any:
        from transformers import AutoTokenizer

        model = resolve_model(settings.model, settings.cache)
        return AutoTokenizer.from_pretrained(model.path, revision=model.revision)

    embedded = EmbeddedCorpus(settings=settings, tokenizer=tokenizer)
    data, extract = settings.data, settings.extract
    train = None if data.train == TESTBED else Path(data.train)
    heldout = None if data.heldout == TESTBED else Path(data.heldout)
    named = train or heldout or extract.calibration or any(map(names_data, extract.sources))
    if not named:
        return embedded
    return FileCorpus(settings=settings, rest=embedded, train=train, heldout=heldout)
