"""Stage I in the report: projection histograms, the sources' figures, the leave-one-out table."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from spo.report.figures import Theme, figure_of, legend, panels
from spo.report.run_record import LeftOutRow, RunRecord, Separability
from spo.report.text import plot_label

TITLE = "Projections of harmful and harmless rows"
DESCRIPTION = (
    "Held-out rows of each source projected on the combined direction at the best chosen block. "
    "The less the two sides overlap, the better the vector tells them apart."
)


def draw_projections(record: RunRecord, theme: Theme) -> Figure | None:
    """One histogram for each source, both sides over each other."""
    found = record.separability
    if found is None or not found.histograms:
        return None
    axes = panels(theme, [1.15] * len(found.histograms), share_x=False)
    for panel, (name, bins) in zip(axes, found.histograms.items(), strict=True):
        edges = np.array(bins.edges)
        for counts, colour, label in (
            (bins.harm, theme.colours[1], "harmful"),
            (bins.safe, theme.colours[0], "harmless"),
        ):
            panel.stairs(counts, edges, fill=True, alpha=0.45, color=colour, label=label)
        panel.set_ylabel(plot_label(name, 18), fontsize=8)
        panel.grid(visible=False)
    legend(axes[0])
    first = next(iter(found.histograms.values()))
    axes[-1].set_xlabel(f"projection at block {first.layer}, activation units")
    return figure_of(axes)


def source_rows(found: Separability | None) -> list[tuple[str, str, str, str]]:
    """(source, share, own held-out AUC, cosine of halves), each a mean over the chosen layers."""
    if found is None or not found.source_weights:
        return []
    chosen = [found.layers.index(layer) for layer in found.chosen if layer in found.layers]

    def mean(values: list[float] | None) -> str:
        return f"{np.mean([values[row] for row in chosen]):.3f}" if values and chosen else "–"

    return [
        (
            name,
            mean(weights),
            mean(found.own[name].auc if name in found.own else None),
            mean(found.halves.get(name)),
        )
        for name, weights in found.source_weights.items()
    ]


def left_out_rows(rows: tuple[LeftOutRow, ...]) -> list[tuple[str, str, str, str]]:
    """(unseen source, combination, picked single source, best single source)."""
    shown = []
    for row in rows:
        best = max(row.singles, key=lambda name, row=row: row.singles[name].mean)  # type: ignore[misc]
        shown.append(
            (
                row.source,
                str(row.combined),
                f"{row.singles[row.picked]} ({row.picked})",
                f"{row.singles[best]} ({best})",
            )
        )
    return shown
