"""What the report calls each metric, which way is better, and how its figures are written."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from spo.records import EvaluationReport, Interval

BASELINE = "none"
UTILITY = ("caption", "question", "benign", "twin", "text")
"""Conditions that measure what a defence costs."""
_DEFENCE_NAMES = {
    "none": "unsteered",
    "stage1-constant": "Stage I, constant",
    "stage1": "Stage I",
    "bipo": "BiPO",
    "spo": "SPO",
}
_CONDITION_NAMES = {
    "plain": "text prompts",
    "image": "with a clean picture",
    "pgd": "under the picture attack",
    "describe": "about a clean picture",
    "typographic": "words drawn into the picture",
    "template": "text jailbreaks",
    "twin": "harmless twins of harmful requests",
    "text": "harmless text",
    "caption": "captions",
    "question": "questions about pictures",
    "benign": "honest requests",
}


class Verdict(StrEnum):
    """What a paired difference says."""

    BETTER = "better"
    WORSE = "worse"
    EVEN = "even"
    """The interval holds 0."""
    CHANGED = "changed"
    """It does not hold 0, and neither direction is better as such."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """How one metric is presented."""

    name: str
    label: str
    better: int
    """-1: lower is better, 1: higher is better, 0: neither as such."""
    percent: bool = False

    def figure(self, value: float) -> str:
        """A value as text, e.g. "0.081" or "12.3 %"."""
        return f"{100 * value:.1f} %" if self.percent else f"{value:.3f}"

    def change(self, value: float) -> str:
        """A difference as text with its sign, e.g. "−0.156" or "+1.2 points"."""
        return f"{self._signed(value)} points" if self.percent else self._signed(value)

    def _signed(self, value: float) -> str:
        digits = 1 if self.percent else 3
        rounded = round(100 * value if self.percent else value, digits) + 0.0  # no "-0.0"
        return f"{rounded:+.{digits}f}".replace("-", "−")

    def range(self, interval: Interval) -> str:
        """Bounds of an interval."""
        if self.percent:
            return f"{100 * interval.low:.1f} to {100 * interval.high:.1f} %"
        return f"{interval.low:.3f} to {interval.high:.3f}"

    def change_range(self, interval: Interval) -> str:
        """Bounds of the interval of a difference."""
        return f"{self._signed(interval.low)} to {self._signed(interval.high)}"

    def verdict(self, change: Interval) -> Verdict:
        """Whether a paired difference is good news."""
        if change.low <= 0 <= change.high:
            return Verdict.EVEN
        if not self.better:
            return Verdict.CHANGED
        return Verdict.BETTER if (change.mean > 0) == (self.better > 0) else Verdict.WORSE


_KNOWN = {
    metric.name: metric
    for metric in (
        Metric(name="toxicity", label="mean toxicity", better=-1),
        Metric(name="toxic", label="toxic answers", better=-1, percent=True),
        Metric(name="max_toxicity", label="expected maximum toxicity", better=-1),
        Metric(name="success", label="attack success", better=-1, percent=True),
        Metric(name="attributes", label="attributes right", better=1, percent=True),
        Metric(name="correct", label="questions right", better=1, percent=True),
        Metric(name="alignment", label="picture-text alignment", better=1),
        Metric(name="nll", label="NLL, unsteered model (nats/token)", better=-1),
        Metric(name="kl", label="KL to the unsteered model (nats/token)", better=-1),
        Metric(name="reference_nll", label="NLL of harmless text (nats/token)", better=-1),
        Metric(name="degenerate", label="degenerate text", better=-1, percent=True),
        Metric(name="refusal", label="refusals", better=0, percent=True),
        Metric(name="length", label="tokens", better=0),
    )
}


def metric_named(name: str) -> Metric:
    """A known metric, or a neutral presentation of an unknown one."""
    return _KNOWN.get(name) or Metric(name=name, label=name, better=0)


def metrics_of(report: EvaluationReport, condition: str) -> list[Metric]:
    """Metrics of a condition, known ones first."""
    present = dict.fromkeys(
        name for cell in report.cells if cell.condition == condition for name in cell.metrics
    )
    known = [metric for name, metric in _KNOWN.items() if name in present]
    return known + [metric_named(name) for name in present if name not in _KNOWN]


def conditions_of(report: EvaluationReport) -> list[str]:
    """Conditions in their own order."""
    return list(dict.fromkeys(cell.condition for cell in report.cells))


def defences_of(report: EvaluationReport) -> list[str]:
    """Defences: the unsteered model first, SPO last, others between in their own order."""
    present = dict.fromkeys(cell.defence for cell in report.cells)
    rank = {BASELINE: 0, "reminder": 1, "stage1-constant": 2, "stage1": 3, "spo": 5}
    return sorted(present, key=lambda name: rank.get(name, 4))


def defence_name(defence: str) -> str:
    """A defence in words."""
    return _DEFENCE_NAMES.get(defence, defence)


def condition_name(report: EvaluationReport, condition: str) -> str:
    """A condition in words."""
    attacked = report.attacks.get(condition)
    if attacked is not None and attacked.kind == "pgd":
        return f"{attacked.attack.replace('-', ' ')} picture"
    return _CONDITION_NAMES.get(condition, condition)
