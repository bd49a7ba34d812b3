"""Reads a run folder, whole or partial. What is missing or damaged is noted, never guessed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ValidationError, model_validator

from spo.config.text import parse
from spo.errors import ConfigError, DataError
from spo.evaluation.results import curve_points, load_report, shown_conditions
from spo.records import Attacked, EvaluationCell, EvaluationReport

Number = Annotated[float, BeforeValidator(lambda v: float("nan") if v is None else v)]
"""A float; null becomes NaN, which plots as a gap."""
_M = TypeVar("_M", bound=BaseModel)
_JOBS = {
    "config.yaml": "every job writes it",
    "separability.json": "jobs.estimate writes it",
    "history.jsonl": "jobs.train writes it",
    "evaluation.json": "jobs.evaluate writes it",
    "attack.json": "jobs.evaluate writes it when evaluate.attacks has a picture attack",
    "environment.json": "jobs.pipeline writes it",
}


class Curve(BaseModel):
    """Held-out separability by layer."""

    auc: list[Number]
    low: list[Number] = []
    high: list[Number] = []


class Bins(BaseModel):
    """Projections of one source's held-out rows at one layer."""

    layer: int
    edges: list[Number]
    harm: list[int]
    safe: list[int]

    @model_validator(mode="after")
    def _lengths_agree(self) -> Bins:
        if not len(self.edges) - 1 == len(self.harm) == len(self.safe):
            raise ValueError("a histogram needs one more edge than counts on each side")
        return self


class Range(BaseModel):
    """A figure with its interval."""

    mean: Number
    low: Number
    high: Number

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


class LeftOutRow(BaseModel):
    """How the other sources' directions separate a source that they never saw."""

    source: str
    layer: int
    combined: Range
    singles: dict[str, Range]
    picked: str


class _LeftOut(BaseModel):
    rows: list[LeftOutRow]


class Separability(BaseModel):
    """How well each layer tells harm from safe, by source."""

    layers: list[int]
    sources: dict[str, Curve]
    combined: Curve
    chosen: list[int]
    weights: list[Number] = []
    cosines: dict[str, list[Number]] = {}
    own: dict[str, Curve] = {}
    halves: dict[str, list[Number]] = {}
    source_weights: dict[str, list[Number]] = {}
    histograms: dict[str, Bins] = {}

    @model_validator(mode="after")
    def _lengths_agree(self) -> Separability:
        curves = [*self.sources.values(), *self.own.values(), self.combined]
        lists = [c.auc for c in curves] + list(self.cosines.values())
        lists += [*self.halves.values(), *self.source_weights.values()]
        lists += [bound for c in curves for bound in (c.low, c.high) if bound]
        if any(len(values) != len(self.layers) for values in lists):
            raise ValueError(f"every curve must have {len(self.layers)} values, one for each layer")
        return self


class Step(BaseModel):
    """Figures of one training step."""

    step: int
    reward: Number = float("nan")
    reward_parts: dict[str, Number] = {}
    kl: Number = float("nan")
    doses: list[Number] = []
    cos_to_init: list[Number] = []
    seconds: dict[str, Number] = {}
    dropped: dict[str, int] = {}


class Checkpoint(BaseModel):
    """Loss of an attack after some steps."""

    step: int
    loss: Number


class AttackCurve(BaseModel):
    """How far one attack on one defence got."""

    attack: str
    defence: str
    clean_loss: Number
    attacked_loss: Number
    checkpoints: list[Checkpoint] = []
    restart_losses: list[Number] = []
    budget: dict[str, Any] = {}


class Attack(BaseModel):
    """The picture attacks: the widest in full, and the curves of all."""

    curves: list[AttackCurve] = []

    losses: list[Number]
    epsilon_255: float | None = None
    clean: str | None = None
    attacked: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantineEntry:
    """A row that a stage left out."""

    place: str
    row_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """Everything that a run folder says."""

    folder: Path
    name: str
    config_text: str | None
    separability: Separability | None
    left_out: tuple[LeftOutRow, ...]
    history: tuple[Step, ...]
    """One entry for each step, in order; a step that was run again counts as its last run."""
    evaluation: EvaluationReport | None
    """Without the points of strength curves."""
    curve_cells: tuple[tuple[Attacked, EvaluationCell], ...]
    """The points of strength curves."""
    attack: Attack | None
    environment: Mapping[str, Any]
    quarantined: tuple[QuarantineEntry, ...]
    missing: Mapping[str, str]
    """File name to what is wrong with it."""


def read_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected the output folder of a run")
    missing: dict[str, str] = {}
    config_text = _text(folder / "config.yaml", missing)
    evaluation = _evaluation(folder / "evaluation.json", missing)
    return RunRecord(
        folder=folder,
        name=_name(config_text, folder),
        config_text=config_text,
        separability=_model(Separability, folder / "separability.json", missing),
        left_out=_left_out(folder / "leave_one_out.json", missing),
        history=_history(folder / "history.jsonl", missing),
        evaluation=shown_conditions(evaluation) if evaluation else None,
        curve_cells=_curve_cells(evaluation) if evaluation else (),
        attack=_model(Attack, folder / "attack.json", missing),
        environment=_mapping(folder / "environment.json", missing) or {},
        quarantined=_quarantine(folder / "quarantine.json", evaluation, missing),
        missing=missing,
    )


def _curve_cells(report: EvaluationReport) -> tuple[tuple[Attacked, EvaluationCell], ...]:
    points = curve_points(report)
    return tuple(
        (points[cell.condition], cell) for cell in report.cells if cell.condition in points
    )


def _text(path: Path, missing: dict[str, str]) -> str | None:
    if not path.is_file():
        missing[path.name] = f"is not there ({_JOBS.get(path.name, 'a job writes it')})"
        return None
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        missing[path.name] = f"cannot be read: {error}"
        return None


def _mapping(path: Path, missing: dict[str, str]) -> dict[str, Any] | None:
    text = _text(path, missing)
    if text is None:
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        missing[path.name] = f"is damaged: {error}"
        return None
    if not isinstance(content, dict):
        missing[path.name] = f"is damaged: expected an object, got {type(content).__name__}"
        return None
    return content


def _model(kind: type[_M], path: Path, missing: dict[str, str]) -> _M | None:
    content = _mapping(path, missing)
    if content is None:
        return None
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        missing[path.name] = f"is damaged: {_first_fault(error)}"
        return None


def _left_out(path: Path, missing: dict[str, str]) -> tuple[LeftOutRow, ...]:
    """Rows of `leave_one_out.json`; absent unless jobs.estimate was asked for it."""
    found = _model(_LeftOut, path, missing) if path.is_file() else None
    return tuple(found.rows) if found else ()


def _first_fault(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}"


def _history(path: Path, missing: dict[str, str]) -> tuple[Step, ...]:
    text = _text(path, missing)
    steps: dict[int, Step] = {}
    unread = 0
    for line in (text or "").splitlines():
        if not line.strip():
            continue
        try:
            row = Step.model_validate(json.loads(line))
            steps[row.step] = row
        except (ValueError, RecursionError):
            unread += 1
    if text is not None and unread:
        missing[path.name] = f"has {unread} line(s) that cannot be read and are left out"
    elif text is not None and not steps:
        missing[path.name] = "has no steps yet"
    return tuple(steps[number] for number in sorted(steps))


def _evaluation(path: Path, missing: dict[str, str]) -> EvaluationReport | None:
    if _text(path, missing) is None:
        return None
    try:
        return load_report(path)
    except DataError as error:
        missing[path.name] = f"is damaged: {error}"
        return None


def _quarantine(
    path: Path, evaluation: EvaluationReport | None, missing: dict[str, str]
) -> tuple[QuarantineEntry, ...]:
    """Rows of `quarantine.json` (by place; absent when nothing was left out) and the evaluation."""
    entries: list[QuarantineEntry] = []
    for place, rows in ((_mapping(path, missing) or {}) if path.is_file() else {}).items():
        for row in rows if isinstance(rows, list) else []:
            if isinstance(row, dict):
                row_id, reason = str(row.get("row_id", "")), str(row.get("reason", ""))
                entries.append(QuarantineEntry(place=place, row_id=row_id, reason=reason))
    for kept in evaluation.quarantined if evaluation else ():
        entries.append(QuarantineEntry(place="evaluation", row_id=kept.row_id, reason=kept.reason))
    return tuple(entries)


def _name(config_text: str | None, folder: Path) -> str:
    try:
        content = parse(config_text or "", "config.yaml")
    except ConfigError:
        return folder.name
    name = content.get("name") if isinstance(content, dict) else None
    return name if isinstance(name, str) and name else folder.name
