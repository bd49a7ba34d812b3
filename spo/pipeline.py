"""The order of things: extract, estimate, train, evaluate. Each also runs alone on a run folder.

Stage II (`run_train`) is in `spo.stage2.job`.
"""

from __future__ import annotations

import time
from pathlib import Path

from spo.actors.pools import Pools
from spo.config import RunConfig
from spo.errors import DataError
from spo.evaluation.job import run_evaluate
from spo.files import write_atomic
from spo.progress import Reporter
from spo.report import write_report
from spo.resolve import open_corpus, open_judge, resolve_model
from spo.run_folder import save_environment
from spo.stage1.job import run_estimate, run_extract
from spo.stage1.sources import check_sources
from spo.stage2.job import run_train


def run(config: RunConfig, reporter: Reporter) -> Path:
    """Everything, end to end; returns the report's path. Finished stages are reused.

    Ray must be connected, and the run prepared and its inputs checked.
    """
    begin = time.monotonic()
    run_extract(config, reporter)
    run_estimate(config, reporter)
    with open_pools(config, reporter) as pools:
        run_train(config, reporter, pools)
        run_evaluate(config, reporter, pools)
    save_environment(config.run_dir, config.digest, {"total_s": time.monotonic() - begin})
    path = write_report(config.run_dir)
    reporter.stage(f"Report: {path}")
    return path


def check_inputs(config: RunConfig) -> None:
    """Find bad input of every stage before anything starts."""
    corpus = open_corpus(config.corpus)
    check_sources(corpus, config.extract)
    corpus.evaluation_inputs()
    corpus.training_prompts()
    open_judge(config.evaluate)


def open_pools(config: RunConfig, reporter: Reporter, *, scoring: bool = True) -> Pools:
    """Engines and, with `scoring`, reward models of a run, as a context."""
    return Pools(
        resolve_model(config.model, config.cache),
        config.engine,
        config.reward if scoring else None,
        name=config.name,
        seed=config.seed,
        cache=config.cache,
        reporter=reporter,
    )


def prepare(config: RunConfig) -> None:
    """Make the run folder and keep the resolved configuration in it."""
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        write_atomic(config.run_dir / "config.yaml", config.to_yaml().encode())
    except OSError as error:
        raise DataError(
            f"cannot write to {config.run_dir}: {error.strerror}; set output_dir to a folder that "
            "can be written"
        ) from error
