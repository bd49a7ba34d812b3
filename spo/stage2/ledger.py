"""What became of every generation: consumed by a step, or not, and why. Exactly once."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path

from spo.errors import StageError
from spo.records import QuarantinedRow


class Fate(StrEnum):
    """Why a generation reached the learner, or did not."""

    CONSUMED = "consumed"
    FILTERED = "filtered"
    """Its group carried no information."""
    TIMED_OUT = "timed_out"
    """Not there at its group's deadline."""
    QUARANTINED = "quarantined"
    """Could not be used: bad prompt, reward that failed, batch that broke the learner."""


class Ledger:
    """Fate of every request id of the steps that are not committed yet, and totals of all.

    Args:
        path: JSONL file, one line a committed step with all its ids; None keeps none.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._fates: defaultdict[int, dict[str, Fate]] = defaultdict(dict)
        self.totals: Counter[str] = Counter()
        self.quarantined: list[QuarantinedRow] = []
        """Reasons of the quarantined ids."""

    def enter(self, step: int, ids: Iterable[str], fate: Fate, reason: str = "") -> None:
        """Write down what became of some ids of a step.

        Raises:
            StageError: an id already has a fate; nothing may be counted twice.
        """
        for name in ids:
            before = self._fates[step].get(name)
            if before is not None:
                raise StageError(
                    f"generation {name!r} was {before.value} and would now be {fate.value}: "
                    "every generation counts once. This is a defect of the coordinator"
                )
            self._fates[step][name] = fate
            if fate is Fate.QUARANTINED:
                self.quarantined.append(QuarantinedRow(row_id=name, reason=reason))

    def revoke(self, step: int, reason: str) -> None:
        """Quarantine what a step would have consumed: its batch is made anew."""
        for name, fate in self._fates[step].items():
            if fate is Fate.CONSUMED:
                self._fates[step][name] = Fate.QUARANTINED
                self.quarantined.append(QuarantinedRow(row_id=name, reason=reason))

    def counts(self, step: int) -> dict[str, int]:
        """How many ids of a step met each fate."""
        found = Counter(fate.value for fate in self._fates[step].values())
        return {fate.value: found[fate.value] for fate in Fate}

    def ids(self, step: int, fate: Fate) -> list[str]:
        """Ids of a step that is not committed yet."""
        return sorted(name for name, met in self._fates[step].items() if met is fate)

    def commit(self, step: int) -> None:
        """The learner has taken the step and kept it: write its ids down for good."""
        if step not in self._fates:
            return
        line = {"step": step} | {fate.value: self.ids(step, fate) for fate in Fate}
        self.totals.update(self.counts(step))
        del self._fates[step]
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def committed_ids(path: Path) -> list[str]:
    """Ids that a run consumed, in order; a step written again after a resume replaces its line."""
    steps: dict[int, list[str]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        steps[row["step"]] = row[Fate.CONSUMED.value]
    return [name for step in sorted(steps) for name in steps[step]]
