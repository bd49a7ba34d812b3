"""What the engine benchmark saw, and its tables."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One thing to measure."""

    engine: str
    """"plain", or the form of the operator: "kernel" or "traced"."""
    batch: int
    steering: str
    """none (plain), idle, add, adaptive, pairs (every request its own vector and coefficient),
    stacked (as many vectors a request as the engine has lanes)."""

    @property
    def name(self) -> str:
        """Column of the table."""
        return "plain vLLM" if self.engine == "plain" else f"{self.engine}: {self.steering}"

    def to_wire(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One timed run."""

    model: str
    workload: Workload
    turn: str
    """Runs of one turn were made right after each other."""
    seconds: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all requests, prompts and pictures included in the time."""
        return self.tokens / self.seconds


@dataclass(slots=True, kw_only=True)
class BenchResult:
    """Everything that was seen."""

    preset: str
    facts: dict[str, Any] = field(default_factory=dict)
    measures: list[Measure] = field(default_factory=list)
    ranks: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """By model and steering: how far several tensor-parallel ranks are from one."""
    failures: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """results.json and table.md."""
        (folder / "results.json").write_text(json.dumps(asdict(self), indent=1))
        (folder / "table.md").write_text(self.table() + "\n")

    def compare_ranks(
        self, shape: str, one: Mapping[str, list[float]], several: Mapping[str, list[float]]
    ) -> None:
        """Log-probabilities of the same tokens under the same steering, one rank and several."""
        plain = one["none"]
        self.ranks[shape] = {
            name: {
                "largest gap": max(abs(a - b) for a, b in zip(one[name], values, strict=True)),
                "mean gap": sum(abs(a - b) for a, b in zip(one[name], values, strict=True))
                / len(values),
                "mean effect of steering": sum(
                    abs(a - b) for a, b in zip(one[name], plain, strict=True)
                )
                / len(values),
            }
            for name, values in several.items()
        }

    def shares(self) -> dict[tuple[str, int, str], list[float]]:
        """Tokens/s over plain vLLM's of the same turn, by model, batch and workload."""
        speed = {
            (m.model, m.workload.batch, m.turn, m.workload.name): m.tokens_per_second
            for m in self.measures
        }
        shares: dict[tuple[str, int, str], list[float]] = defaultdict(list)
        for (model, batch, turn, name), value in speed.items():
            plain = speed.get((model, batch, turn, "plain vLLM"))
            if plain is not None and name != "plain vLLM":
                shares[model, batch, name].append(value / plain)
        return shares

    def table(self) -> str:
        """Median share of plain vLLM's speed in the same turn, least and most, number of turns."""
        shares = self.shares()
        names = list(dict.fromkeys(name for _, _, name in shares))
        lines = [
            "| model | batch | plain, tokens/s | " + " | ".join(names) + " |",
            "|---" * (3 + len(names)) + "|",
        ]
        for model, batch in dict.fromkeys((m.model, m.workload.batch) for m in self.measures):
            plain = [
                m.tokens_per_second
                for m in self.measures
                if (m.model, m.workload.batch, m.workload.engine) == (model, batch, "plain")
            ]
            cells = [f"{median(plain):,.0f}" if plain else "?"]
            cells += [_cell(shares.get((model, batch, name), [])) for name in names]
            lines.append(f"| {model} | {batch} | " + " | ".join(cells) + " |")
        for model, rows in self.ranks.items():
            lines += ["", f"{model}, log-probability of a token, several ranks against one:"]
            lines += [f"* {name}: {_figures(row)}" for name, row in rows.items()]
        lines += ["", *(f"FAILED {failure}" for failure in self.failures)]
        return "\n".join(lines).rstrip()


def _cell(shares: list[float]) -> str:
    if not shares:
        return ""
    middle = f"{median(shares):.1%}"
    return f"{middle} [{min(shares):.1%}, {max(shares):.1%}] n={len(shares)}"


def _figures(row: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2g}" for name, value in row.items())
