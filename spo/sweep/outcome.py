"""What a sweep found: its trials out of the database and their folders, the front, the choice."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from spo.artifact import SteeringArtifact
from spo.config import RunConfig
from spo.errors import ArtifactError, ConfigError, DataError
from spo.evaluation import load_report
from spo.files import write_atomic
from spo.records import EvaluationReport
from spo.sweep.plan import SweepFolder, TrialResult, read_result
from spo.sweep.rungs import dominates
from spo.sweep.settings import BEST_IS, Metric, SweepConfig, format_layers
from spo.sweep.study import DIGEST, SETTINGS, STUDY, open_storage
from spo.sweep.validation import Measured, load_measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One trial."""

    number: int
    state: str
    """"complete", "pruned" or "fail"."""
    settings: Mapping[str, Any]
    """Configuration key to value."""
    params: Mapping[str, Any]
    """The same as Optuna's scalars."""
    result: TrialResult | None
    front: bool = False
    """Whether no other whole trial dominates it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Everything that a sweep has so far."""

    folder: SweepFolder
    sweep: SweepConfig
    base_config: RunConfig
    study: optuna.Study
    rows: tuple[Row, ...]
    base: TrialResult | None
    """The setting that the sweep starts from."""
    unsteered: Measured | None
    heldout: EvaluationReport | None

    @property
    def whole(self) -> list[Row]:
        """Trials that ran to their end."""
        return [row for row in self.rows if row.state == "complete" and row.result is not None]

    @property
    def front(self) -> list[Row]:
        """Trials that no other dominates, best first objective first."""
        first = next(iter(self.sweep.objectives))
        return sorted((row for row in self.whole if row.front), key=lambda row: cost(row, first))


def load_outcome(folder: SweepFolder, sweep: SweepConfig, base_config: RunConfig) -> Outcome:
    """Read a sweep's folder, also while it runs.

    Raises:
        DataError: the folder holds no study.
    """
    import json

    if not folder.storage.is_file():
        raise DataError(f"{folder.path} holds no sweep (no {folder.storage.name}); run it first")
    try:
        study = optuna.load_study(study_name=STUDY, storage=open_storage(folder))
    except KeyError as error:
        raise DataError(f"{folder.storage} holds no study of jobs.sweep") from error
    rows: list[Row] = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL):
            continue
        digest = trial.user_attrs.get(DIGEST)
        rows.append(
            Row(
                number=trial.number,
                state=trial.state.name.lower(),
                settings=json.loads(trial.user_attrs.get(SETTINGS, "{}")),
                params=trial.params,
                result=read_result(folder.trial(digest)) if digest else None,
            )
        )
    unsteered = folder.path / "unsteered.json"
    return Outcome(
        folder=folder,
        sweep=sweep,
        base_config=base_config,
        study=study,
        rows=_with_front(rows, list(sweep.objectives)),
        base=_base_result(folder),
        unsteered=(
            load_measured(json.loads(unsteered.read_text())["measured"])
            if unsteered.is_file()
            else None
        ),
        heldout=load_report(folder.heldout) if folder.heldout.is_file() else None,
    )


def _base_result(folder: SweepFolder) -> TrialResult | None:
    """The one result without a point."""
    path = folder.path / "base.txt"
    return read_result(folder.trial(path.read_text().strip())) if path.is_file() else None


def remember_base(folder: SweepFolder, digest: str) -> None:
    """Keep which trial folder belongs to the base setting."""
    write_atomic(folder.path / "base.txt", digest.encode())


def _with_front(rows: Sequence[Row], objectives: Sequence[Metric]) -> tuple[Row, ...]:
    points: dict[int, dict[str, float]] = {
        row.number: {str(name): row.result.mean(name) for name in objectives}
        for row in rows
        if row.state == "complete" and row.result is not None
    }
    return tuple(
        replace(
            row,
            front=row.number in points
            and not any(dominates(o, points[row.number], objectives) for o in points.values()),
        )
        for row in rows
    )


def cost(row: Row, metric: Metric) -> float:
    """A metric of a whole trial, smaller is better."""
    assert row.result is not None
    return row.result.mean(metric) * (1.0 if BEST_IS[metric] == "min" else -1.0)


def choose(
    outcome: Outcome, objective: Metric, limits: Mapping[Metric, float] | None = None
) -> Row:
    """The trial that is best in one metric and not worse than the base in the others.

    Not worse means: inside or beyond the good side of the base's own 95 % interval.

    Args:
        outcome: the sweep.
        objective: metric to be best in.
        limits: explicit bounds of other metrics; they replace the comparison with the base.

    Raises:
        DataError: no whole trial qualifies; says which bound fails how many.
    """
    bounds = dict(limits) if limits else _bounds_of_base(outcome, objective)
    fits: list[Row] = []
    failed: dict[str, int] = {}
    for row in outcome.whole:
        assert row.result is not None
        worse = [name for name, bound in bounds.items() if _worse(row.result, name, bound)]
        for name in worse:
            failed[name] = failed.get(name, 0) + 1
        if not worse:
            fits.append(row)
    if not fits:
        shown = ", ".join(f"{name} {bound:.3f}" for name, bound in bounds.items())
        raise DataError(
            f"none of {len(outcome.whole)} whole trials keeps to {shown or 'any bound'} (trials "
            f"beyond each: {failed}); give --limit METRIC=VALUE, or search on with --resume"
        )
    return min(fits, key=lambda row: cost(row, objective))


def numbered(outcome: Outcome, number: int) -> Row:
    """A whole trial by its number; DataError where there is none."""
    found = [row for row in outcome.whole if row.number == number]
    if not found:
        raise DataError(
            f"trial {number} did not run to its end; whole ones: "
            f"{[row.number for row in outcome.whole]}"
        )
    return found[0]


def balanced(outcome: Outcome) -> Row | None:
    """`choose` by the first objective; None where no trial qualifies."""
    try:
        return choose(outcome, next(iter(outcome.sweep.objectives)))
    except DataError:
        return None


def _bounds_of_base(outcome: Outcome, objective: Metric) -> dict[Metric, float]:
    if outcome.base is None:
        return {}
    metrics = outcome.base.measured.metrics
    guarded = [*outcome.sweep.objectives, "nll"]
    return {
        name: metrics[name].high if BEST_IS[name] == "min" else metrics[name].low
        for name in dict.fromkeys(guarded)
        if name != objective and name in metrics
    }


def _worse(result: TrialResult, metric: Metric, bound: float) -> bool:
    if metric not in result.measured.metrics:
        return True
    value = result.mean(metric)
    return value > bound if BEST_IS[metric] == "min" else value < bound


def parse_limits(texts: Sequence[str]) -> dict[Metric, float]:
    """`METRIC=VALUE` bounds from a command line."""
    limits: dict[Metric, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        known = [metric for metric in BEST_IS if metric == name]
        try:
            limits[known[0]] = float(value)
        except (IndexError, ValueError) as error:
            raise ConfigError(
                f"a limit is METRIC=VALUE with one of {', '.join(BEST_IS)}, got {text!r}"
            ) from error
    return limits


def export(outcome: Outcome, row: Row, out: Path) -> SteeringArtifact:
    """Write the artifact of a trial with the figures that it was chosen by."""
    assert row.result is not None
    source = outcome.folder.trial(row.result.digest) / "artifact"
    artifact = SteeringArtifact.load(source, model_id=None)
    if artifact.vector.sha256 != row.result.sha256:
        raise ArtifactError(
            f"{source} holds vector {artifact.vector.sha256[:12]}, trial {row.number} was measured "
            f"with {row.result.sha256[:12]}; run the trial again with --resume"
        )
    figures: dict[str, Any] = {
        "sweep": outcome.sweep.name,
        "trial": row.number,
        "settings": dict(row.settings),
        "validation": {name: asdict(i) for name, i in row.result.measured.metrics.items()},
    }
    if outcome.heldout is not None:
        hashes = {a.receipt_sha256 for a in outcome.heldout.answers if a.defence == "found"}
        if hashes == {row.result.sha256} and (outcome.folder.path / "found.txt").read_text() == (
            row.result.digest
        ):
            figures["heldout"] = {
                cell.condition: {name: asdict(i) for name, i in cell.metrics.items()}
                for cell in outcome.heldout.cells
                if cell.defence == "found"
            }
    released = replace(artifact, evaluation=figures)
    released.save(out)
    return released


def write_table(outcome: Outcome) -> Path:
    """`sweep.csv`: one line a trial, with settings, means and intervals."""
    keys = list(outcome.sweep.space)
    metrics = list(BEST_IS)
    header = ["trial", "state", "front", "step", "seconds", "layers", *keys]
    for name in metrics:
        header += [name, f"{name}_low", f"{name}_high"]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*header, "digest"])
    lines: list[tuple[str, str, bool, Mapping[str, Any], TrialResult | None]] = [
        (str(row.number), row.state, row.front, row.settings, row.result) for row in outcome.rows
    ]
    if outcome.base is not None:
        lines.insert(0, ("base", "complete", False, {}, outcome.base))
    for number, state, front, settings, result in lines:
        line: list[Any] = [number, state, int(front)]
        if result is None:
            line += ["", "", ""]
        else:
            line += [result.step, f"{result.seconds:.1f}", format_layers(result.layers)]
        line += [show_value(settings.get(key)) for key in keys]
        for name in metrics:
            interval = result.measured.metrics.get(name) if result else None
            line += (
                [f"{v:.6g}" for v in (interval.mean, interval.low, interval.high)]
                if (interval)
                else ["", "", ""]
            )
        writer.writerow([*line, result.digest if result else ""])
    write_atomic(outcome.folder.table, text.getvalue().encode())
    return outcome.folder.table


def show_value(value: Any) -> str:
    """A setting as people write it; blocks in their short form."""
    if value is None:
        return ""
    if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
        return format_layers(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
