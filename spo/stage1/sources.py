"""The contrast sources of Stage I: each kind turns its configuration into rows to read.

A new kind is a configuration class in `spo.config.stage1` and a builder here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spo.config import (
    AdversarialSource,
    AttributionSource,
    ContinuationSource,
    DatasetConfig,
    FileSource,
    InstructionSource,
    RunConfig,
    SourceConfig,
    TypographicSource,
)
from spo.datasets import load_prompts
from spo.datasets.prompts import read_contrast
from spo.engines.identity import folder_revision
from spo.errors import ConfigError, DataError
from spo.files import replaced
from spo.records import Positions, Prompt, PromptFormat, PromptKind, QuarantinedRow, Side
from spo.stage1.activations import CALIBRATION, ContrastRow

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceContext:
    """What builders may use."""

    model: str
    revision: str | None
    config: RunConfig
    seed: int
    """The source's own seed."""
    progress: Progress


Built = tuple[list[ContrastRow], list[QuarantinedRow]]


def contrast_rows(
    config: RunConfig, *, model: str, revision: str | None, progress: Progress
) -> Built:
    """Every row that Stage I reads: all sources, and the calibration generations.

    Raises:
        ConfigError: two sources have one name.
        DataError: a data set of a source cannot be used.
        StageError: pictures could not be made in time.
    """
    from spo.testbed import data

    names = [source.label for source in config.extract.sources]
    if len(set(names)) < len(names) or CALIBRATION in names:
        raise ConfigError(
            f"extract.sources need different names other than {CALIBRATION!r}, got {names}; "
            "set 'name' (a file's source is named after the file)"
        )
    rows: list[ContrastRow] = []
    bad: list[QuarantinedRow] = []
    for number, source in enumerate(config.extract.sources):
        context = SourceContext(
            model=model,
            revision=revision,
            config=config,
            seed=config.seed + number,
            progress=progress,
        )
        found, unusable = _BUILDERS[type(source)](source, context)
        rows += found
        bad += unusable
    for prompt in data.calibration_prompts(
        config.cache, count=config.extract.calibration_rows, seed=config.seed
    ):
        rows.append(
            ContrastRow(
                source=CALIBRATION, side=Side.SAFE, prompt=prompt, positions=Positions.GENERATED
            )
        )
    return rows, bad


def source_weights(config: RunConfig) -> dict[str, float]:
    """Weight of each source, by the name that its rows carry."""
    return {source.label: source.weight for source in config.extract.sources}


def _text(source: InstructionSource | ContinuationSource, context: SourceContext) -> Built:
    chat = isinstance(source, InstructionSource)
    positions = source.positions or (Positions.LAST_PROMPT if chat else Positions.TEXT)
    if source.harm is None or source.safe is None:
        return _embedded(source, context, positions), []
    form = PromptFormat.CHAT if chat else PromptFormat.PLAIN
    sides = _sides(source.harm, source.safe, source.rows, context)
    return [
        _row(source, side, number, replace(prompt, format=form), positions)
        for side, prompts in sides.items()
        for number, prompt in enumerate(prompts)
    ], []


def _typographic(source: TypographicSource, context: SourceContext) -> Built:
    positions = source.positions or Positions.LAST_PROMPT
    if source.harm is None or source.safe is None:
        return _embedded(source, context, positions), []
    sides = _sides(source.harm, source.safe, source.rows, context)
    return [
        _row(source, side, number, _drawn(prompt, source, context), positions)
        for side, prompts in sides.items()
        for number, prompt in enumerate(prompts)
    ], []


def _drawn(prompt: Prompt, source: TypographicSource, context: SourceContext) -> Prompt:
    """The prompt with its own picture, or with its words drawn into one."""
    from spo.attacks.drawing import draw_text

    if prompt.image is not None:
        return prompt
    words = prompt.text
    name = hashlib.sha256(f"{source.picture_size}/{words}".encode()).hexdigest()[:24]
    path = context.config.cache / "typographic" / f"{name}.png"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as part:
            draw_text(words, source.picture_size).save(part, format="PNG")
    return replace(prompt, text=source.request, image=str(path))


def _attacked(source: AdversarialSource | AttributionSource, context: SourceContext) -> Built:
    from spo.actors.picture_tasks import PictureJob, picture_pairs
    from spo.testbed import data, text

    prompts = _attack_prompts(source, context)
    if source.images is None:
        # The same start pictures and seed for every attacked source, so that they share pictures.
        seed = context.config.seed
        drawn = data.draw_scenes(context.config.cache, "train", source.pictures, seed + 7)
        starts = [path for _, path in drawn]
    else:
        found = load_prompts(source.images, cache=context.config.cache, seed=context.seed)
        starts = [Path(p.image) for p in found if p.image][: source.pictures]
        if len(starts) < source.pictures:
            raise DataError(
                f"source {source.label!r} asks for {source.pictures} pictures, its data set has "
                f"{len(starts)}"
            )
    if source.targets is None:
        targets: Sequence[str] = text.toxic_texts("train", 64, context.config.seed + 17)
    else:
        lines = source.targets.read_text(encoding="utf-8").splitlines()
        targets = [line.strip() for line in lines if line.strip()]
    material = [
        context.model,
        context.revision or folder_revision(context.model),
        context.config.extract.dtype,
        source.epsilon_255,
        source.steps,
        source.step_size_255,
        source.targets_per_step,
        context.config.seed,
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
            extract=context.config.extract,
            starts=list(enumerate(starts)),
            folder=context.config.cache / "adversarial" / digest,
            prompts=prompts,
            targets=targets,
            seed=context.config.seed,
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


def _attack_prompts(
    source: AdversarialSource | AttributionSource, context: SourceContext
) -> list[Prompt]:
    from spo.testbed import text

    if source.prompts is not None:
        wanted = source.prompts.model_copy(update={"rows": source.rows})
        found = load_prompts(wanted, cache=context.config.cache, seed=context.config.seed)
        return [prompt for prompt in found if prompt.kind is PromptKind.HARM][: source.rows]
    return [
        Prompt(
            prompt_id=f"attacked-{number}",
            text=opening,
            kind=PromptKind.HARM,
            format=PromptFormat.PLAIN,
        )
        for number, opening in enumerate(
            text.rude_openings("train", source.rows, context.config.seed + 29)
        )
    ]


def _file(source: FileSource, context: SourceContext) -> Built:
    found, unusable = read_contrast(source.path)
    positions = source.positions or Positions.TEXT
    rows = []
    for side in Side:
        prompts = [prompt for where, prompt in found if where is side][: source.rows]
        rows += [
            ContrastRow(source=source.label, side=side, prompt=prompt, positions=positions)
            for prompt in prompts
        ]
    return rows, unusable


def _embedded(
    source: InstructionSource | ContinuationSource | TypographicSource,
    context: SourceContext,
    positions: Positions,
) -> list[ContrastRow]:
    from spo.testbed import data

    found = data.contrast(source.kind, source.rows, context.config.cache, context.seed)
    numbers = {Side.HARM: 0, Side.SAFE: 0}
    rows = []
    for side, prompt, _ in found:
        rows.append(_row(source, side, numbers[side], prompt, positions))
        numbers[side] += 1
    return rows


def _sides(
    harm: DatasetConfig, safe: DatasetConfig, rows: int, context: SourceContext
) -> dict[Side, list[Prompt]]:
    """At most `rows` prompts of each side."""
    sides: dict[Side, list[Prompt]] = {}
    for side, config in ((Side.HARM, harm), (Side.SAFE, safe)):
        wanted = config.model_copy(update={"rows": min(rows, config.rows or rows)})
        found = load_prompts(wanted, cache=context.config.cache, seed=context.seed)
        sides[side] = found[:rows]
    return sides


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


_BUILDERS: Mapping[type, Callable[[Any, SourceContext], Built]] = {
    InstructionSource: _text,
    ContinuationSource: _text,
    TypographicSource: _typographic,
    AdversarialSource: _attacked,
    AttributionSource: _attacked,
    FileSource: _file,
}
