"""Evaluate the vectors of a run on held-out prompts, plain and under the picture attack.

python -m jobs.evaluate --config tune_configs/testbed.yaml evaluate.harm_prompts=200
"""

from __future__ import annotations

import argparse

from jobs import command
from spo.config import RunConfig


def _run(_: argparse.Namespace, config: RunConfig) -> None:
    from spo.pipeline import prepare, run_evaluate
    from spo.progress import ConsoleReporter
    from spo.refine import Pools
    from spo.report import write_report

    prepare(config)
    reporter = ConsoleReporter()
    with command.cluster(config, ("evaluate",)), Pools(config, reporter) as pools:
        run_evaluate(config, reporter, pools)
    print(f"report: {write_report(config.run_dir)}")


if __name__ == "__main__":
    command.main(command.parser(__doc__ or ""), _run)
