"""How far a judge agrees with people: accuracy, Cohen's kappa, and where it errs."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spo.algorithms.metrics import rate_interval
from spo.errors import DataError
from spo.records import Interval, Prompt, PromptKind
from spo.scorers.base import SuccessJudge

_COLUMNS = ("goal", "target_response", "human_majority")


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """One judge against the human majority."""

    judge: str
    accuracy: Interval
    """Wilson interval; `count` is the number of answers with a verdict."""
    kappa: float
    """Cohen's kappa: 0 is chance, 1 full agreement."""
    false_alarm: float
    """Share of the answers that people call harmless which the judge calls a success."""
    missed: float
    """Share of the answers that people call a success which the judge does not."""
    without_verdict: int
    """Answers that the judge gave no verdict on; in none of the figures above."""


def judge_agreement(judge: SuccessJudge, rows: Sequence[tuple[Prompt, str, bool]]) -> Agreement:
    """Compare a judge's verdicts with human labels."""
    verdicts = judge.verdicts([(prompt, answer) for prompt, answer, _ in rows])
    labels = [label for _, _, label in rows]
    return agreement(judge.name, verdicts, labels)


def agreement(
    name: str, verdicts: Sequence[float | str | None], labels: Sequence[bool]
) -> Agreement:
    """Agreement of verdicts (1.0, 0.0, or a reason why there is none) with labels.

    Raises:
        DataError: lengths differ, or people call all answers alike.
    """
    if len(verdicts) != len(labels):
        raise DataError(f"expected {len(labels)} verdicts, got {len(verdicts)}")
    pairs = [
        (v >= 0.5, label)
        for v, label in zip(verdicts, labels, strict=True)
        if isinstance(v, float | int)
    ]
    yes = sum(label for _, label in pairs)
    if not 0 < yes < len(pairs):
        raise DataError(
            f"judge {name}: agreement needs answers of both human labels with a verdict, got {yes} "
            f"successes of {len(pairs)}"
        )
    count = len(pairs)
    right = sum(said == label for said, label in pairs)
    said_yes = sum(said for said, _ in pairs)
    chance = (said_yes * yes + (count - said_yes) * (count - yes)) / count**2
    observed = right / count
    return Agreement(
        judge=name,
        accuracy=rate_interval(right, count),
        kappa=(observed - chance) / (1 - chance) if chance < 1 else 0.0,
        false_alarm=sum(said and not label for said, label in pairs) / (count - yes),
        missed=sum(label and not said for said, label in pairs) / yes,
        without_verdict=len(verdicts) - count,
    )


def read_labelled(path: Path) -> tuple[list[tuple[Prompt, str, bool]], dict[str, list[float]]]:
    """Answers with human labels (JailbreakBench's judge comparison), and published verdicts.

    Returns:
        (prompt, answer, human majority) of each row, and the 0/1 columns of other judges by name.

    Raises:
        DataError: the file cannot be read, a column is missing, or a label is neither 0 nor 1.
    """
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            table = csv.DictReader(stream)
            fields = list(table.fieldnames or [])
            content = list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: expected a CSV file, got {error}") from error
    lacking = [column for column in _COLUMNS if column not in fields]
    if lacking:
        raise DataError(f"{path}: expected the columns {list(_COLUMNS)}, {lacking} are missing")
    rows = []
    for number, row in enumerate(content, 2):
        if row["human_majority"] not in ("0", "1"):
            raise DataError(
                f"{path}, line {number}: expected human_majority 0 or 1, got "
                f"{row['human_majority']!r}"
            )
        prompt = Prompt(prompt_id=f"label-{number}", text=row["goal"], kind=PromptKind.HARM)
        rows.append((prompt, row["target_response"], row["human_majority"] == "1"))
    others = [name for name in fields if name.endswith("_cf")]
    return rows, {name: [float(row[name]) for row in content] for name in others}
