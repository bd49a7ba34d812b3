"""Measure this machine. `python -m jobs.bench engine --preset tiny` runs anywhere in minutes.

engine: plain vLLM against the steered engine (idle, all layers steered, adaptive, many vectors in
one batch, stacked vectors, publish latency), random weights, one picture each. Writes results.json
and table.md, and prints the table.

sweep: trials per hour of a sweep file over one shared pool, and with an engine for each trial.

extract: activation extraction as a share of the matrix-product rate of the same run, against one
image at a time, and one worker against several.

serving: the endpoint against vLLM's own server, 64 clients, then vectors swapped and the engine
killed under load. `--preset testbed` takes the embedded model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from spo.errors import SpoError


def main(arguments: list[str] | None = None) -> None:
    """Parse, then run the chosen benchmark."""
    chosen = _parser().parse_args(arguments)
    kinds = {
        "engine": _engine,
        "learner": _learner,
        "objectives": _objectives,
        "extract": _extract,
        "sweep": _sweep,
        "serving": _serving,
    }
    kinds[chosen.kind](chosen)


def _parser() -> argparse.ArgumentParser:
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
    engine.add_argument("--batches", help="comma-separated: how many requests at once")
    engine.add_argument("--output", type=Path, default=Path("runs/bench-engine"))
    engine.add_argument("--time-limit", type=float, default=480.0, metavar="SECONDS")
    engine.add_argument("--repeats", type=int, default=1)
    learner = kinds.add_parser("learner", help="the learner's step, and one device for all")
    learner.add_argument("--preset", default="tiny", choices=("tiny", "h200"))
    learner.add_argument("--output", type=Path, default=Path("runs/bench-learner"))
    learner.add_argument("--time-limit", type=float, default=300.0, metavar="SECONDS")
    learner.add_argument(
        "--gpus", type=int, default=1, choices=(1, 2), help="2: engine and learner on a card each"
    )
    learner.add_argument("--tokens", type=int, help="length of an answer")
    learner.add_argument("--micro", type=int, help="answers computed together")
    learner.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="compile the decoder blocks"
    )
    learner.add_argument("--only", choices=("step", "loop"), help="leave the other one out")
    objectives = kinds.add_parser("objectives", help="all objectives of Stage II side by side")
    objectives.add_argument("--config", type=Path, metavar="FILE")
    objectives.add_argument("--seeds", type=int, default=3)
    objectives.add_argument("overrides", nargs="*", metavar="key.sub=value")
    sweep = kinds.add_parser("sweep", help="shared pool against an engine for each trial")
    sweep.add_argument("--config", type=Path, required=True, metavar="FILE", help="sweep file")
    sweep.add_argument("--shared", type=int, default=8, metavar="TRIALS")
    sweep.add_argument("--isolated", type=int, default=2, metavar="TRIALS")
    sweep.add_argument("overrides", nargs="*", metavar="key.sub=value")
    extraction = kinds.add_parser("extract", help="throughput of activation extraction")
    extraction.add_argument("--preset", default="tiny", choices=("tiny", "h200"))
    extraction.add_argument("--output", type=Path, default=Path("runs/bench-extract"))
    extraction.add_argument("--time-limit", type=float, default=420.0, metavar="SECONDS")
    extraction.add_argument(
        "--gpus", type=int, default=1, help="compare 1 .. this many cards (tiny: CPU workers)"
    )
    serving = kinds.add_parser("serving", help="the endpoint against vLLM's own server")
    serving.add_argument("--preset", default="tiny", choices=("tiny", "testbed", "h200"))
    serving.add_argument("--output", type=Path, default=Path("runs/bench-serving"))
    serving.add_argument("--time-limit", type=float, default=900.0, metavar="SECONDS")
    serving.add_argument("--seconds", type=float, help="length of each phase")
    serving.add_argument("--swaps", type=int, default=50)
    serving.add_argument("--soak", type=float, default=0.0, metavar="SECONDS", help="a long phase")
    serving.add_argument("--no-kill", action="store_true", help="do not kill the engine")
    return parser


def _engine(chosen: argparse.Namespace) -> None:
    from spo.bench.engine import run

    try:
        result = run(
            chosen.preset,
            chosen.output,
            time_limit=chosen.time_limit,
            repeats=chosen.repeats,
            engines=chosen.engines.split(",") if chosen.engines else None,
            batches=[int(n) for n in chosen.batches.split(",")] if chosen.batches else None,
        )
    except SpoError as error:
        print(f"error: {error}; engine logs are in {chosen.output}", file=sys.stderr)
        sys.exit(1)
    print(result.table())
    print(f"written: {chosen.output / 'results.json'}")


def _learner(chosen: argparse.Namespace) -> None:
    from spo.bench.learner import run

    print(
        run(
            chosen.preset,
            chosen.output,
            time_limit=chosen.time_limit,
            only=chosen.only,
            gpus=chosen.gpus,
            tokens=chosen.tokens,
            micro=chosen.micro,
            compiled=chosen.compile,
        )
    )


def _objectives(chosen: argparse.Namespace) -> None:
    from jobs import command
    from spo.bench.objectives import compare
    from spo.config import load_config
    from spo.progress import ConsoleReporter

    config = load_config(chosen.config, chosen.overrides)
    with command.cluster(config):
        path = compare(config, ConsoleReporter(), seeds=chosen.seeds)
    print(path.read_text())


def _sweep(chosen: argparse.Namespace) -> None:
    from jobs import command
    from spo.bench.sweep import compare_pools, table
    from spo.progress import ConsoleReporter
    from spo.sweep.settings import load_sweep

    with command.errors_for_people():
        sweep, base = load_sweep(chosen.config, chosen.overrides)
        with command.cluster(base):
            speeds = compare_pools(
                sweep,
                base,
                ConsoleReporter(),
                shared_trials=chosen.shared,
                isolated_trials=chosen.isolated,
            )
    print(table(speeds))


def _extract(chosen: argparse.Namespace) -> None:
    from spo.bench.extract import run

    result = run(chosen.preset, chosen.output, time_limit=chosen.time_limit, gpus=chosen.gpus)
    print(result.table())
    print(f"written: {chosen.output / 'results.json'}")


def _serving(chosen: argparse.Namespace) -> None:
    from spo.bench.serving import PRESETS, run

    model = None
    if not PRESETS[chosen.preset]["shape"]:  # the embedded model, with its weights
        from spo.config import RunConfig
        from spo.resolve import resolve_model

        config = RunConfig()
        model = Path(resolve_model(config.model, config.cache).path)
    try:
        result = run(
            chosen.preset,
            chosen.output,
            time_limit=chosen.time_limit,
            model=model,
            seconds=chosen.seconds,
            swaps=chosen.swaps,
            soak=chosen.soak,
            kill=not chosen.no_kill,
        )
    except SpoError as error:
        print(f"error: {error}; logs are in {chosen.output}", file=sys.stderr)
        sys.exit(1)
    print(result.table())
    print(f"written: {result.path}")


if __name__ == "__main__":
    main()
