"""Stage I, second half: the adaptive, layer-specific vector from extracted activations.

python -m jobs.estimate --config tune_configs/testbed.yaml [--leave-one-out]
"""

from __future__ import annotations

import argparse

from jobs import command
from spo.config import RunConfig


def _run(arguments: argparse.Namespace, config: RunConfig) -> None:
    from spo.pipeline import prepare
    from spo.progress import ConsoleReporter
    from spo.report import write_report
    from spo.stage1.job import STAGE1, run_estimate, run_leave_one_out

    prepare(config)
    reporter = ConsoleReporter()
    run_estimate(config, reporter)
    if arguments.leave_one_out:
        print(run_leave_one_out(config, reporter))
    print(f"vector: {config.run_dir / STAGE1}\nreport: {write_report(config.run_dir)}")


if __name__ == "__main__":
    made = command.parser(__doc__ or "")
    made.add_argument(
        "--leave-one-out",
        action="store_true",
        help="also test the others' directions on each source that they never saw",
    )
    command.main(made, _run)
