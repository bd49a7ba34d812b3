"""Measure this machine. `python -m jobs.bench engine --preset tiny` runs anywhere in minutes.

engine: plain vLLM against the steered engine (idle, all layers steered, adaptive, many vectors in
one batch, stacked vectors, publish latency), random weights, one picture each. Writes results.json
and table.md, and prints the table.

extract: activation extraction as a share of the matrix-product rate of the same run, against one
image at a time, and one worker against several.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from spo.errors import SpoError


def main(arguments: list[str] | None = None) -> None:
    """Parse, then run the chosen benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    engine = kinds.add_parser("engine", help="throughput of the steered engine")
    engine.add_argument(
        "--preset", default="tiny", choices=("tiny", "tiny-tp2", "h200", "h200-tp2")
    )
    engine.add_argument(
        "--engines", help="comma-separated: plain, and the operator's forms kernel, traced"
    )
    engine.add_argument("--output", type=Path, default=Path("runs/bench-engine"))
    engine.add_argument("--time-limit", type=float, default=480.0, metavar="SECONDS")
    engine.add_argument("--repeats", type=int, default=1)
    learner = kinds.add_parser("learner", help="the learner's step, and one device for all")
    learner.add_argument("--preset", default="tiny", choices=("tiny", "h200"))
    learner.add_argument("--output", type=Path, default=Path("runs/bench-learner"))
    learner.add_argument("--time-limit", type=float, default=300.0, metavar="SECONDS")
    learner.add_argument("--no-loop", action="store_true", help="only the step")
    objectives = kinds.add_parser("objectives", help="all objectives of Stage II side by side")
    objectives.add_argument("--config", type=Path, metavar="FILE")
    objectives.add_argument("--seeds", type=int, default=3)
    objectives.add_argument("overrides", nargs="*", metavar="key.sub=value")
    extraction = kinds.add_parser("extract", help="throughput of activation extraction")
    extraction.add_argument("--preset", default="tiny", choices=("tiny", "h200"))
    extraction.add_argument("--output", type=Path, default=Path("runs/bench-extract"))
    extraction.add_argument("--time-limit", type=float, default=420.0, metavar="SECONDS")
    extraction.add_argument(
        "--gpus", type=int, default=1, help="compare 1 .. this many cards (tiny: CPU workers)"
    )
    chosen = parser.parse_args(arguments)
    if chosen.kind == "learner":
        _learner(chosen)
        return
    if chosen.kind == "objectives":
        _objectives(chosen)
        return
    if chosen.kind == "extract":
        _extract(chosen)
        return

    from spo.engines.vllm_plugin.bench import run

    try:
        result = run(
            chosen.preset,
            chosen.output,
            time_limit=chosen.time_limit,
            repeats=chosen.repeats,
            engines=chosen.engines.split(",") if chosen.engines else None,
        )
    except SpoError as error:
        print(f"error: {error}; engine logs are in {chosen.output}", file=sys.stderr)
        sys.exit(1)
    print(result.table())
    print(f"written: {chosen.output / 'results.json'}")


def _learner(chosen: argparse.Namespace) -> None:
    from spo.learner_bench import run

    limit, loop = chosen.time_limit, not chosen.no_loop
    print(run(chosen.preset, chosen.output, time_limit=limit, loop=loop))


def _objectives(chosen: argparse.Namespace) -> None:
    from jobs import command
    from spo.config import load_config
    from spo.objective_table import compare
    from spo.progress import ConsoleReporter

    config = load_config(chosen.config, chosen.overrides)
    with command.cluster(config):
        path = compare(config, ConsoleReporter(), seeds=chosen.seeds)
    print(path.read_text())


def _extract(chosen: argparse.Namespace) -> None:
    from spo.stages.bench_extract import run

    result = run(chosen.preset, chosen.output, time_limit=chosen.time_limit, gpus=chosen.gpus)
    print(result.table())
    print(f"written: {chosen.output / 'results.json'}")


if __name__ == "__main__":
    main()
