"""Stage I: from sources of contrasts to the vector, in a run folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spo.algorithms.combination import Estimate, LeftOut, estimate, leave_one_out
from spo.artifact import SteeringArtifact
from spo.config import RunConfig
from spo.engines.identity import folder_revision
from spo.files import write_atomic
from spo.progress import Reporter
from spo.records import Interval
from spo.resolve import open_corpus, resolve_model
from spo.run_folder import keep_quarantined
from spo.stage1.activations import Activations, digest_of_rows, load_activations, steering_vector
from spo.stage1.extract import extract
from spo.stage1.sources import SourceContext, contrast_rows, source_weights
from spo.vector import SteeringVector

STAGE1 = "stage1"
LEFT_OUT = "leave_one_out.json"
_CONTENT = ("layers", "backend", "dtype", "storage")
"""Settings of the extraction that change what is written; the rows count by their content. In the
order in which the digests of earlier runs have them."""


def run_extract(config: RunConfig, reporter: Reporter) -> Path:
    """First half: pooled activations of all contrasts; continues an interrupted run."""
    model = resolve_model(config.model, config.cache)
    reporter.stage(f"Sources: {', '.join(s.label for s in config.extract.sources)}")
    rows, bad = contrast_rows(
        SourceContext(
            corpus=open_corpus(config.corpus),
            extract=config.extract,
            model=model.path,
            revision=model.revision,
            cache=config.cache,
            seed=config.seed,
            progress=reporter.step,
        )
    )
    reporter.stage(f"Extract activations of {len(rows)} rows")
    chosen = config.extract.model_dump(mode="json", include=set(_CONTENT))
    settings = json.dumps({name: chosen[name] for name in _CONTENT}, separators=(",", ":"))
    content = model.path + folder_revision(model.path) + digest_of_rows(rows) + settings
    folder = extract(
        rows,
        config.run_dir / "activations",
        model=model.path,
        revision=model.revision,
        config=config.extract,
        digest=config.digest_of("seed", "model", also=content),
    )
    keep_quarantined(config.run_dir, "extract", bad)
    return folder


def run_estimate(config: RunConfig, reporter: Reporter) -> SteeringArtifact:
    """Second half: the vector, its layers and their weights."""
    reporter.stage("Estimate the Stage I vector")
    found = load_activations(config.run_dir / "activations", source_weights(config.extract))
    result = estimate(found.contrasts, found.layers, found.num_layers, config.estimate)
    vector = steering_vector(found, result)
    report = _separability(found, result, vector)
    write_atomic(config.run_dir / "separability.json", json.dumps(report).encode())
    keep_quarantined(config.run_dir, "activations", found.quarantined)
    artifact = build_artifact(config, vector, config.estimate.method, found.data_sha256, parent="")
    artifact.save(config.run_dir / STAGE1)
    weights = ", ".join(
        f"{layer} ({result.weights[row]:.2f})"
        for layer, row in zip(vector.layers, result.chosen, strict=True)
    )
    reporter.note(f"layers (weight): {weights}")
    shares = ", ".join(
        f"{name} {sum(values[row] for row in result.chosen) / len(result.chosen):.2f}"
        for name, values in result.source_weights.items()
    )
    reporter.note(f"share of each source over these layers: {shares}")
    return artifact


def run_leave_one_out(config: RunConfig, reporter: Reporter) -> str:
    """How well the others separate each source that they never saw; returns a table."""
    reporter.stage("Leave each source out once")
    found = load_activations(config.run_dir / "activations", source_weights(config.extract))
    left = leave_one_out(found.contrasts, found.layers, found.num_layers, config.estimate)
    content = {"rows": [asdict(item) for item in left]}
    write_atomic(config.run_dir / LEFT_OUT, json.dumps(content).encode())
    return left_out_table(left)


def left_out_table(left: Sequence[LeftOut]) -> str:
    """Markdown table; says what it shows in its last line."""
    lines = [
        "| unseen source | layer | all others combined | picked single source | best single "
        "(known only afterwards) |",
        "|---|---|---|---|---|",
    ]
    wins = losses = 0
    for item in left:
        picked = item.singles[item.picked]
        best = max(item.singles, key=lambda name, item=item: item.singles[name].mean)  # type: ignore[misc]
        wins += item.combined.mean > item.singles[best].mean
        losses += item.combined.mean < picked.mean
        lines.append(
            f"| {item.source} | {item.layer} | {_shown(item.combined)} | "
            f"{_shown(picked)} ({item.picked}) | {_shown(item.singles[best])} ({best}) |"
        )
    lines.append(
        f"\nAUC on the unseen source's held-out rows. The combination beats the picked single "
        f"source on {len(left) - losses} of {len(left)}, and the best single one on {wins}."
    )
    return "\n".join(lines)


def build_artifact(
    config: RunConfig, vector: SteeringVector, method: str, data_sha256: str, *, parent: str
) -> SteeringArtifact:
    """A vector with how the configuration applies it and where it comes from."""
    return SteeringArtifact(
        vector=vector,
        operator=config.steering.operator,
        coefficient=config.steering.coefficient,
        positions=config.steering.positions,
        method=method,
        data_sha256=data_sha256,
        config_digest=config.digest,
        parent=parent,
    )


def _separability(found: Activations, result: Estimate, vector: SteeringVector) -> dict[str, Any]:
    return {
        "layers": list(found.layers),
        "sources": {name: _curve(intervals) for name, intervals in result.auc.items()},
        "own": {name: _curve(intervals) for name, intervals in result.own_auc.items()},
        "source_weights": dict(result.source_weights),
        "combined": {"auc": list(result.mean_auc)},
        "chosen": list(vector.layers),
        "weights": result.weights[list(result.chosen)].tolist(),
        "mean_norms": found.mean_norms.tolist(),
        "cosines": dict(result.cosines),
        "halves": {name: values for name, values in result.halves.items() if values},
        "histograms": {name: asdict(h) for name, h in result.histograms.items()},
    }


def _curve(intervals: Sequence[Interval]) -> dict[str, list[float]]:
    return {
        "auc": [interval.mean for interval in intervals],
        "low": [interval.low for interval in intervals],
        "high": [interval.high for interval in intervals],
    }


def _shown(interval: Interval) -> str:
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
