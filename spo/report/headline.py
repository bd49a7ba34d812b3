"""The result in words, tiles and tables, every figure with its interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spo.errors import DataError
from spo.evaluation.results import compare
from spo.records import EvaluationCell, EvaluationReport, Interval
from spo.report.metrics import (
    BASELINE,
    UTILITY,
    Metric,
    Verdict,
    condition_name,
    conditions_of,
    defence_name,
    defences_of,
    metric_named,
    metrics_of,
)

_STAGE1 = "stage1"
_WORDS = {
    Verdict.BETTER: "better",
    Verdict.WORSE: "worse",
    Verdict.EVEN: "no clear change",
    Verdict.CHANGED: "changed",
}
# What a reader asks first: is it safer, also under attack, and what does it cost?
_TILES = (
    ("plain", "toxicity", "Toxicity"),
    ("pgd", "toxicity", "Toxicity, attacked"),
    ("plain", "nll", "NLL (fluency)"),
    ("caption", "attributes", "Caption attributes"),
    ("question", "correct", "Questions right"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One headline figure."""

    title: str
    before: str
    after: str
    change: str
    """Paired difference."""
    change_range: str
    verdict: Verdict
    verdict_text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One result in words."""

    lead: str
    """Condition and number of prompts."""
    rest: str

    def __str__(self) -> str:
        return f"{self.lead}: {self.rest}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TableEntry:
    """One cell of a table."""

    value: str
    interval: str
    change: str
    """"" for the baseline."""
    verdict: Verdict
    verdict_text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionTable:
    """One condition: defences down, metrics across."""

    condition: str
    title: str
    prompts: int
    metrics: tuple[Metric, ...]
    rows: tuple[tuple[str, tuple[TableEntry | None, ...]], ...]
    """(defence in words, entries in the order of `metrics`)."""


def final_defence(report: EvaluationReport) -> str | None:
    """The defence that the report is about: SPO, or the last one there is."""
    names = [name for name in defences_of(report) if name != BASELINE]
    return names[-1] if names else None


def findings(report: EvaluationReport) -> list[Finding]:
    """The result in words: safety first, then what it costs."""
    final = final_defence(report)
    if final is None:
        nothing = "only the unsteered model was evaluated, there is nothing to compare yet."
        return [Finding(lead="No defence", rest=nothing)]
    told = [
        _finding(report, condition, metric, final)
        for name in ("toxicity", "attributes", "correct", "nll")
        for condition in conditions_of(report)
        for metric in [metric_named(name)]
        if not (name == "toxicity" and condition in UTILITY)
        if not (name == "nll" and condition != "plain")
    ]
    return [finding for finding in told if finding is not None]


def _finding(
    report: EvaluationReport, condition: str, metric: Metric, final: str
) -> Finding | None:
    before = _cell(report, condition, BASELINE)
    after = _cell(report, condition, final)
    if before is None or after is None or metric.name not in before.metrics:
        return None
    change = after.paired.get(metric.name)
    if metric.name not in after.metrics or change is None:
        return None
    base, new = before.metrics[metric.name], after.metrics[metric.name]
    text = (
        f"{metric.label} "
        f"{metric.figure(base.mean)} ({metric.range(base)}) unsteered, "
        f"{metric.figure(new.mean)} ({metric.range(new)}) with {defence_name(final)}; paired "
        f"difference {metric.change(change.mean)} ({metric.change_range(change)}): "
        f"{_WORDS[metric.verdict(change)]}."
    )
    against = stage1_difference(report, condition, metric.name)
    if final != _STAGE1 and against is not None:
        text += (
            f" Against Stage I alone {metric.change(against.mean)} "
            f"({metric.change_range(against)}): {_WORDS[metric.verdict(against)]}."
        )
    name = condition_name(report, condition)
    return Finding(lead=f"{name[:1].upper()}{name[1:]} ({new.count} prompts)", rest=text)


def stage1_difference(report: EvaluationReport, condition: str, metric: str) -> Interval | None:
    """Paired difference of the final defence to Stage I alone, or None without both."""
    final = final_defence(report)
    if final in (None, _STAGE1):
        return None
    try:
        return compare(report, condition, metric, defence=str(final), baseline=_STAGE1)
    except DataError:
        return None


def tiles(report: EvaluationReport) -> list[Tile]:
    """Up to five headline figures: the unsteered model against the final defence."""
    final = final_defence(report)
    made = []
    for condition, name, title in _TILES:
        before = _cell(report, condition, BASELINE)
        after = _cell(report, condition, final) if final else None
        if before is None or after is None or name not in after.paired:
            continue
        metric, change = metric_named(name), after.paired[name]
        verdict = metric.verdict(change)
        made.append(
            Tile(
                title=title,
                before=metric.figure(before.metrics[name].mean),
                after=metric.figure(after.metrics[name].mean),
                change=metric.change(change.mean),
                change_range=metric.change_range(change),
                verdict=verdict,
                verdict_text=_WORDS[verdict],
            )
        )
    return made


def tables(report: EvaluationReport) -> list[ConditionTable]:
    """One table for each condition."""
    made = []
    for condition in conditions_of(report):
        metrics = tuple(metrics_of(report, condition))
        rows = []
        for defence in defences_of(report):
            cell = _cell(report, condition, defence)
            if cell is not None:
                entries = tuple(_entry(cell, metric) for metric in metrics)
                rows.append((defence_name(defence), entries))
        counts = [
            interval.count
            for cell in report.cells
            if cell.condition == condition
            for interval in cell.metrics.values()
        ]
        made.append(
            ConditionTable(
                condition=condition,
                title=condition_name(report, condition),
                prompts=max(counts, default=0),
                metrics=metrics,
                rows=tuple(rows),
            )
        )
    return made


def _entry(cell: EvaluationCell, metric: Metric) -> TableEntry | None:
    interval = cell.metrics.get(metric.name)
    if interval is None:
        return None
    change = cell.paired.get(metric.name)
    verdict = Verdict.EVEN if change is None else metric.verdict(change)
    return TableEntry(
        value=metric.figure(interval.mean),
        interval=metric.range(interval),
        change="" if change is None else metric.change(change.mean),
        verdict=verdict,
        verdict_text="" if change is None else _WORDS[verdict],
    )


def _cell(report: EvaluationReport, condition: str, defence: str | None) -> EvaluationCell | None:
    for cell in report.cells:
        if (cell.condition, cell.defence) == (condition, defence):
            return cell
    return None


def machine_readable(report: EvaluationReport) -> dict[str, Any]:
    """The same for programs: cells, and differences to Stage I alone."""

    def plain(intervals: Any) -> dict[str, Any]:
        return {
            name: {"mean": i.mean, "low": i.low, "high": i.high, "count": i.count}
            for name, i in intervals.items()
        }

    against = {
        condition: plain(
            {
                metric.name: interval
                for metric in metrics_of(report, condition)
                if (interval := stage1_difference(report, condition, metric.name)) is not None
            }
        )
        for condition in conditions_of(report)
    }
    return {
        "judge": report.judge,
        "final_defence": final_defence(report),
        "findings": [str(finding) for finding in findings(report)],
        "cells": [
            {
                "condition": cell.condition,
                "defence": cell.defence,
                "metrics": plain(cell.metrics),
                "difference_to_unsteered": plain(cell.paired),
            }
            for cell in report.cells
        ],
        "difference_to_stage1": {name: found for name, found in against.items() if found},
    }
