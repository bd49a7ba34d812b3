"""Evaluation: every prompt set under every defence, measured alike, with paired intervals."""

from spo.evaluation.cell_store import CellStore
from spo.evaluation.evaluate import evaluate
from spo.evaluation.results import (
    compare,
    compare_defences,
    compare_reports,
    curve_points,
    format_comparison,
    format_table,
    load_report,
    save_report,
    shown_conditions,
)

__all__ = [
    "CellStore",
    "compare",
    "compare_defences",
    "compare_reports",
    "curve_points",
    "evaluate",
    "format_comparison",
    "format_table",
    "load_report",
    "save_report",
    "shown_conditions",
]
