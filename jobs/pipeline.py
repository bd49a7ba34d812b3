"""Everything, end to end: extract, estimate, refine, evaluate, report.

python -m jobs.pipeline --config tune_configs/testbed.yaml
"""

from __future__ import annotations

import argparse

from jobs import command
from spo.config import RunConfig


def _run(_: argparse.Namespace, config: RunConfig) -> None:
    from spo.pipeline import check_inputs, prepare, run
    from spo.progress import ConsoleReporter

    prepare(config)
    check_inputs(config)
    with command.cluster(config, ("extract", "train", "evaluate")):
        path = run(config, ConsoleReporter())
    print(f"report: {path}")


if __name__ == "__main__":
    command.main(command.parser(__doc__ or ""), _run)
