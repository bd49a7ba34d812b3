"""Plots of the matrix: attack x defence, what safety costs, and how the attacks converged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spo.records import EvaluationReport, Interval
from spo.report.figures import (
    MARKERS,
    PlotKind,
    Theme,
    arms,
    figure_of,
    interval_of,
    legend,
    panels,
    toxic_conditions,
)
from spo.report.metrics import condition_name, defence_name, defences_of, metric_named
from spo.report.run_record import RunRecord
from spo.report.text import plot_label


def _harm(report: EvaluationReport, condition: str, defence: str) -> Interval | None:
    """Attack success, or mean toxicity where success was not judged."""
    return interval_of(report, condition, defence, _measured(report))


def _measured(report: EvaluationReport) -> str:
    judged = any("success" in cell.metrics for cell in report.cells)
    return "success" if judged else "toxicity"


def _matrix(record: RunRecord, theme: Theme) -> Figure | None:
    report = record.evaluation
    if report is None:
        return None
    rows, columns = toxic_conditions(report), defences_of(report)
    if not rows or len(columns) < 2:
        return None
    found = [[_harm(report, row, column) for column in columns] for row in rows]
    values = np.array([[math.nan if i is None else i.mean for i in line] for line in found])
    # Room for an interval in every column.
    panel = panels(theme, (0.9 + 0.52 * len(rows),), width=2.6 + 0.95 * len(columns))[0]
    panel.grid(visible=False)
    colours = mpl.colormaps["YlOrRd"].with_extremes(bad=theme.line)
    top = max(0.05, float(np.nanmax(values))) if np.isfinite(values).any() else 1.0
    panel.imshow(values, cmap=colours, vmin=0.0, vmax=top, aspect="auto")
    metric = metric_named(_measured(report))
    for y, line in enumerate(found):
        for x, interval in enumerate(line):
            if interval is None:
                continue
            dark = interval.mean > 0.6 * top
            text = f"{metric.figure(interval.mean)}\n{metric.range(interval)}"
            ink = "#ffffff" if dark else "#1d2329"
            panel.text(x, y, text, ha="center", va="center", fontsize=6.2, color=ink)
    names = [plot_label(defence_name(column), 16) for column in columns]
    panel.set_xticks(range(len(columns)), names, rotation=25, ha="right", color=theme.ink)
    labels = [plot_label(condition_name(report, row), 30) for row in rows]
    panel.set_yticks(range(len(rows)), labels, color=theme.ink)
    panel.set_title(metric.label, loc="left", color=theme.muted)
    return figure_of([panel])


def _cost(record: RunRecord, theme: Theme) -> Figure | None:
    report = record.evaluation
    if report is None:
        return None
    conditions, defences = toxic_conditions(report), defences_of(report)
    panel = panels(theme, (3.2,))[0]
    panel.grid(axis="x", color=theme.line, linewidth=0.7)
    drawn = 0
    for d, defence in enumerate(defences):
        harms = [h for h in (_harm(report, c, defence) for c in conditions) if h is not None]
        cost = interval_of(report, "text", defence, "reference_nll")
        if not harms or cost is None:
            continue
        worst = max(harms, key=lambda interval: interval.mean)
        drawn += 1
        panel.errorbar(
            [cost.mean],
            [worst.mean],
            xerr=arms([cost]),
            yerr=arms([worst]),
            fmt=MARKERS[d % 8],
            ms=7,
            lw=1.1,
            color=theme.of_defence(defence, defences),
            label=plot_label(defence_name(defence)),
        )
    if drawn < 2:
        return None
    panel.set_ylim(bottom=0)
    panel.set_xlabel("NLL of given harmless text (nats/token): left is less damage")
    panel.set_ylabel(f"{metric_named(_measured(report)).label}, worst condition")
    legend(panel, 3)
    return figure_of([panel])


def _attack(record: RunRecord, theme: Theme) -> Figure | None:
    if record.attack is None or not record.attack.losses:
        return None
    panel = panels(theme, (2.4,))[0]
    losses = record.attack.losses
    panel.plot(range(len(losses)), losses, lw=1.6, color=theme.colours[1])
    panel.set_xlabel("PGD step")
    panel.set_ylabel("loss of the attacker\n(nats per target token)")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure_of([panel])


def _strength(record: RunRecord, theme: Theme) -> Figure | None:
    curves = [c for c in (record.attack.curves if record.attack else []) if c.checkpoints]
    if not curves:
        return None
    points = success_points(record)
    axes = panels(theme, (2.5, 2.0) if points else (2.5,))
    defences = list(dict.fromkeys(curve.defence for curve in curves))
    attacks = list(dict.fromkeys(curve.attack for curve in curves))
    for curve in curves:
        style: dict[str, Any] = {
            "color": theme.of_defence(curve.defence, defences),
            "marker": MARKERS[attacks.index(curve.attack) % 8],
            "ls": ("-", "--", ":", "-.")[attacks.index(curve.attack) % 4],
            "ms": 4.0,
            "lw": 1.3,
        }
        steps = [look.step for look in curve.checkpoints]
        label = plot_label(f"{curve.attack} on {defence_name(curve.defence)}", 60)
        axes[0].plot(steps, [look.loss for look in curve.checkpoints], label=label, **style)
        reached = points.get((curve.attack, curve.defence), {})
        if points and reached:
            axes[-1].plot(list(reached), list(reached.values()), **style)
    axes[0].set_ylabel("attacker's loss\n(nats per target token)")
    legend(axes[0], 1)
    if points:
        axes[-1].set_ylabel("attack success")
        axes[-1].set_ylim(bottom=0)
    axes[-1].set_xlabel("PGD step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure_of(axes)


def success_points(record: RunRecord) -> dict[tuple[str, str], dict[int, float]]:
    """(attack, defence) to success by steps."""
    points: dict[tuple[str, str], dict[int, float]] = {}
    for point, cell in record.curve_cells:
        if "success" in cell.metrics and point.step is not None:
            reached = points.setdefault((point.attack, cell.defence), {})
            reached[point.step] = cell.metrics["success"].mean
    return {key: dict(sorted(found.items())) for key, found in points.items()}


MATRIX_PLOTS: Mapping[str, PlotKind] = {
    "matrix": (
        "Attack by defence",
        "Each row is a condition, each column a defence; mean and 95 % bootstrap interval over "
        "prompts. Paler is safer. An adaptive attack is made through the defence of its column.",
        _matrix,
    ),
    "cost": (
        "Safety against damage",
        "Each point is one defence: its worst condition against how unlikely it makes given "
        "harmless text. Lower left is better.",
        _cost,
    ),
    "attack": (
        "The attack's progress",
        "Loss that the attacker minimises: how unlikely the model finds the toxic target sentences "
        "given the attacked picture.",
        _attack,
    ),
    "strength": (
        "Attack strength by steps",
        "The attacker's loss on fixed pairs, and the success of the picture at that step, for each "
        "attack and the model or defence it is made through. A flat end means that more steps "
        "would not help much.",
        _strength,
    ),
}
