"""Plots of a run, each for light and for dark pages. Pure Agg: no display, no global state."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from spo.records import EvaluationReport, Interval
from spo.report.metrics import (
    BASELINE,
    UTILITY,
    condition_name,
    conditions_of,
    defence_name,
    defences_of,
)
from spo.report.run_record import Curve, RunRecord
from spo.report.text import plot_label

_WIDTH_INCHES, _DPI = 5.3, 180
MARKERS = "osD^vPX*"
# Okabe and Ito's palette, which stays apart under all common colour blindness; dark variants are
# lightened for contrast.
_LIGHT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B58900", "#56B4E9")
_DARK = ("#5CB8F2", "#F5904A", "#3CC7A0", "#E4A3C8", "#EBC34D", "#A9DDF7")


@dataclass(frozen=True, slots=True, kw_only=True)
class Theme:
    """Colours of one appearance."""

    paper: str
    ink: str
    muted: str
    line: str
    colours: tuple[str, ...]

    def of_defence(self, defence: str, defences: Sequence[str]) -> str:
        """Grey for the unsteered model, fixed colours for Stage I and SPO, others after them."""
        fixed = {BASELINE: self.muted, "stage1": self.colours[0], "spo": self.colours[1]}
        if defence in fixed:
            return fixed[defence]
        others = [name for name in defences if name not in fixed]
        return self.colours[2 + others.index(defence) % (len(self.colours) - 2)]


LIGHT = Theme(paper="#ffffff", ink="#1d2329", muted="#6b7480", line="#dfe3e8", colours=_LIGHT)
DARK = Theme(paper="#1b2026", ink="#e6e9ed", muted="#a2abb6", line="#343b44", colours=_DARK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A finished plot."""

    name: str
    title: str
    description: str
    """What is drawn and how to read it; also the alternative text."""
    light: bytes
    """PNG for light pages and for the plots folder."""
    dark: bytes


Draw = Callable[[RunRecord, Theme], Figure | None]
PlotKind = tuple[str, str, Draw]


def draw_plots(record: RunRecord, more: Mapping[str, PlotKind] | None = None) -> dict[str, Plot]:
    """Every plot that the run has figures for, by name; `more` adds kinds of plots."""
    plots: dict[str, Plot] = {}
    for name, (title, description, draw) in {**PLOTS, **(more or {})}.items():
        images = [painted(theme, partial(draw, record)) for theme in (LIGHT, DARK)]
        if images[0] is not None and images[1] is not None:
            plots[name] = Plot(
                name=name, title=title, description=description, light=images[0], dark=images[1]
            )
    return plots


def painted(theme: Theme, draw: Callable[[Theme], Figure | None]) -> bytes | None:
    """PNG of a figure that is drawn and saved in a theme's colours; None where there is none."""
    settings = {
        "text.parse_math": False,  # a "$" in a user's own name is no formula
        "font.size": 9.5,
        "axes.titlesize": 9.5,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "axes.edgecolor": theme.line,
        "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "legend.labelcolor": theme.ink,
    }
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # odd scripts show as boxes
        if (figure := draw(theme)) is None:
            return None
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer)
        return buffer.getvalue()


def panels(
    theme: Theme, heights: Sequence[float], *, share_x: bool = True, width: float = 0.0
) -> list[Axes]:
    size = (max(width, _WIDTH_INCHES), sum(heights))
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    grid = figure.subplots(
        len(heights), 1, sharex=share_x, squeeze=False, height_ratios=list(heights)
    )
    axes: list[Axes] = [row[0] for row in grid]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color=theme.line, linewidth=0.7)
        panel.set_axisbelow(True)
        panel.tick_params(length=0)
    return axes


def figure_of(axes: Sequence[Axes]) -> Figure:
    figure = axes[0].get_figure()
    assert isinstance(figure, Figure)
    return figure


def legend(panel: Axes, columns: int = 4) -> None:
    panel.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        handlelength=1.6,
        columnspacing=1.2,
        borderaxespad=0.1,
    )


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    return np.where(np.isfinite(array), array, np.nan)


def _training(record: RunRecord, theme: Theme) -> Figure | None:
    if not record.history:
        return None
    steps = [row.step for row in record.history]
    reward, parts, kl = axes = panels(theme, (1.7, 2.0, 1.4))
    reward.plot(
        steps, _finite([r.reward for r in record.history]), "o-", ms=3, color=theme.colours[1]
    )
    reward.set_ylabel("mean reward")
    names = dict.fromkeys(name for row in record.history for name in row.reward_parts)
    if "toxicity_harm" in names:
        names.pop("toxicity", None)
    for i, name in enumerate(names):
        values = _finite([row.reward_parts.get(name, math.nan) for row in record.history])
        style: dict[str, Any] = {
            "color": theme.colours[i % len(theme.colours)],
            "marker": MARKERS[i % 8],
            "ms": 3,
        }
        parts.plot(steps, values, lw=1.3, label=plot_label(name.replace("_", " ")), **style)
    parts.set_ylabel("reward parts")
    if names:
        legend(parts, 3)
    kl.plot(steps, _finite([r.kl for r in record.history]), "o-", ms=3, color=theme.muted)
    kl.set_ylabel("KL to unsteered\n(nats per token)")
    kl.set_ylim(bottom=0)
    kl.set_xlabel("training step")
    kl.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure_of(axes)


def _toxicity(record: RunRecord, theme: Theme) -> Figure | None:
    report = record.evaluation
    conditions = [] if report is None else toxic_conditions(report)
    if report is None or not conditions:
        return None
    panel = panels(theme, (2.9,))[0]
    defences = defences_of(report)
    spread = min(0.16, 0.7 / len(defences))
    for d, defence in enumerate(defences):
        found = [
            (i + (d - (len(defences) - 1) / 2) * spread, interval)
            for i, condition in enumerate(conditions)
            if (interval := interval_of(report, condition, defence, "toxicity")) is not None
        ]
        if found:
            panel.errorbar(
                [x for x, _ in found],
                [i.mean for _, i in found],
                yerr=arms([i for _, i in found]),
                fmt=MARKERS[d % 8],
                ms=6,
                lw=1.6,
                capsize=3,
                color=theme.of_defence(defence, defences),
                label=plot_label(defence_name(defence)),
            )
    panel.set_xticks(
        range(len(conditions)),
        [plot_label(condition_name(report, c), 28) for c in conditions],
        color=theme.ink,
        rotation=25 if len(conditions) > 3 else 0,
        ha="right" if len(conditions) > 3 else "center",
    )
    panel.set_xlim(-0.5, len(conditions) - 0.5)
    panel.set_ylim(bottom=0)
    panel.set_ylabel("mean toxicity, 0 to 1 (judge)")
    legend(panel)
    return figure_of([panel])


def _front(record: RunRecord, theme: Theme) -> Figure | None:
    report = record.evaluation
    if report is None:
        return None
    panel = panels(theme, (3.6,))[0]
    panel.grid(axis="x", color=theme.line, linewidth=0.7)
    conditions, defences = toxic_conditions(report), defences_of(report)
    drawn = False
    for c, condition in enumerate(conditions):
        for defence in defences:
            nll = interval_of(report, condition, defence, "nll")
            toxicity = interval_of(report, condition, defence, "toxicity")
            if nll is None or toxicity is None:
                continue
            drawn = True
            panel.errorbar(
                [nll.mean],
                [toxicity.mean],
                xerr=arms([nll]),
                yerr=arms([toxicity]),
                fmt=MARKERS[c % 8],
                ms=7,
                lw=1.1,
                color=theme.of_defence(defence, defences),
            )
    if not drawn:
        return None
    for defence in defences:
        colour = theme.of_defence(defence, defences)
        panel.plot([], [], "s", ms=7, color=colour, label=plot_label(defence_name(defence)))
    for c, condition in enumerate(conditions):
        label = plot_label(condition_name(report, condition))
        panel.plot([], [], MARKERS[c % 8], ms=6, mfc="none", color=theme.ink, label=label)
    panel.margins(x=0.08)
    panel.set_ylim(bottom=0)
    panel.set_xlabel("NLL under the unsteered model (nats/token): left is more fluent")
    panel.set_ylabel("mean toxicity: low is safer")
    legend(panel, 2)
    return figure_of([panel])


def _separability(record: RunRecord, theme: Theme) -> Figure | None:
    found = record.separability
    if found is None or not found.layers:
        return None
    axes = panels(theme, (2.6, 1.6) if found.cosines else (2.6,))
    top = axes[0]
    for layer in found.chosen:
        top.axvspan(layer - 0.4, layer + 0.4, color=theme.line, lw=0, alpha=0.8)
    for i, (name, curve) in enumerate(found.sources.items()):
        colour = theme.colours[i % len(theme.colours)]
        _band(top, found.layers, curve, colour)
        label = plot_label(name)
        top.plot(found.layers, _finite(curve.auc), lw=1.3, color=colour, label=label)
    _band(top, found.layers, found.combined, theme.ink)
    top.plot(found.layers, _finite(found.combined.auc), lw=2.2, color=theme.ink, label="combined")
    top.axhline(0.5, color=theme.muted, lw=0.9, ls=":")
    top.set_ylabel("held-out AUC")
    legend(top, 3)
    for i, (pair, values) in enumerate(found.cosines.items()):
        style: dict[str, Any] = {
            "color": theme.colours[i % len(theme.colours)],
            "ls": ("-", "--", ":", "-.")[i % 4],
        }
        label = plot_label(pair.replace("|", " and "), 34)
        axes[-1].plot(found.layers, _finite(values), lw=1.4, label=label, **style)
    if found.cosines:
        axes[-1].set_ylabel("cosine between\nsources")
        legend(axes[-1], 2)
    axes[-1].set_xlabel("decoder block, counted from 0 (shaded: chosen)")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure_of(axes)


def _doses(record: RunRecord, theme: Theme) -> Figure | None:
    rows = [row for row in record.history if row.doses]
    if not rows:
        return None
    chosen = record.separability.chosen if record.separability else []
    doses, cosines = axes = panels(theme, (2.2, 2.0))
    for i in range(len(rows[-1].doses)):
        fits = len(chosen) == len(rows[-1].doses)
        label = f"block {chosen[i]}" if fits else f"steered layer {i + 1}"
        style: dict[str, Any] = {
            "color": theme.colours[i % 6],
            "marker": MARKERS[i % 8],
            "ms": 3,
            "lw": 1.3,
        }
        for panel, kept in ((doses, "doses"), (cosines, "cos_to_init")):
            lists = [getattr(row, kept) for row in rows]
            values = _finite([v[i] if i < len(v) else math.nan for v in lists])
            panel.plot([row.step for row in rows], values, label=label, **style)
    doses.set_ylabel("|v| / mean |h|")
    doses.set_ylim(bottom=0)
    legend(doses, 4)
    cosines.set_ylabel("cosine to the\nStage I vector")
    cosines.set_xlabel("training step")
    cosines.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure_of(axes)


def _band(panel: Axes, layers: Sequence[int], curve: Curve, colour: str) -> None:
    if curve.low and curve.high:
        low, high = _finite(curve.low), _finite(curve.high)
        panel.fill_between(layers, low, high, color=colour, alpha=0.13, lw=0)


def toxic_conditions(report: EvaluationReport) -> list[str]:
    """Conditions whose prompts pull towards harm: captions and questions are for utility."""
    return [
        condition
        for condition in conditions_of(report)
        if condition not in UTILITY
        and any(interval_of(report, condition, d, "toxicity") for d in defences_of(report))
    ]


def interval_of(
    report: EvaluationReport, condition: str, defence: str, metric: str
) -> Interval | None:
    for cell in report.cells:
        if (cell.condition, cell.defence) == (condition, defence):
            return cell.metrics.get(metric)
    return None


def arms(intervals: Sequence[Interval]) -> NDArray[np.float64]:
    """(2, n) lengths of error bars; never negative, as rounding may put a mean on its bound."""
    arms = [[i.mean - i.low for i in intervals], [i.high - i.mean for i in intervals]]
    return np.clip(_finite(np.ravel(arms)).reshape(2, -1), 0.0, None)


PLOTS: Mapping[str, PlotKind] = {
    "toxicity": (
        "Toxicity by defence",
        "Mean toxicity of the answers by condition and defence, as the judge scores them. Bars are "
        "95 % bootstrap intervals over prompts.",
        _toxicity,
    ),
    "front": (
        "Toxicity against fluency",
        "Each point is one defence (colour) under one condition (shape), with 95 % intervals both "
        "ways. Lower left is better: safe and still fluent.",
        _front,
    ),
    "training": (
        "Reward by training step",
        "Mean reward of each step's rollouts, its parts before weighting, and the distance of the "
        "steered model from the unsteered one.",
        _training,
    ),
    "doses": (
        "What training did to the vector",
        "Length of each layer's direction relative to that layer's mean hidden norm, and its "
        "cosine to where Stage I put it.",
        _doses,
    ),
    "separability": (
        "Separability by layer",
        "How well a projection on the vector tells held-out harmful from safe text at each decoder "
        "block (0.5 is chance), and how far the sources agree on the direction.",
        _separability,
    ),
}
