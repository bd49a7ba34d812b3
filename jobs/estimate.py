"""Stage I, second half: the adaptive, layer-specific vector from extracted activations.

python -m jobs.estimate --config tune_configs/testbed.yaml
"""

from __future__ import annotations

import argparse

from jobs import command
from spo.config import RunConfig


def _run(_: argparse.Namespace, config: RunConfig) -> None:
    from spo.pipeline import STAGE1, prepare, run_estimate
    from spo.progress import ConsoleReporter
    from spo.report import write_report

    prepare(config)
    run_estimate(config, ConsoleReporter())
    print(f"vector: {config.run_dir / STAGE1}\nreport: {write_report(config.run_dir)}")


if __name__ == "__main__":
    command.main(command.parser(__doc__ or ""), _run)
