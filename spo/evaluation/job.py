"""Evaluation of one run: the matrix attack x prompt set x defence, on held-out prompts."""

from __future__ import annotations

from dataclasses import replace

from spo.actors.picture_tasks import Workshop
from spo.actors.pools import Pools
from spo.config import RunConfig
from spo.evaluation import CellStore, evaluate, format_table, save_report, shown_conditions
from spo.evaluation.attacked_sets import attacked_sets
from spo.evaluation.defences import open_defences, with_defences
from spo.progress import Reporter
from spo.resolve import fitting_arguments, open_corpus, open_judge, open_success_judges

HEADLINE_METRICS = ("toxicity", "success", "nll", "attributes", "correct", "refusal", "kl")


def run_evaluate(config: RunConfig, reporter: Reporter, pools: Pools) -> None:
    """The matrix attack x prompt set x defence, on held-out prompts; finished cells are reused."""
    inputs = open_corpus(config.corpus).evaluation_inputs()
    defences = open_defences(config.evaluate.defences, config.run_dir, pools.rollouts, reporter)
    reporter.stage(f"Evaluate: {', '.join(defence.name for defence in defences)}")
    workshop = Workshop(
        model=pools.model, place=config.attack_place, run_dir=config.run_dir, seed=config.seed
    )
    attacked = attacked_sets(config.evaluate, inputs, defences, workshop, reporter)
    sets = [*inputs.sets, *attacked]
    from spo.scorers.alignment import AlignmentScorer

    held = pools.rollouts.info
    success = open_success_judges(config.evaluate)
    report = evaluate(
        pools.rollouts,
        defences,
        [with_defences(part, defences) for part in sets],
        judge=open_judge(config.evaluate),
        alignment=AlignmentScorer(**fitting_arguments(config.reward, config.cache)),
        checks=inputs.checks,
        config=config.evaluate,
        seed=config.seed,
        progress=reporter.step,
        success=success,
        store=CellStore(
            folder=config.run_dir / "cells",
            identity=repr((held, config.seed, config.evaluate.judge, [j.name for j in success])),
        ),
    )
    report = replace(report, quarantined=(*report.quarantined, *inputs.quarantined))
    save_report(report, config.run_dir / "evaluation.json")
    reporter.note(format_table(shown_conditions(report), metrics=HEADLINE_METRICS))
