"""Search layers, coefficients, operators and training settings over one shared engine pool.

    python -m jobs.sweep --config tune_configs/sweep_layers.yaml [--dashboard] [--resume]
    python -m jobs.sweep best --objective toxicity --out my-vector --config FILE
    python -m jobs.sweep dashboard --config FILE     # also while the sweep runs
    python -m jobs.sweep report --config FILE

FILE is a sweep file; overrides change the sweep (search.trials=100) or its base configuration
(learn.steps=8). `--resume` continues a killed sweep and, with more search.trials, extends a
finished one. Instead of --config, `output_dir=DIR name=NAME` names a sweep that is there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import command
from spo.session import connect

if TYPE_CHECKING:
    from spo.config import RunConfig
    from spo.sweep.dashboards import Board
    from spo.sweep.settings import SweepConfig

VERBS = ("run", "best", "dashboard", "report")


def main(arguments: list[str] | None = None) -> None:
    """Parse, validate, then the chosen verb; errors meant for people come without a traceback."""
    given = sys.argv[1:] if arguments is None else arguments
    verb = given.pop(0) if given and given[0] in VERBS else "run"
    parser = command.parser(__doc__ or "")
    parser.add_argument("--resume", action="store_true", help="continue or extend a sweep")
    parser.add_argument(
        "--dashboard",
        action="store_true",
        help="serve Optuna's dashboard and TensorBoard; alone on a finished or running sweep",
    )
    parser.add_argument("--objective", default="", help="best: metric to be best in")
    parser.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="METRIC=VALUE",
        help="best: bound of another metric; without any, none may be worse than the base",
    )
    parser.add_argument("--trial", type=int, help="best: this trial instead of a search for one")
    parser.add_argument("--out", type=Path, metavar="DIR", help="best: folder to write")
    chosen = parser.parse_intermixed_args(given)
    with command.errors_for_people():
        sweep, base = _load(chosen)
        if chosen.dry_run:
            print(sweep.to_yaml() + "---\n" + base.to_yaml(), end="")
            return
        {"run": _run, "best": _best, "dashboard": _dashboard, "report": _report}[verb](
            chosen, sweep, base
        )


def _load(chosen: argparse.Namespace) -> tuple[SweepConfig, RunConfig]:
    from spo.config import load_config
    from spo.sweep.settings import load_finished, load_sweep

    if chosen.config is None:
        where = load_config(None, chosen.overrides)
        return load_finished(where.run_dir)
    return load_sweep(chosen.config, chosen.overrides)


def _run(chosen: argparse.Namespace, sweep: SweepConfig, base: RunConfig) -> None:
    from spo.progress import ConsoleReporter
    from spo.sweep.dashboards import dashboards, links
    from spo.sweep.plan import SweepFolder
    from spo.sweep.run import check, run_sweep, started

    folder = SweepFolder(path=base.run_dir)
    if chosen.dashboard and not chosen.resume and started(folder):
        _dashboard(chosen, sweep, base)
        return
    reporter = ConsoleReporter()
    check(sweep, base)  # before Ray starts, which takes ten seconds
    with command.cluster(base):
        if not chosen.dashboard:
            print(f"report: {run_sweep(sweep, base, reporter, resume=chosen.resume)}")
            return
        with dashboards(folder) as boards:
            print(links(boards, folder, connect.ray_dashboard()), flush=True)
            print(f"report: {run_sweep(sweep, base, reporter, resume=chosen.resume)}")
            _serve(boards)


def _best(chosen: argparse.Namespace, sweep: SweepConfig, base: RunConfig) -> None:
    from spo.errors import ConfigError
    from spo.sweep.outcome import choose, export, load_outcome, numbered, parse_limits
    from spo.sweep.plan import SweepFolder
    from spo.sweep.settings import BEST_IS

    if chosen.out is None:
        raise ConfigError("name the folder to write: --out DIR")
    objective = chosen.objective or next(iter(sweep.objectives))
    if objective not in BEST_IS:
        raise ConfigError(f"--objective is one of {', '.join(BEST_IS)}, got {objective!r}")
    outcome = load_outcome(SweepFolder(path=base.run_dir), sweep, base)
    if chosen.trial is not None:
        row = numbered(outcome, chosen.trial)
    else:
        row = choose(outcome, objective, parse_limits(chosen.limit))
    artifact = export(outcome, row, chosen.out)
    print(f"trial {row.number}: {dict(row.settings)}")
    print(f"artifact: {chosen.out} (sha256 {artifact.vector.sha256[:16]})")


def _dashboard(chosen: argparse.Namespace, sweep: SweepConfig, base: RunConfig) -> None:
    from spo.sweep.dashboards import dashboards, links
    from spo.sweep.plan import SweepFolder

    folder = SweepFolder(path=base.run_dir)
    with dashboards(folder) as boards:
        print(links(boards, folder, None), flush=True)
        _serve(boards)


def _report(chosen: argparse.Namespace, sweep: SweepConfig, base: RunConfig) -> None:
    from spo.progress import ConsoleReporter
    from spo.sweep.plan import SweepFolder
    from spo.sweep.run import finish

    print(f"report: {finish(SweepFolder(path=base.run_dir), sweep, base, ConsoleReporter())}")


def _serve(boards: list[Board]) -> None:
    """Until Ctrl-C, or until a dashboard ends."""
    print("the dashboards stay open until Ctrl-C", flush=True)
    try:
        while all(board.process.poll() is None for board in boards):
            for board in boards:
                board.wait(1.0)
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
