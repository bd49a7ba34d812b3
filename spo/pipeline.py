"""The order of things: extract, estimate, train, evaluate. Each also runs alone on a run folder.

Stage II (`Pools`, `run_train`) is in `spo.stage2.job`.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from spo.artifact import write_atomic
from spo.config import RunConfig
from spo.corpus.files import (
    alignment_arguments,
    evaluation_inputs,
    open_judge,
    open_success_judges,
    training_prompts,
)
from spo.errors import DataError
from spo.evaluation import CellStore, evaluate, format_table, save_report, shown_conditions
from spo.evaluation.attacked_sets import attacked_sets, open_defences, with_defences
from spo.progress import Reporter
from spo.report import write_report
from spo.run_folder import save_environment
from spo.stage1.job import run_estimate, run_extract
from spo.stage2.job import Pools, run_train

HEADLINE_METRICS = ("toxicity", "success", "nll", "attributes", "correct", "refusal", "kl")


def run(config: RunConfig, reporter: Reporter) -> Path:
    """Everything, end to end; returns the report's path. Finished stages are reused."""
    begin = time.monotonic()
    prepare(config)
    check_inputs(config)
    run_extract(config, reporter)
    run_estimate(config, reporter)
    with Pools(config, reporter) as pools:
        run_train(config, reporter, pools)
        run_evaluate(config, reporter, pools)
    save_environment(config, {"total_s": time.monotonic() - begin})
    path = write_report(config.run_dir)
    reporter.stage(f"Report: {path}")
    return path


def check_inputs(config: RunConfig) -> None:
    """Find bad input of the late stages before the early ones spend their time."""
    evaluation_inputs(config)
    training_prompts(config.data, config.cache, config.seed)
    open_judge(config.evaluate)


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


def run_evaluate(config: RunConfig, reporter: Reporter, pools: Pools) -> None:
    """The matrix attack x prompt set x defence, on held-out prompts; finished cells are reused."""
    inputs = evaluation_inputs(config)
    defences = open_defences(config, pools.rollouts, reporter)
    reporter.stage(f"Evaluate: {', '.join(defence.name for defence in defences)}")
    sets = [*inputs.sets, *attacked_sets(config, inputs, defences, pools.model, reporter)]
    from spo.scorers.alignment import AlignmentScorer

    held = pools.rollouts.info
    success = open_success_judges(config.evaluate)
    report = evaluate(
        pools.rollouts,
        {defence.name: defence.spec for defence in defences},
        [with_defences(part, defences) for part in sets],
        judge=open_judge(config.evaluate),
        alignment=AlignmentScorer(**alignment_arguments(config.reward, config.cache)),
        checks=inputs.checks,
        config=config.evaluate,
        seed=config.seed,
        progress=reporter.step,
        success=success,
        store=CellStore(
            folder=config.run_dir / "cells",
            identity=repr((held, config.seed, config.evaluate.judge, [j.name for j in success])),
            vectors={defence.name: defence.sha256 for defence in defences},
        ),
    )
    report = replace(report, quarantined=(*report.quarantined, *inputs.quarantined))
    save_report(report, config.run_dir / "evaluation.json")
    reporter.note(format_table(shown_conditions(report), metrics=HEADLINE_METRICS))
