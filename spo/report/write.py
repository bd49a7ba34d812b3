"""Puts the report together: run folder in; `report.html`, `report.json` and `plots/*.png` out."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from spo.errors import ArtifactError, StageError
from spo.files import write_atomic
from spo.report.answers import CHOICE, VEIL_FROM, attack_pictures, card_groups, png_address
from spo.report.figures import Plot, draw_plots
from spo.report.headline import findings, machine_readable, tables, tiles
from spo.report.matrix import MATRIX_PLOTS
from spo.report.run_record import QuarantineEntry, RunRecord, Separability, Step, read_run
from spo.report.stage1_section import (
    DESCRIPTION,
    TITLE,
    draw_projections,
    left_out_rows,
    source_rows,
)
from spo.report.text import visible

_SHOWN_QUARANTINE = 200


def write_report(run_dir: Path) -> Path:
    """Write the report of a finished or partial run.

    Args:
        run_dir: folder of the run. Each input may be missing; its section then says so.

    Returns:
        Path of `report.html`: one file with everything inside, no request to anywhere.

    Raises:
        DataError: there is no such folder.
        StageError: the folder cannot be written to.
    """
    record = read_run(run_dir)
    projections = (TITLE, DESCRIPTION, draw_projections)
    plots = draw_plots(record, {**MATRIX_PLOTS, "projections": projections})
    page = _page(record, plots)
    try:
        (run_dir / "plots").mkdir(exist_ok=True)
        for plot in plots.values():
            (run_dir / "plots" / f"{plot.name}.png").write_bytes(plot.light)
        _replace(run_dir / "report.json", json.dumps(_summary(record, plots), indent=1))
        return _replace(run_dir / "report.html", page)
    except (OSError, ArtifactError) as error:
        raise StageError(
            f"cannot write the report to {run_dir}: {error}; free space or make it writable"
        ) from error


def _replace(path: Path, text: str) -> Path:
    write_atomic(path, text.encode())
    return path


def _sound(value: Any) -> Any:
    """Every value that the template prints passes here, before it is escaped."""
    return type(value)(visible(value)) if isinstance(value, str) else value


def _page(record: RunRecord, plots: Mapping[str, Plot]) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        finalize=_sound,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    report = record.evaluation
    attack = record.attack
    return environment.get_template("template.html").render(
        name=record.name,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        missing=record.missing,
        judge=report.judge if report else "",
        tiles=tiles(report) if report else [],
        sentences=findings(report) if report else [],
        tables=tables(report) if report else [],
        groups=card_groups(report, record.folder) if report else [],
        choice=CHOICE,
        veil_from=VEIL_FROM,
        plots={name: _addresses(plot) for name, plot in plots.items()},
        training=_training_facts(record.history),
        separability=record.separability,
        layers=_chosen_layers(record.separability),
        contrast_sources=source_rows(record.separability),
        left_out=left_out_rows(record.left_out),
        attack=attack,
        attack_pictures=(
            attack_pictures(attack.clean, attack.attacked, record.folder) if attack else None
        ),
        config_text=record.config_text,
        environment=list(_flat(record.environment)),
        quarantined=record.quarantined[:_SHOWN_QUARANTINE],
        quarantine_count=len(record.quarantined),
        reasons=_reasons(record.quarantined),
        dropped=_dropped(record.history),
    )


def _addresses(plot: Plot) -> dict[str, str]:
    return {
        "title": plot.title,
        "description": plot.description,
        "light": png_address(plot.light),
        "dark": png_address(plot.dark),
    }


def _training_facts(history: Sequence[Step]) -> list[tuple[str, str]]:
    """Facts about Stage II that need no plot."""
    if not history:
        return []
    facts = [("Steps", str(len(history)))]
    ends = [row.reward for row in (history[0], history[-1])]
    if all(math.isfinite(reward) for reward in ends):
        facts.append(
            (
                "Mean reward, first and last step",
                f"{ends[0]:+.3f}, {ends[1]:+.3f}".replace("-", "−"),
            )
        )
    names = dict.fromkeys(name for row in history for name in row.seconds)
    for name in names:
        seconds = [
            row.seconds[name] for row in history if math.isfinite(row.seconds.get(name, math.nan))
        ]
        if seconds:
            facts.append((f"Median time of a step: {name}", f"{np.median(seconds):.1f} s"))
    return facts


def _chosen_layers(found: Separability | None) -> list[tuple[int, str, str]]:
    """(block, weight, held-out AUC) of every steered block."""
    if found is None:
        return []
    weights = found.weights if len(found.weights) == len(found.chosen) else []
    auc = dict(zip(found.layers, found.combined.auc, strict=True))
    return [
        (
            layer,
            f"{weights[i]:.2f}" if weights else "–",
            f"{auc[layer]:.3f}" if layer in auc else "–",
        )
        for i, layer in enumerate(found.chosen)
    ]


def _dropped(history: Sequence[Step]) -> list[tuple[str, int]]:
    counts: Counter[str] = Counter()
    for row in history:
        counts.update(row.dropped)
    return counts.most_common()


def _reasons(entries: Sequence[QuarantineEntry]) -> list[tuple[str, int]]:
    return Counter(entry.place for entry in entries).most_common()


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as (name, value) rows."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name} / ")
        elif isinstance(value, float):
            yield name, f"{value:.4g}"
        else:
            yield name, str(value)


def _summary(record: RunRecord, plots: Mapping[str, Plot]) -> dict[str, Any]:
    """Content of report.json."""
    history = record.history
    rewards = [row.reward for row in history if math.isfinite(row.reward)]
    return {
        "format": "spo-report/1",
        "run": visible(record.name),
        "evaluation": machine_readable(record.evaluation) if record.evaluation else None,
        "training": {
            "steps": len(history),
            "first_reward": rewards[0] if rewards else None,
            "last_reward": rewards[-1] if rewards else None,
            "dropped": dict(_dropped(history)),
        },
        "layers": list(record.separability.chosen) if record.separability else None,
        "quarantined": len(record.quarantined),
        "plots": [f"plots/{name}.png" for name in plots],
        "missing": dict(record.missing),
    }
