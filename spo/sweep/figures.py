"""Plots of a sweep, each for light and for dark pages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from spo.records import Interval
from spo.report.figures import DARK, LIGHT, Plot, Theme, painted
from spo.report.text import plot_label
from spo.sweep.outcome import Outcome, Row
from spo.sweep.plan import TrialResult
from spo.sweep.settings import BEST_IS, Metric
from spo.sweep.space import LAYERS

_DPI = 170
_LEAST_FOR_IMPORTANCE = 8
_BINS = 6
COEFFICIENT = "steering.coefficient"

LABELS: Mapping[Metric, str] = {
    "toxicity": "toxicity (reward model)",
    "utility": "utility on benign prompts",
    "kl": "KL to unsteered, benign\n(nats per token)",
    "nll": "NLL of answers to harmful\nprompts (fluency)",
    "degenerate": "degeneration",
}

_Draw = Callable[[Outcome, Theme], Figure | None]


def draw_plots(outcome: Outcome) -> dict[str, Plot]:
    """Every plot that the sweep has figures for, by name."""
    plots: dict[str, Plot] = {}
    kinds: dict[str, tuple[str, str, _Draw]] = dict(_PLOTS)
    for metric in outcome.sweep.objectives:
        better = "lower" if BEST_IS[metric] == "min" else "higher"
        kinds[f"heat-{metric}"] = (
            f"Layer and coefficient: {metric}",
            f"Mean {metric} ({better} is better) of the trials that steer a decoder block with a "
            "coefficient in the range; the number of trials is in the cell. A trial that steers "
            "several blocks counts in the row of each.",
            _heat_of(metric),
        )
    for name, (title, description, draw) in kinds.items():
        light, dark = (painted(theme, lambda t, d=draw: d(outcome, t)) for theme in (LIGHT, DARK))  # type: ignore[misc]
        if light is not None and dark is not None:
            plots[name] = Plot(
                name=name, title=title, description=description, light=light, dark=dark
            )
    return plots


def _axes(theme: Theme, columns: int, *, width: float, height: float) -> list[Axes]:
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, columns, squeeze=False)[0])
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color=theme.line, linewidth=0.6)
        panel.set_axisbelow(True)
        panel.tick_params(length=0)
    return axes


def _figure(panel: Axes) -> Figure:
    figure = panel.get_figure()
    assert isinstance(figure, Figure)
    return figure


def _front(outcome: Outcome, theme: Theme) -> Figure | None:
    """The first objective against each other metric that matters."""
    rows = outcome.whole
    if not rows:
        return None
    first, *others = outcome.sweep.objectives
    shown = list(dict.fromkeys([*others, "nll"])) if others != ["nll"] else others
    shown = [m for m in shown if any(m in r.result.measured.metrics for r in rows if r.result)]
    axes = _axes(theme, len(shown), width=3.7 * len(shown), height=3.6)
    for panel, other in zip(axes, shown, strict=True):
        for row in rows:
            if row.result is not None:
                colour = theme.colours[1] if row.front else theme.muted
                _point(panel, row.result.measured.metrics, (other, first), colour, front=row.front)
        if outcome.base is not None:
            measured = outcome.base.measured.metrics
            _point(panel, measured, (other, first), theme.colours[0], front=True, marker="s")
        if outcome.unsteered is not None:
            measured = outcome.unsteered.metrics
            _point(panel, measured, (other, first), theme.ink, front=True, marker="X")
        panel.set_xlabel(LABELS[other])
        panel.set_ylabel(LABELS[first] if panel is axes[0] else "")
    handles = [
        mpl.lines.Line2D([], [], color=colour, marker=marker, ls="", ms=6, label=label)
        for colour, marker, label in (
            (theme.colours[1], "o", "front"),
            (theme.muted, "o", "other trials"),
            (theme.colours[0], "s", "base"),
            (theme.ink, "X", "unsteered"),
        )
    ]
    _figure(axes[0]).legend(
        handles=handles, loc="outside upper left", ncols=4, frameon=False, fontsize=8.5
    )
    return _figure(axes[0])


def _point(
    panel: Axes,
    metrics: Mapping[Metric, Interval],
    names: tuple[Metric, Metric],
    colour: str,
    *,
    front: bool,
    marker: str = "o",
) -> None:
    if any(name not in metrics for name in names):
        return
    x, y = (metrics[name] for name in names)
    panel.errorbar(
        x.mean,
        y.mean,
        xerr=_arms(x) if front else None,
        yerr=_arms(y) if front else None,
        fmt=marker,
        ms=6 if front else 3.5,
        lw=0.9,
        alpha=0.95 if front else 0.5,
        color=colour,
        zorder=3 if front else 2,
    )


def _arms(interval: Interval) -> NDArray[np.float64]:
    """(2, 1) lengths of an error bar; never negative."""
    arms = [[interval.mean - interval.low], [interval.high - interval.mean]]
    return np.clip(np.array(arms, dtype=np.float64), 0.0, None)


def importances(outcome: Outcome) -> dict[Metric, dict[str, float]]:
    """Share of each objective's variance that a parameter explains (fANOVA), by objective."""
    found: dict[Metric, dict[str, float]] = {}
    for metric in outcome.sweep.objectives:
        place = list(outcome.sweep.objectives).index(metric)
        values = {row.result.mean(metric) for row in outcome.whole if row.result is not None}
        if len(outcome.whole) < _LEAST_FOR_IMPORTANCE or len(values) < 2:
            continue
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        try:
            found[metric] = dict(
                optuna.importance.get_param_importances(
                    outcome.study,
                    evaluator=evaluator,
                    target=lambda trial, i=place: trial.values[i],  # type: ignore[misc]
                )
            )
        except (ValueError, RuntimeError):
            continue  # no parameter occurs in every trial, or none varies
    return found


def _importance(outcome: Outcome, theme: Theme) -> Figure | None:
    found = importances(outcome)
    names = list(dict.fromkeys(name for shares in found.values() for name in shares))
    if not names:
        return None
    names.sort(key=lambda name: sum(shares.get(name, 0.0) for shares in found.values()))
    panel = _axes(theme, 1, width=5.3, height=0.9 + 0.42 * len(names))[0]
    height = 0.8 / len(found)
    for i, (metric, shares) in enumerate(found.items()):
        places = np.arange(len(names)) + (i - (len(found) - 1) / 2) * height
        widths = [shares.get(name, 0.0) for name in names]
        colour = theme.colours[i % len(theme.colours)]
        panel.barh(places, widths, height=height * 0.9, color=colour, label=metric)
    panel.set_yticks(range(len(names)), [plot_label(name, 34) for name in names])
    panel.set_xlabel("share of the variance between trials (fANOVA)")
    panel.legend(frameon=False, fontsize=8.5, loc="lower right")
    return _figure(panel)


def heat_map(
    outcome: Outcome, metric: Metric
) -> tuple[NDArray[np.float64], NDArray[np.int64], list[int], list[str]] | None:
    """(layers, bins) means and counts, the layers, and the bins' labels; None without both axes."""
    rows = [
        (row.result, float(row.settings[COEFFICIENT]))
        for row in outcome.whole
        if row.result is not None and COEFFICIENT in row.settings
    ]
    layers = sorted({layer for result, _ in rows for layer in result.layers})
    coefficients = sorted({value for _, value in rows})
    searched = any(key == LAYERS for key in outcome.sweep.space)
    if len(coefficients) < 2 or not layers or not searched:
        return None
    edges = _edges(coefficients)
    sums = np.zeros((len(layers), len(edges) - 1))
    counts = np.zeros_like(sums, dtype=np.int64)
    for result, value in rows:
        place = min(int(np.searchsorted(edges, value, side="right")) - 1, len(edges) - 2)
        for layer in result.layers:
            sums[layers.index(layer), place] += result.mean(metric)
            counts[layers.index(layer), place] += 1
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    labels = [f"{low:.2g}–{high:.2g}" for low, high in itertools.pairwise(edges)]
    return means, counts, layers, labels


def _edges(values: Sequence[float]) -> NDArray[np.float64]:
    bins = min(_BINS, len(values))
    if values[0] > 0 and values[-1] / values[0] > 4:
        return np.geomspace(values[0], values[-1], bins + 1)
    return np.linspace(values[0], values[-1], bins + 1)


def _heat_of(metric: Metric) -> _Draw:
    def draw(outcome: Outcome, theme: Theme) -> Figure | None:
        found = heat_map(outcome, metric)
        if found is None:
            return None
        means, counts, layers, labels = found
        panel = _axes(theme, 1, width=5.3, height=1.1 + 0.2 * len(layers))[0]
        panel.grid(visible=False)
        colours = mpl.colormaps["viridis_r" if BEST_IS[metric] == "min" else "viridis"]
        image = panel.imshow(means, aspect="auto", origin="lower", cmap=colours)
        middle = float(np.nanmean(means))
        for (i, j), count in np.ndenumerate(counts):
            if count:
                dark = (means[i, j] > middle) == (BEST_IS[metric] == "min")
                colour = "white" if dark else "black"
                panel.text(j, i, str(count), ha="center", va="center", fontsize=6.5, color=colour)
        panel.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=7.5)
        panel.set_xticks(range(len(labels)), labels, fontsize=8)
        panel.set_xlabel("coefficient")
        panel.set_ylabel("decoder block")
        figure = _figure(panel)
        bar = figure.colorbar(image, ax=panel, shrink=0.9)
        bar.set_label(LABELS[metric].replace("\n", " "), fontsize=8.5)
        bar.outline.set_visible(False)
        return figure

    return draw


def _progress(outcome: Outcome, theme: Theme) -> Figure | None:
    """Best of each objective so far, by trial."""
    rows = outcome.whole
    if len(rows) < 2:
        return None
    objectives = list(outcome.sweep.objectives)
    axes = _axes(theme, len(objectives), width=3.7 * len(objectives), height=2.5)
    for panel, metric in zip(axes, objectives, strict=True):
        values = [row.result.mean(metric) for row in rows if row.result is not None]
        numbers = [row.number for row in rows if row.result is not None]
        best = np.minimum.accumulate if BEST_IS[metric] == "min" else np.maximum.accumulate
        panel.plot(numbers, values, "o", ms=3, color=theme.muted, alpha=0.6)
        panel.step(numbers, best(np.array(values)), where="post", color=theme.colours[1], lw=1.5)
        if outcome.base is not None:
            panel.axhline(outcome.base.mean(metric), color=theme.colours[0], lw=1.0, ls="--")
        panel.set_xlabel("trial")
        panel.set_ylabel(LABELS[metric])
    return _figure(axes[0])


def _curves(outcome: Outcome, theme: Theme) -> Figure | None:
    """Reward by learner step of every trial that trained."""
    named: list[tuple[Row | None, TrialResult]] = [
        (row, row.result) for row in outcome.rows if row.result is not None and row.result.history
    ]
    if outcome.base is not None and outcome.base.history:
        named.append((None, outcome.base))
    if not named:
        return None
    panel = _axes(theme, 1, width=5.3, height=2.9)[0]
    for row, result in named:
        style: dict[str, Any] = {"color": theme.muted, "alpha": 0.5, "lw": 0.9}
        if row is None:
            style = {"color": theme.colours[0], "lw": 1.6, "ls": "--"}
        elif row.front:
            style = {"color": theme.colours[1], "lw": 1.4}
        steps = [entry["step"] + 1 for entry in result.history]
        panel.plot(steps, [entry.get("reward", math.nan) for entry in result.history], **style)
    panel.set_xlabel("learner step")
    panel.set_ylabel("mean reward of rollouts")
    return _figure(panel)


_PLOTS: Mapping[str, tuple[str, str, _Draw]] = {
    "front": (
        "The front",
        "Every whole trial; those that no other dominates in the objectives are coloured, with "
        "95 % bootstrap intervals over validation prompts both ways.",
        _front,
    ),
    "importance": (
        "What matters",
        "How much of the difference between trials each parameter explains. With few trials these "
        "shares are rough.",
        _importance,
    ),
    "progress": (
        "Progress of the search",
        "Each objective by trial and the best so far; the dashed line is the base setting.",
        _progress,
    ),
    "curves": (
        "Training",
        "Mean reward by learner step: trials of the front in colour, the base dashed, the others "
        "grey; lines that end early were stopped by ASHA.",
        _curves,
    ),
}
