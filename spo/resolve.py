"""From names in the configuration to things on disk: models, scorers, judge, prompts.

"testbed" stands for the embedded default everywhere; it is assembled in the cache on first use.
Anything else is a hub id, a local folder or a file. No other module asks which of them it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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
from spo.config.rewards import (
    AlignmentPart,
    AnyRewardPart,
    HarmPart,
    RefusalPart,
    ToxicityPart,
)
from spo.errors import ConfigError, SpoError
from spo.scorers.rewards import alignment_arguments, kind_of

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
    parts = [part for part in reward.counted if part.needs_model]
    rewarded = [str(getattr(part, "model", TESTBED)) for part in parts]
    names = (model, *rewarded, settings.evaluate.judge, data.train, data.heldout)
    files = [str(source.path) for source in extract.sources if isinstance(source, FileSource)]
    files += [] if extract.calibration is None else [str(extract.calibration)]
    paths = [name for name in names if _is_path(name)] + files
    models = [
        model,
        *(str(part.model) for part in parts if isinstance(part, RefusalPart | HarmPart)),
    ]
    on_hub = [name for name in models if name != TESTBED and not _is_path(name)]
    return NamedPlaces(paths=tuple(dict.fromkeys(paths)), hub_models=tuple(dict.fromkeys(on_hub)))


def _is_path(value: str) -> bool:
    """Looks like a place on a disk rather than a hub id or a name."""
    return value != TESTBED and (
        value.startswith(("/", ".", "~"))
        or Path(value).suffix in {".jsonl", ".ckpt", ".safetensors"}
    )


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
    from spo.testbed.answers import open_answer_reader

    toxicity, reader = open_judge(config), functools.cache(open_answer_reader)
    return [open_success_judge(settings, toxicity, reader) for settings in config.success_judges]


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
