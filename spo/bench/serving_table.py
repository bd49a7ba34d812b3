"""Figures of the serving benchmark, kept after every phase, and their table."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True, kw_only=True)
class Result:
    """Everything that was seen; written after every phase."""

    preset: str
    path: Path
    phases: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, phase: str, row: dict[str, Any]) -> None:
        """Keep a phase's figures."""
        self.phases.setdefault(phase, []).append(row)
        content = {"preset": self.preset, "facts": self.facts, "phases": self.phases}
        self.path.write_text(json.dumps(content, indent=1))

    def table(self) -> str:
        """Medians over the rounds, and the shares of plain vLLM."""
        lines = [
            "| phase | answers | tokens/s | of plain | p50, s | of plain | p99, s | other |",
            "|---|---|---|---|---|---|---|---|",
        ]
        plain = self._mean("plain vLLM")
        for phase, rows in self.phases.items():
            mean = self._mean(phase)
            shares = ("", "")
            if plain and mean["tokens_per_second"]:
                shares = (
                    f"{mean['tokens_per_second'] / plain['tokens_per_second']:.1%}",
                    f"{mean['p50_s'] / plain['p50_s']:.3f}",
                )
            other = "; ".join(
                f"{key}={value}"
                for row in rows
                for key, value in {**row["statuses"], **row.get("checks", {})}.items()
                if key != "200"
            )
            lines.append(
                f"| {phase} | {mean['answers']:.0f} | {mean['tokens_per_second']:,.0f} | "
                f"{shares[0]} | {mean['p50_s']:.2f} | {shares[1]} | {mean['p99_s']:.2f} | {other} |"
            )
        return "\n".join(lines)

    def _mean(self, phase: str) -> dict[str, float]:
        rows = self.phases.get(phase, [])
        names = ("answers", "tokens_per_second", "p50_s", "p99_s")
        return {name: sum(row[name] for row in rows) / len(rows) for name in names} if rows else {}
