"""The report as a file, as a table, and as paired comparisons between any two defences."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from spo.algorithms.metrics import paired_interval, runs_interval, unit_means
from spo.errors import DataError
from spo.evaluation.old_names import attacks_of_names, with_picture_ids
from spo.files import write_atomic
from spo.records import (
    Attacked,
    EvaluatedAnswer,
    EvaluationCell,
    EvaluationReport,
    Interval,
    QuarantinedRow,
)

BASELINE = "none"
"""Name of the unsteered model among the defences; paired differences are taken to it."""
_FORMAT = "spo-evaluation/1"


def compare(
    report: EvaluationReport,
    condition: str,
    metric: str,
    *,
    defence: str,
    baseline: str,
    samples: int = 2000,
) -> Interval:
    """Paired difference `defence` - `baseline` of one metric over the prompts that both answered.

    `samples` is the number of bootstrap samples.

    Raises:
        DataError: one of the two has no such measure in the report.
    """
    sides = [
        values_of(a for a in report.answers if (a.condition, a.defence) == (condition, name)).get(
            metric, {}
        )
        for name in (defence, baseline)
    ]
    return paired_interval(sides[0], sides[1], samples=samples, seed=0)


Comparison = tuple[str, str, str, Interval]
"""Condition, defence, metric, paired difference."""


_Groups = dict[tuple[str, str], list[EvaluatedAnswer]]
"""Answers by condition and defence."""
_Values = dict[tuple[str, str, str], dict[str, list[float]]]
"""Values of each prompt by condition, defence and metric."""


def compare_reports(
    first: EvaluationReport, second: EvaluationReport, *, samples: int = 2000
) -> list[Comparison]:
    """Paired differences `second` - `first` wherever both measured the same prompts.

    Raises:
        DataError: the two share no condition, defence and prompt at all.
    """
    found = _changes([(_values(_groups(second)), _values(_groups(first)))], samples=samples)
    if not found:
        raise DataError(
            "the two evaluations share no prompt under the same condition and defence; compare "
            "runs on the same prompts"
        )
    return found


def compare_defences(
    reports: Sequence[EvaluationReport], defence: str, baseline: str, *, samples: int = 2000
) -> list[Comparison]:
    """Paired differences `defence` - `baseline` within evaluations, on the conditions that all of
    them have; see `_measured` for those that are joined. The unsteered model has no attack adapted
    to it, so it is not compared there.

    Of several runs (training seeds, say) the mean over the runs with its interval over runs.

    Raises:
        DataError: one of the two was not evaluated in a run, or nothing is shared.
    """
    sides = [[_conditions_of(report, name) for name in (defence, baseline)] for report in reports]
    shared = set.intersection(*({*groups} for pair in sides for groups in pair))
    attacks = _attacks(reports)
    if BASELINE in (defence, baseline):
        shared = {name for name in shared if name not in attacks or not attacks[name].adaptive}
    if not shared:
        raise DataError(f"{defence!r} and {baseline!r} have no condition in common in every run")
    names = sorted(shared)  # the bootstrap draws by place: a set's order changes with the process
    pairs = [
        (
            _measured(new, names, attacks, label=defence),
            _measured(old, names, attacks, label=defence),
        )
        for new, old in sides
    ]
    return _changes(pairs, samples=samples)


def _groups(report: EvaluationReport) -> _Groups:
    groups: _Groups = {}
    for answer in shown_conditions(report).answers:
        groups.setdefault((answer.condition, answer.defence), []).append(answer)
    return groups


def _attacks(reports: Iterable[EvaluationReport]) -> dict[str, Attacked]:
    return {name: attack for report in reports for name, attack in report.attacks.items()}


def _values(groups: _Groups) -> _Values:
    return {
        (*key, metric): units
        for key, answers in groups.items()
        for metric, units in values_of(answers).items()
    }


def _changes(pairs: Sequence[tuple[_Values, _Values]], *, samples: int) -> list[Comparison]:
    """New - old of what every pair (new, old) measured; over several pairs, over the runs."""
    keys = set.intersection(
        *(
            {key for key in new.keys() & old.keys() if new[key].keys() & old[key].keys()}
            for new, old in pairs
        )
    )

    def change(key: tuple[str, str, str]) -> Interval:
        both = [(new[key], old[key]) for new, old in pairs]
        return (
            paired_interval(*both[0], samples=samples, seed=0)
            if len(both) == 1
            else runs_interval(both)
        )

    return [(*key, change(key)) for key in sorted(keys)]


def _conditions_of(report: EvaluationReport, defence: str) -> dict[str, list[EvaluatedAnswer]]:
    groups = {
        condition: answers
        for (condition, name), answers in _groups(report).items()
        if name == defence
    }
    if not groups:
        names = list(dict.fromkeys(answer.defence for answer in report.answers))
        raise DataError(f"no answers of {defence!r}; the evaluation has {names}")
    return groups


def _measured(
    groups: dict[str, list[EvaluatedAnswer]],
    conditions: Sequence[str],
    attacks: Mapping[str, Attacked],
    *,
    label: str,
) -> _Values:
    """Values of one defence on some conditions, under the name `label`.

    Beside the given conditions: "all PGD" and "all adaptive PGD" (a prompt counts once, with the
    mean of its answers), and "gain by adapting": what an answer is more toxic under an adaptive
    attack than under the same attack made on the unsteered model.
    """

    def joined(names: Iterable[str]) -> list[EvaluatedAnswer]:
        return [answer for name in names for answer in groups[name]]

    parts = {(name, label): groups[name] for name in conditions}
    made = {name: attacks[name] for name in conditions if name in attacks}
    pgd = [name for name, attack in made.items() if attack.kind == "pgd"]
    for title, pooled in (
        ("all PGD", pgd),
        ("all adaptive PGD", [name for name in pgd if made[name].adaptive]),
    ):
        if len(pooled) > 1:
            parts[title, label] = joined(pooled)
    found = _values(parts)
    blind = {(attack.base, attack.attack): name for name, attack in made.items()}
    twins = {
        name: blind[attack.base, attack.blind]
        for name, attack in made.items()
        if (attack.base, attack.blind) in blind
    }
    adapted, before = values_of(joined(twins)), values_of(joined(twins.values()))
    for metric in ("toxicity", "success"):
        after, base = unit_means(adapted.get(metric, {})), unit_means(before.get(metric, {}))
        gains = {unit: [after[unit] - base[unit]] for unit in after if unit in base}
        if gains:
            found["gain by adapting", label, metric] = gains
    return found


def format_comparison(
    found: Sequence[Comparison], first: str, second: str, *, unit: str = "prompts"
) -> str:
    """Differences as a table, those whose interval leaves out 0 marked with *; `unit` names what
    an interval counts."""
    text = io.StringIO()
    console = Console(file=text, width=120, color_system=None)
    table = Table(title=f"{second} - {first}", title_justify="left")
    for column in ("condition", "defence", "metric", "difference [95 %]", unit):
        table.add_column(column)
    for condition, defence, metric, change in found:
        mark = "*" if change.low > 0 or change.high < 0 else ""
        figures = f"{change.mean:+.3f} \\[{change.low:+.3f}, {change.high:+.3f}]{mark}"
        table.add_row(condition, defence, metric, figures, str(change.count))
    console.print(table)
    return text.getvalue()


def curve_points(report: EvaluationReport) -> dict[str, Attacked]:
    """By condition: the points of strength curves."""
    return {name: made for name, made in report.attacks.items() if made.step is not None}


def shown_conditions(report: EvaluationReport) -> EvaluationReport:
    """The report without the points of strength curves, which have a plot of their own."""
    points = curve_points(report)
    return replace(
        report,
        cells=tuple(cell for cell in report.cells if cell.condition not in points),
        answers=tuple(answer for answer in report.answers if answer.condition not in points),
        attacks={name: made for name, made in report.attacks.items() if name not in points},
    )


def values_of(answers: Iterable[EvaluatedAnswer]) -> dict[str, dict[str, list[float]]]:
    """Metric to prompt to the values of its samples, those of all its pictures together: answers to
    one prompt are not independent, whatever the picture."""
    values: dict[str, dict[str, list[float]]] = {}
    for answer in answers:
        for name, value in answer.measures.items():
            values.setdefault(name, {}).setdefault(answer.unit, []).append(value)
    return values


def save_report(report: EvaluationReport, path: Path) -> Path:
    """Write a report as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": _FORMAT, **asdict(report)}
    write_atomic(path, json.dumps(content, indent=1, allow_nan=False).encode())
    return path


def load_report(path: Path) -> EvaluationReport:
    """Read what `save_report` wrote; DataError when it is missing, damaged or of another kind."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT}")
        answers = [EvaluatedAnswer(**answer) for answer in content.pop("answers")]
        if "attacks" in content:
            attacks = {name: Attacked(**made) for name, made in content.pop("attacks").items()}
        else:
            answers, attacks = with_picture_ids(answers), attacks_of_names(answers)
        return EvaluationReport(
            cells=tuple(_cell(cell) for cell in content.pop("cells")),
            answers=tuple(answers),
            attacks=attacks,
            quarantined=tuple(QuarantinedRow(**row) for row in content.pop("quarantined")),
            **content,
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: expected an evaluation report in JSON as written by jobs.evaluate, got "
            f"{type(error).__name__}: {error}"
        ) from error


def format_table(
    report: EvaluationReport, *, metrics: Sequence[str] | None = None, width: int = 110
) -> str:
    """The report as plain text: one table for each condition, metrics down, defences across.

    Args:
        report: what to show.
        metrics: only these; None shows every metric.
        width: columns of the terminal.
    """
    text = io.StringIO()
    console = Console(file=text, width=width, color_system=None)
    for condition in dict.fromkeys(cell.condition for cell in report.cells):
        cells = [cell for cell in report.cells if cell.condition == condition]
        table = Table(title=condition, title_justify="left")
        table.add_column("metric")
        for cell in cells:
            table.add_column(cell.defence, justify="right")
        for metric in dict.fromkeys(name for cell in cells for name in cell.metrics):
            if metrics is not None and metric not in metrics:
                continue
            table.add_row(metric, *(_table_entry(cell, metric) for cell in cells))
        console.print(table)
    console.print(
        f"mean [95 % interval over prompts]; below it the paired difference to {BASELINE!r}, with "
        f"* where its interval leaves out 0. Judge: {report.judge}. "
        f"Quarantined rows: {len(report.quarantined)}."
    )
    for row in report.quarantined[:5]:
        console.print(f"  {row.row_id}: {row.reason}", markup=False)
    return text.getvalue()


def _cell(content: dict[str, Any]) -> EvaluationCell:
    metrics, paired = (
        {name: Interval(**interval) for name, interval in content.pop(part).items()}
        for part in ("metrics", "paired")
    )
    return EvaluationCell(metrics=metrics, paired=paired, **content)


def _table_entry(cell: EvaluationCell, metric: str) -> str:
    interval = cell.metrics.get(metric)
    if interval is None:
        return "-"
    text = f"{interval.mean:.3f} \\[{interval.low:.3f}, {interval.high:.3f}]"
    change = cell.paired.get(metric)
    if change is None:
        return text
    mark = "*" if change.low > 0 or change.high < 0 else " "
    return f"{text}\n{change.mean:+.3f} \\[{change.low:+.3f}, {change.high:+.3f}]{mark}"
