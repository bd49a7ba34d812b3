"""Measure this machine. `python -m jobs.bench engine --preset tiny` runs anywhere in minutes.

engine: plain vLLM against the steered engine (idle, all layers steered, adaptive, many vectors in
one batch, stacked vectors, publish latency), random weights, one picture each. Writes results.json
and table.md, and prints the table.
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
    chosen = parser.parse_args(arguments)

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


if __name__ == "__main__":
    main()
