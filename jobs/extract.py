"""Stage I, first half: read pooled activations of every contrast with Ray Data.

python -m jobs.extract --config tune_configs/testbed.yaml
"""

from __future__ import annotations

import argparse

from jobs import command
from spo.config import RunConfig


def _run(_: argparse.Namespace, config: RunConfig) -> None:
    from spo.pipeline import prepare
    from spo.progress import ConsoleReporter
    from spo.resolve import open_corpus
    from spo.stage1.job import run_extract
    from spo.stage1.sources import check_sources

    prepare(config)
    check_sources(open_corpus(config.corpus), config.extract)
    with command.cluster(config, ("extract",)):
        folder = run_extract(config, ConsoleReporter())
    print(f"activations: {folder}")


if __name__ == "__main__":
    command.main(command.parser(__doc__ or ""), _run)
