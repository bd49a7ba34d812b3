"""Stage II: refine the Stage I vector by sequence-level preference optimisation.

The same command continues an interrupted run at its last checkpoint, and leaves a finished one.

    python -m jobs.train --config tune_configs/testbed.yaml learn.objective=dpo

The baseline "BiPO on static pairs", beside the run's own vector:

    python -m jobs.train --config tune_configs/testbed.yaml learn.objective=bipo \
        rollout.static=true learn.artifact=bipo

Without the attacker in the loop, for comparison; and another round on the first one's vector:

    python -m jobs.train --config tune_configs/testbed.yaml data.attacks=[] \
        data.typographic_fraction=0 learn.artifact=spo-unattacked
    python -m jobs.train --config tune_configs/testbed.yaml learn.start=spo learn.artifact=spo-2
"""

from __future__ import annotations

import argparse

from jobs import command
from spo.config import RunConfig


def _run(_: argparse.Namespace, config: RunConfig) -> None:
    from spo.pipeline import open_pools, prepare
    from spo.progress import ConsoleReporter
    from spo.stage2.job import run_train, trained

    prepare(config)
    reporter = ConsoleReporter()
    if trained(config) is None:
        with command.cluster(config, ("train",)), open_pools(config, reporter) as pools:
            run_train(config, reporter, pools)
    else:
        reporter.stage("Finished before: nothing to do")
    print(f"vector: {config.run_dir / config.learn.artifact}")


if __name__ == "__main__":
    command.main(command.parser(__doc__ or ""), _run)
