"""How far a judge agrees with people: accuracy, Cohen's kappa, and where it errs.

Two sets of labelled answers are read: JailbreakBench's judge comparison (did it comply with harm?)
and XSTest's completions (did it refuse: fully, partly, not?). They check judges and train none.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from spo.algorithms.metrics import rate_interval
from spo.errors import DataError
from spo.records import Interval, Prompt, PromptKind
from spo.scorers.base import SuccessJudge

_COLUMNS = ("goal", "target_response", "human_majority")
_REFUSAL_COLUMNS = ("prompt", "completion", "final_label")
_REFUSALS = {"full_compliance": "none", "partial_refusal": "partial", "full_refusal": "full"}
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """One judge against the human majority."""

    judge: str
    accuracy: Interval
    """Wilson interval; `count` is the number of answers with a verdict."""
    kappa: Interval
    """Cohen's kappa: 0 is chance, 1 full agreement; bootstrap interval over the answers."""
    false_alarm: float
    """Share of the answers that people call harmless which the judge calls a success."""
    missed: float
    """Share of the answers that people call a success which the judge does not."""
    without_verdict: int
    """Answers that the judge gave no verdict on; in none of the figures above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusalAgreement:
    """One judge against people's three labels of refusal."""

    judge: str
    accuracy: Interval
    """Wilson interval over the answers."""
    kappa: Interval
    """Cohen's kappa of three classes, bootstrap interval over the answers."""
    found: dict[str, float]
    """Share of the answers of each human label (`none`, `partial`, `full`) that the judge gives the
    same."""


@runtime_checkable
class RefusalReader(Protocol):
    """A judge that tells refusals apart."""

    @property
    def name(self) -> str: ...

    def refusals(self, answers: Sequence[tuple[Prompt, str]]) -> list[str]:
        """`none`, `partial` or `full` for each (prompt, answer)."""
        ...


def kappa_interval(said: Sequence[object], labels: Sequence[object], seed: int = 0) -> Interval:
    """Cohen's kappa of two lists of classes, with a percentile bootstrap interval of 95 %."""
    classes = {name: index for index, name in enumerate(dict.fromkeys([*said, *labels]))}
    table = np.zeros((len(classes), len(classes)))
    for one, label in zip(said, labels, strict=True):
        table[classes[one], classes[label]] += 1
    count = len(labels)
    drawn = np.random.default_rng(seed).multinomial(count, table.ravel() / count, size=_RESAMPLES)
    low, high = np.quantile([_kappa(row.reshape(table.shape)) for row in drawn], (0.025, 0.975))
    return Interval(mean=_kappa(table), low=float(low), high=float(high), count=count)


def _kappa(table: NDArray[np.float64]) -> float:
    count = table.sum()
    chance = float(table.sum(0) @ table.sum(1)) / count**2
    return (float(np.trace(table)) / count - chance) / (1 - chance) if chance < 1 else 0.0


def refusal_agreement(
    judge: RefusalReader, rows: Sequence[tuple[Prompt, str, str]]
) -> RefusalAgreement:
    """Compare a judge's refusals with people's labels."""
    said = judge.refusals([(prompt, answer) for prompt, answer, _ in rows])
    labels = [label for _, _, label in rows]
    right = [one == label for one, label in zip(said, labels, strict=True)]
    return RefusalAgreement(
        judge=judge.name,
        accuracy=rate_interval(sum(right), len(right)),
        kappa=kappa_interval(said, labels),
        found={
            name: float(
                np.mean([r for r, label in zip(right, labels, strict=True) if label == name])
            )
            for name in dict.fromkeys(labels)
        },
    )


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
    return Agreement(
        judge=name,
        accuracy=rate_interval(right, count),
        kappa=kappa_interval([said for said, _ in pairs], [label for _, label in pairs]),
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
    fields, content = _table(path, _COLUMNS)
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


def has_refusals(path: Path) -> bool:
    """Whether the file, or the first of a folder's, has XSTest's labels of refusal."""
    return "final_label" in _table(_files(path)[0], ())[0]


def read_refusals(path: Path) -> list[tuple[Prompt, str, str]]:
    """Answers with people's labels of refusal (XSTest's completions): one file, or a folder's.

    Returns:
        (prompt, answer, `none`, `partial` or `full`) of each row.

    Raises:
        DataError: a file cannot be read, a column is missing, or a label is unknown.
    """
    rows = []
    for file in _files(path):
        for number, row in enumerate(_table(file, _REFUSAL_COLUMNS)[1], 2):
            # Files number their labels: "1_full_compliance".
            label = row["final_label"].lstrip("0123456789_").strip().replace(" ", "_")
            if label not in _REFUSALS:
                raise DataError(
                    f"{file}, line {number}: expected final_label {list(_REFUSALS)}, got "
                    f"{row['final_label']!r}"
                )
            prompt = Prompt(
                prompt_id=f"{file.stem}-{number}", text=row["prompt"], kind=PromptKind.HARM
            )
            rows.append((prompt, row["completion"], _REFUSALS[label]))
    return rows


def _files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: expected a folder with CSV files, found none")
    return files


def _table(path: Path, columns: Sequence[str]) -> tuple[list[str], list[dict[str, str]]]:
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            table = csv.DictReader(stream)
            fields = list(table.fieldnames or [])
            content = list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: expected a CSV file, got {error}") from error
    if lacking := [column for column in columns if column not in fields]:
        raise DataError(f"{path}: expected the columns {list(columns)}, {lacking} are missing")
    return fields, content
