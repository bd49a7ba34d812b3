"""Evaluation: every prompt set under every defence, measured alike, with paired intervals."""

from spo.evaluation.measures import Check, ImageTextScorer, Judge, PromptSet
from spo.evaluation.report import compare, format_table, load_report, save_report
from spo.evaluation.run import evaluate

__all__ = [
    "Check",
    "ImageTextScorer",
    "Judge",
    "PromptSet",
    "compare",
    "evaluate",
    "format_table",
    "load_report",
    "save_report",
]
