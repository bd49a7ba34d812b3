"""The static report of a sweep: one HTML file with everything inside."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from spo.errors import DataError
from spo.evaluation import compare
from spo.files import write_atomic
from spo.records import EvaluationReport, Interval
from spo.report.answers import data_address, open_picture, png_address
from spo.report.text import visible
from spo.sweep.figures import LABELS, draw_plots
from spo.sweep.outcome import Outcome, Row, balanced, show_value
from spo.sweep.settings import BEST_IS, format_layers
from spo.sweep.validation import Measured, SampleAnswer

VEIL_FROM = 0.5
_SHOWN_ROWS = 12
_HELDOUT_METRICS = ("toxicity", "toxic", "nll", "attributes", "correct", "alignment")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A figure with its interval, as text."""

    value: str
    range: str
    verdict: str = ""
    """Against the base: "better", "worse" or ""."""


def write_page(outcome: Outcome) -> Path:
    """Write `report.html`, also of a sweep that still runs."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        finalize=lambda value: type(value)(visible(value)) if isinstance(value, str) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    chosen = balanced(outcome)
    text = environment.get_template("template.html").render(
        name=outcome.sweep.name,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        counts=_counts(outcome),
        objectives=[(name, BEST_IS[name]) for name in outcome.sweep.objectives],
        columns=[(name, LABELS[name].replace("\n", " ")) for name in BEST_IS],
        keys=list(outcome.sweep.space),
        rows=_table(outcome, chosen),
        chosen=chosen.number if chosen else None,
        chosen_settings=_settings(chosen),
        commands=_commands(outcome, chosen),
        cards=_cards(outcome, chosen),
        veil_from=VEIL_FROM,
        plots={
            name: {
                "title": plot.title,
                "description": plot.description,
                "light": png_address(plot.light),
                "dark": png_address(plot.dark),
            }
            for name, plot in draw_plots(outcome).items()
        },
        heldout=_heldout(outcome.heldout) if outcome.heldout else [],
        judge=outcome.heldout.judge if outcome.heldout else "",
        looks=_looks(outcome),
        sweep_text=outcome.sweep.to_yaml(),
    )
    write_atomic(outcome.folder.report, text.encode())
    return outcome.folder.report


def _counts(outcome: Outcome) -> str:
    states = [row.state for row in outcome.rows]
    parts = [f"{states.count('complete')} whole trials"]
    if "pruned" in states:
        parts.append(f"{states.count('pruned')} stopped early")
    if "fail" in states:
        parts.append(f"{states.count('fail')} failed or interrupted")
    return ", ".join(parts)


def _entry(interval: Interval | None, verdict: str = "") -> Entry | None:
    if interval is None:
        return None
    shown = f"[{interval.low:.3f}, {interval.high:.3f}]"
    return Entry(value=f"{interval.mean:.3f}", range=shown, verdict=verdict)


def _table(outcome: Outcome, chosen: Row | None) -> list[dict[str, Any]]:
    """Unsteered, base, the choice and the front."""
    lines: list[dict[str, Any]] = []

    def add(label: str, measured: Measured, settings: Mapping[str, Any], layers: str) -> None:
        lines.append(
            {
                "label": label,
                "settings": [show_value(settings.get(key)) for key in outcome.sweep.space],
                "layers": layers,
                "figures": [_entry(measured.metrics.get(name)) for name in BEST_IS],
            }
        )

    if outcome.unsteered is not None:
        add("unsteered", outcome.unsteered, {}, "")
    if outcome.base is not None:
        add("base", outcome.base.measured, {}, format_layers(outcome.base.layers))
    rows = outcome.front[:_SHOWN_ROWS]
    if chosen is not None:
        rows = [chosen, *(row for row in rows if row.number != chosen.number)]
    for row in rows:
        if row.result is not None:
            label = f"trial {row.number}" + (" (chosen)" if row is chosen else "")
            add(label, row.result.measured, row.settings, format_layers(row.result.layers))
    return lines


def _settings(row: Row | None) -> list[tuple[str, str]]:
    return [] if row is None else [(key, show_value(value)) for key, value in row.settings.items()]


def _commands(outcome: Outcome, chosen: Row | None) -> list[tuple[str, str]]:
    """What trains, evaluates and exports the chosen setting."""
    if chosen is None or chosen.result is None:
        return []
    file = shlex.quote(str(outcome.folder.trial(chosen.result.digest) / "config.yaml"))
    name = shlex.quote(f"{outcome.sweep.name}-trial-{chosen.number}")
    setting = f"--config {file} name={name}"
    there = shlex.quote(f"output_dir={outcome.base_config.output_dir}")
    sweep = f"{there} {shlex.quote(f'name={outcome.sweep.name}')}"
    best = f"best --objective {next(iter(outcome.sweep.objectives))} --out {name}"
    return [
        ("Train, evaluate and report it", f"python -m jobs.pipeline {setting}"),
        ("Release what that made", f"python -m jobs.export {setting} --out {name}"),
        ("Export this trial's vector as it is", f"python -m jobs.sweep {best} {sweep}"),
    ]


def _cards(outcome: Outcome, chosen: Row | None) -> list[dict[str, Any]]:
    """The same prompts under several settings, side by side."""
    shown: list[tuple[str, str, Measured]] = []
    if outcome.unsteered is not None:
        shown.append(("Unsteered", "none", outcome.unsteered))
    if outcome.base is not None:
        shown.append(("Base", "base", outcome.base.measured))
    rows = [chosen] if chosen is not None else []
    rows += [row for row in outcome.front if row is not chosen]
    for row in rows[:3]:
        if row.result is not None:
            label = f"Trial {row.number}" + (" (chosen)" if row is chosen else "")
            shown.append((label, "trial", row.result.measured))
    if not shown:
        return []
    cards: list[dict[str, Any]] = []
    for prompt in shown[0][2].answers:
        answers = []
        for label, kind, measured in shown:
            found = [a for a in measured.answers if a.prompt_id == prompt.prompt_id]
            if found:
                answers.append({"label": label, "kind": kind, **_answer(found[0])})
        picture = open_picture(prompt.image, outcome.folder.path) if prompt.image else None
        cards.append(
            {
                "kind": "Harmful" if prompt.kind == "harm" else "Benign",
                "prompt": prompt.prompt,
                "picture": data_address(picture, 220) if picture is not None else None,
                "answers": answers,
            }
        )
    return cards


def _answer(answer: SampleAnswer) -> dict[str, Any]:
    return {
        "text": answer.answer or "(nothing)",
        "toxicity": f"{answer.toxicity:.2f}",
        "veiled": answer.toxicity >= VEIL_FROM,
    }


def _heldout(report: EvaluationReport) -> list[dict[str, Any]]:
    """One table for each condition: metrics by defence, and the paired difference found - base."""
    tables: list[dict[str, Any]] = []
    for condition in dict.fromkeys(cell.condition for cell in report.cells):
        cells = {c.defence: c.metrics for c in report.cells if c.condition == condition}
        lines = []
        for metric in _HELDOUT_METRICS:
            if metric not in cells.get("found", {}):
                continue
            try:
                change = compare(report, condition, metric, defence="found", baseline="base")
            except DataError:
                continue
            lines.append(
                {
                    "metric": metric,
                    "figures": [
                        _entry(cells.get(name, {}).get(metric))
                        for name in ("none", "base", "found")
                    ],
                    "change": f"{change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}]",
                    "sure": change.low > 0 or change.high < 0,
                }
            )
        if lines:
            tables.append({"condition": condition, "lines": lines})
    return tables


def _looks(outcome: Outcome) -> int:
    path = outcome.folder.path / "looks.json"
    return len(json.loads(path.read_text())) if path.is_file() else 0
