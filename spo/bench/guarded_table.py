"""Tables of `spo.bench.guarded` from what its steps wrote, and the artifacts that are released.

`python -m spo.bench.guarded_table DIR` prints the validation fronts and the held-out table;
`--release OUT` writes the chosen vectors as artifacts with these figures in their manifests.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spo.algorithms.metrics import bootstrap_interval, paired_interval
from spo.artifact import SteeringArtifact
from spo.bench.guarded import DEFENCES
from spo.bench.guarded_steps import choose, over_refusal, worst_attack
from spo.errors import DataError
from spo.records import Interval
from spo.vector import SteeringVector

_SAMPLES = 2000
RELEASES = {"spo": ("spo-adaptive", 0), "stage1": ("stage1-adaptive", 0), "astra": ("astra", 0)}
"""Released name -> (defence, seed)."""
_Row = Mapping[str, Any]


def heldout_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """What was measured on held-out prompts, by `DEFENCE-SEED`.

    Raises:
        DataError: nothing was, or not the unsteered model.
    """
    rows = {}
    for path in sorted(folder.glob("heldout-*.json")):
        row = json.loads(path.read_text())
        counts = {kind: len(marks) for kind, marks in row["marks"].items()}
        rows[f"{row['defence']}-{row['seed']}"] = {**row, "prompts": counts}
    if "none-0" not in rows:
        raise DataError(
            f"{folder} has no held-out measurement of the unsteered model; run the step `heldout` "
            "with --defences none first"
        )
    return rows


def units(row: _Row, kind: str) -> dict[str, list[float]]:
    """Marks of one prompt set by prompt."""
    return {str(i): [mark] for i, mark in enumerate(row["marks"][kind])}


def front_table(folder: Path) -> str:
    """Every strength of every defence on validation, as Markdown; the chosen one is marked."""
    chosen = choose(folder)
    lines = [
        "| defence | strength | worst attack | over-refusal | sight | NLL of given text |",
        "|---|---|---|---|---|---|",
    ]
    for line in (folder / "front.jsonl").read_text().splitlines():
        row = json.loads(line)
        name = f"{row['defence']}-{row['seed']}"
        mark = " *" if chosen[name]["strength"] == row["strength"] else ""
        lines.append(
            f"| {name}{mark} | {row['strength']:g} | {worst_attack(row['shares']):.3f} | "
            f"{over_refusal(row):.3f} | {row['shares']['caption']:.3f} | {row['nll_text']:.3f} |"
        )
    return "\n".join(lines)


def heldout_table(folder: Path) -> str:
    """Prompt sets by defence with intervals over prompts, as Markdown."""
    rows = heldout_rows(folder)

    def line(name: str, cells: Iterable[str]) -> str:
        return f"| {name} | " + " | ".join(cells) + " |"

    lines = [
        line("", (f"{name} @ {row['strength']:g}" for name, row in rows.items())),
        "|---" * (len(rows) + 1) + "|",
        line("worst attack", (f"{worst_attack(row['shares']):.3f}" for row in rows.values())),
        line("over-refusal", (f"{over_refusal(row):.3f}" for row in rows.values())),
    ]
    for kind, marks in rows["none-0"]["marks"].items():
        found = (
            bootstrap_interval(units(row, kind), samples=_SAMPLES, seed=0) for row in rows.values()
        )
        lines.append(line(f"{kind} ({len(marks)})", map(_shown, found)))
    lines.append(line("NLL of given text", (f"{row['nll_text']:.3f}" for row in rows.values())))
    return "\n".join(lines)


def differences(folder: Path, mine: str, other: str) -> dict[str, Interval]:
    """Paired differences of two defences by prompt set, and over all attacked pictures together."""
    rows = heldout_rows(folder)
    one, two = rows[mine], rows[other]
    found = {
        kind: paired_interval(units(one, kind), units(two, kind), samples=_SAMPLES, seed=0)
        for kind in one["marks"]
        if kind in two["marks"]
    }
    pictures = [kind for kind in found if kind.startswith("pgd-")]
    joined = [
        {
            str(i): [row["marks"][kind][i] for kind in pictures]
            for i in range(len(row["marks"][pictures[0]]))
        }
        for row in (one, two)
    ]
    found["all pictures"] = paired_interval(*joined, samples=_SAMPLES, seed=0)
    return found


def release(folder: Path, out: Path) -> list[Path]:
    """Write the released artifacts; each manifest holds its validation and held-out shares."""
    chosen, rows = choose(folder), heldout_rows(folder)
    made = []
    for name, (defence, seed) in RELEASES.items():
        settings, key = DEFENCES[defence], f"{defence}-{seed}"
        vector = SteeringVector.from_bytes(
            (folder / "vectors" / f"{settings.vector}-{seed}.safetensors").read_bytes()
        )
        evaluation = {
            "unsteered": {
                "heldout": rows["none-0"]["shares"],
                "nll_text": rows["none-0"]["nll_text"],
            },
            "validation": {k: chosen[key][k] for k in ("shares", "nll_text", "within_budget")},
        }
        if key in rows:
            evaluation["heldout"] = {k: rows[key][k] for k in ("shares", "nll_text")}
        artifact = SteeringArtifact(
            vector=vector.select(settings.layers),
            operator=settings.operator,
            coefficient=chosen[key]["strength"],
            positions=settings.positions,
            method=f"{defence}, seed {seed}, spo.bench.guarded",
            evaluation=evaluation,
        )
        made.append(artifact.save(out / name))
    return made


def _shown(interval: Interval) -> str:
    return f"{interval.mean:.3f} [{interval.low:.2f}, {interval.high:.2f}]"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m spo.bench.guarded_table", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--versus", nargs=2, metavar=("MINE", "OTHER"))
    parser.add_argument("--release", type=Path, metavar="OUT")
    arguments = parser.parse_args(argv)
    lines = [front_table(arguments.folder), "", heldout_table(arguments.folder)]
    if arguments.versus:
        lines.append("")
        for kind, found in differences(arguments.folder, *arguments.versus).items():
            lines.append(f"{kind}: {found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]")
    if arguments.release:
        lines += [f"written: {path}" for path in release(arguments.folder, arguments.release)]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
