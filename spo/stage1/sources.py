"""The contrast sources of Stage I: each kind turns its configuration into rows to read.

A new kind is a configuration class in `spo.config.stage1` and a builder here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from spo.config import (
    AdversarialSource,
    AttributionSource,
    ContinuationSource,
    ExtractConfig,
    FileSource,
    InstructionSource,
    SourceConfig,
    TypographicSource,
)
from spo.corpus.base import Corpus
from spo.corpus.files import named_sides, names_data
from spo.datasets import load_prompts
from spo.engines.identity import folder_revision
from spo.errors import ConfigError, DataError
from spo.records import Positions, Prompt, PromptKind, QuarantinedRow, Side
from spo.stage1.activations import CALIBRATION, ContrastRow

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceContext:
    """What builders may use."""

    corpus: Corpus
    """Asked for all that a source names no data for."""
    extract: ExtractConfig
    model: str
    revision: str | None
    cache: Path
    seed: int
    """The run's."""
    progress: Progress


Built = tuple[list[ContrastRow], list[QuarantinedRow]]


def check_sources(corpus: Corpus, extract: ExtractConfig) -> None:
    """Find out before anything starts whether there is something to contrast and to calibrate on.

    Raises:
        ConfigError: there is no source, or two have one name.
        DataError: a file cannot be used, or holds no benign prompt to calibrate on.
    """
    _check_names(extract)
    corpus.calibration_prompts()


def _check_names(extract: ExtractConfig) -> None:
    names = [source.label for source in extract.sources]
    if not names:
        raise ConfigError(
            "extract.sources is empty, so there is no contrast to make a vector of; name at least "
            "one, e.g. extract.sources=[{kind: file, path: contrast.jsonl}]"
        )
    if len(set(names)) < len(names) or CALIBRATION in names:
        raise ConfigError(
            f"extract.sources need different names other than {CALIBRATION!r}, got {names}; "
            "set 'name' (a file's source is named after the file)"
        )


def contrast_rows(context: SourceContext) -> Built:
    """Every row that Stage I reads: all sources, and the calibration generations.

    Raises:
        StageError: pictures could not be made in time.

    Other errors as in `check_sources`.
    """
    _check_names(context.extract)
    calibration, bad = context.corpus.calibration_prompts()
    rows: list[ContrastRow] = []
    for number, source in enumerate(context.extract.sources):
        found, unusable = _BUILDERS[type(source)](source, context, context.seed + number)
        rows += found
        bad += unusable
    rows += [
        ContrastRow(
            source=CALIBRATION, side=Side.SAFE, prompt=prompt, positions=Positions.GENERATED
        )
        for prompt in calibration
    ]
    return rows, bad


def source_weights(extract: ExtractConfig) -> dict[str, float]:
    """Weight of each source, by the name that its rows carry."""
    return {source.label: source.weight for source in extract.sources}


def _two_sided(
    source: InstructionSource | ContinuationSource | TypographicSource,
    context: SourceContext,
    seed: int,
) -> Built:
    usual = Positions.TEXT if isinstance(source, ContinuationSource) else Positions.LAST_PROMPT
    if names_data(source):
        sides, _ = named_sides(source, context.cache, seed)
    else:
        sides = context.corpus.contrast(source, seed)
    numbers = {side: count() for side in Side}
    return [
        _row(source, side, next(numbers[side]), prompt, source.positions or usual)
        for side, prompt in sides
    ], []


def _attacked(
    source: AdversarialSource | AttributionSource, context: SourceContext, own_seed: int
) -> Built:
    from spo.actors.picture_tasks import PictureJob, picture_pairs

    # The same start pictures and seed for every attacked source, so that they share pictures.
    seed = context.seed
    prompts = _attack_prompts(source, context)
    starts = _attack_starts(source, context, own_seed)
    if source.targets is None:
        targets: Sequence[str] = context.corpus.attack_targets(64, seed)
    else:
        lines = source.targets.read_text(encoding="utf-8").splitlines()
        targets = [line.strip() for line in lines if line.strip()]
    material = [
        context.model,
        context.revision or folder_revision(context.model),
        context.extract.dtype,
        source.epsilon_255,
        source.steps,
        source.step_size_255,
        source.targets_per_step,
        seed,
        [str(start) for start in starts],
        [prompt.text for prompt in prompts],
        list(targets),
    ]
    digest = hashlib.sha256(json.dumps(material).encode()).hexdigest()[:16]
    pairs, _ = picture_pairs(
        PictureJob(
            model=context.model,
            revision=context.revision,
            source=source,
            extract=context.extract,
            starts=list(enumerate(starts)),
            folder=context.cache / "adversarial" / digest,
            prompts=prompts,
            targets=targets,
            seed=seed,
        ),
        context.progress,
    )
    positions = source.positions or Positions.LAST_PROMPT
    return [
        _row(source, side, number, replace(prompt, image=picture), positions)
        for number, prompt in enumerate(prompts)
        for side, picture in (
            (Side.HARM, pairs[number % len(pairs)].harm),
            (Side.SAFE, pairs[number % len(pairs)].safe),
        )
    ], []


def _attack_starts(
    source: AdversarialSource | AttributionSource, context: SourceContext, own_seed: int
) -> list[Path]:
    if source.images is None:
        return context.corpus.attack_starts(source.pictures, context.seed)
    found = load_prompts(source.images, cache=context.cache, seed=own_seed)
    starts = [Path(p.image) for p in found if p.image][: source.pictures]
    if len(starts) < source.pictures:
        raise DataError(
            f"source {source.label!r} asks for {source.pictures} pictures, its data set has "
            f"{len(starts)}"
        )
    return starts


def _attack_prompts(
    source: AdversarialSource | AttributionSource, context: SourceContext
) -> list[Prompt]:
    if source.prompts is None:
        return context.corpus.attack_prompts(source.rows, context.seed)
    wanted = source.prompts.model_copy(update={"rows": source.rows})
    found = load_prompts(wanted, cache=context.cache, seed=context.seed)
    return [prompt for prompt in found if prompt.kind is PromptKind.HARM][: source.rows]


def _file(source: FileSource, context: SourceContext, seed: int) -> Built:
    sides, unusable = named_sides(source, context.cache, seed)
    positions = source.positions or Positions.TEXT
    return [
        ContrastRow(source=source.label, side=side, prompt=prompt, positions=positions)
        for side, prompt in sides
    ], unusable


def _row(
    source: SourceConfig, side: Side, number: int, prompt: Prompt, positions: Positions
) -> ContrastRow:
    """One row; its id says source, side and number, so that ids never clash across sources."""
    kind = PromptKind.HARM if side is Side.HARM else PromptKind.BENIGN
    row_id = f"{source.label}-{side.value}-{number:05d}"
    return ContrastRow(
        source=source.label,
        side=side,
        prompt=replace(prompt, prompt_id=row_id, kind=kind),
        positions=positions,
    )


_BUILDERS: Mapping[type, Callable[[Any, SourceContext, int], Built]] = {
    InstructionSource: _two_sided,
    ContinuationSource: _two_sided,
    TypographicSource: _two_sided,
    AdversarialSource: _attacked,
    AttributionSource: _attacked,
    FileSource: _file,
}
"""Kind to what makes its rows; the number is the source's own seed."""
