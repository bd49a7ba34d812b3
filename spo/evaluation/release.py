"""The release gate: a vector leaves a run only with the evaluation that was made of it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from spo.artifact import SteeringArtifact
from spo.errors import ArtifactError
from spo.evaluation import load_report, shown_conditions
from spo.records import EvaluationReport


def release(
    run_dir: Path, defence: str, out: Path, *, unevaluated: bool = False
) -> SteeringArtifact:
    """Write a vector of a run as a releasable artifact that carries its own figures.

    Args:
        run_dir: folder of the run.
        defence: folder of the vector in the run, e.g. "spo"; the evaluation's name of it.
        out: folder to write.
        unevaluated: release although there is no evaluation of this very vector.

    Raises:
        ArtifactError: the vector is missing, or its evaluation is, or is of another vector.
    """
    artifact = SteeringArtifact.load(run_dir / defence, model_id=None)
    figures: dict[str, Any] = {}
    if not unevaluated:
        path = run_dir / "evaluation.json"
        if not path.is_file():
            raise ArtifactError(
                f"{run_dir} has no evaluation.json: run jobs.evaluate first, or pass --unevaluated"
            )
        figures = _figures(shown_conditions(load_report(path)), defence, artifact.vector.sha256)
    released = replace(artifact, evaluation=figures)
    released.save(out)
    return released


def _figures(report: EvaluationReport, defence: str, sha256: str) -> dict[str, Any]:
    hashes = {a.receipt_sha256 for a in report.answers if a.defence == defence}
    if hashes != {sha256}:
        raise ArtifactError(
            f"the evaluation is of vectors {sorted(h[:12] for h in hashes)}, the one to release "
            f"is {sha256[:12]}: run jobs.evaluate again, or pass --unevaluated"
        )
    return {
        cell.condition: {
            "metrics": {name: asdict(value) for name, value in cell.metrics.items()},
            "paired_difference_to_unsteered": {
                name: asdict(value) for name, value in cell.paired.items()
            },
        }
        for cell in report.cells
        if cell.defence == defence
    }
