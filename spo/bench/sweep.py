"""Trials per hour of one sweep over a shared pool, and with an engine for each trial."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from spo.config import RunConfig
from spo.files import write_atomic
from spo.progress import Reporter
from spo.sweep.outcome import load_outcome
from spo.sweep.plan import SweepFolder
from spo.sweep.run import run_sweep
from spo.sweep.settings import SweepConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """One mode's figures."""

    mode: str
    trials: int
    """Whole trials, the base setting included."""
    seconds: float
    """The whole sweep: extraction where the space needs one, engine start, search."""

    @property
    def per_hour(self) -> float:
        """Trials per hour."""
        return 3600.0 * self.trials / self.seconds


def compare_pools(
    config: SweepConfig,
    base: RunConfig,
    reporter: Reporter,
    *,
    shared_trials: int,
    isolated_trials: int,
) -> list[Speed]:
    """Run the same space in both modes on the same cluster; Ray must be connected.

    The shared pool's start counts in its time, so its rate grows with the number of trials; an
    isolated trial starts engine and reward models each time. With a `vector` neither mode extracts.
    Results go to `bench.json` in the base's output folder as they come.
    """
    speeds: list[Speed] = []
    for mode, trials in (("shared", shared_trials), ("isolated", isolated_trials)):
        name = f"{config.name}-{mode}"
        search = config.search.model_copy(update={"trials": trials, "concurrent": 1})
        pool = config.pool.model_copy(update={"mode": mode})
        changes = {"name": name, "search": search, "pool": pool, "compare": False}
        sweep, run = config.model_copy(update=changes), base.model_copy(update={"name": name})
        begin = time.monotonic()
        run_sweep(sweep, run, reporter, resume=False)
        seconds = time.monotonic() - begin
        done = len(load_outcome(SweepFolder(path=run.run_dir), sweep, run).whole) + 1
        speeds.append(Speed(mode=mode, trials=done, seconds=seconds))
        content = [asdict(speed) | {"per_hour": speed.per_hour} for speed in speeds]
        write_atomic(Path(base.run_dir).parent / "bench.json", json.dumps(content).encode())
    return speeds


def table(speeds: list[Speed]) -> str:
    """Markdown."""
    lines = ["| pool | trials | seconds | trials per hour |", "|---|---|---|---|"]
    lines += [f"| {s.mode} | {s.trials} | {s.seconds:.0f} | {s.per_hour:.1f} |" for s in speeds]
    return "\n".join(lines)
