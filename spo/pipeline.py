"""The order of things: extract, estimate, train, evaluate. Each also runs alone on a run folder.

Stage II (`Pools`, `run_train`) is in `spo.refine`.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

from spo.artifact import write_atomic
from spo.config import RunConfig
from spo.errors import DataError
from spo.evaluation import PromptSet, evaluate, format_table, save_report
from spo.progress import Reporter
from spo.provenance import save_environment
from spo.records import SteeringSpec
from spo.refine import SPO, Pools, load_artifact, run_train
from spo.report import write_report
from spo.resources import (
    EvaluationInputs,
    alignment_arguments,
    evaluation_inputs,
    open_judge,
    training_prompts,
)
from spo.stage1 import STAGE1, run_estimate, run_extract
from spo.stages.attack import AttackJob, run_attack

HEADLINE_METRICS = ("toxicity", "nll", "attributes", "correct")


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
    """Before and after, on held-out prompts, plain and under the picture attack."""
    reporter.stage("Evaluate: unsteered, Stage I, SPO")
    inputs = evaluation_inputs(config)
    sets = [*inputs.sets, *_attacked(config, reporter, pools, inputs)]
    defences: dict[str, SteeringSpec | None] = {"none": None}
    for name in (STAGE1, SPO):
        if (config.run_dir / name).is_dir():
            artifact = load_artifact(config, name, pools)
            published = f"evaluated-{name}"
            pools.rollouts.publish(published, artifact.vector, 0)
            defences[name] = SteeringSpec(
                vector=published,
                version=0,
                coefficient=artifact.coefficient,
                operator=artifact.operator,
                positions=artifact.positions,
            )
    from spo.scorers.alignment import AlignmentScorer

    report = evaluate(
        pools.rollouts,
        defences,
        sets,
        judge=open_judge(config.evaluate),
        alignment=AlignmentScorer(**alignment_arguments(config.reward, config.cache)),
        checks=inputs.checks,
        config=config.evaluate,
        seed=config.seed,
        progress=reporter.step,
    )
    report = replace(report, quarantined=(*report.quarantined, *inputs.quarantined))
    save_report(report, config.run_dir / "evaluation.json")
    reporter.note(format_table(report, metrics=HEADLINE_METRICS))


def _attacked(
    config: RunConfig, reporter: Reporter, pools: Pools, inputs: EvaluationInputs
) -> list[PromptSet]:
    """The pictured harmful prompts with the attacked picture; the picture is made once a run."""
    if inputs.attack_start is None:
        return []
    attack = config.evaluate.attack
    folder = config.run_dir / "attack"
    material = [pools.model.path, attack.model_dump_json(), repr(inputs.attack_targets)]
    digest = config.digest_of("seed", "data", also="|".join(material))
    curve_path = config.run_dir / "attack.json"
    if not curve_path.is_file() or json.loads(curve_path.read_text())["digest"] != digest:
        reporter.note(f"picture attack: {attack.steps} PGD steps, epsilon {attack.epsilon_255}/255")
        prompts, _ = training_prompts(config.data, config.cache, config.seed)
        curve = run_attack(
            AttackJob(
                model=pools.model.path,
                revision=pools.model.revision,
                picture=inputs.attack_start,
                output=folder / f"pgd-{attack.epsilon_255:g}.png",
                prompts=[replace(p, image=None) for p in prompts if p.category != "caption"],
                targets=inputs.attack_targets,
                config=attack,
                learn=config.learn,
                seed=config.seed,
            ),
            timeout_s=attack.timeout_s,
        )
        write_atomic(curve_path, json.dumps({**curve, "digest": digest}).encode())
    attacked = json.loads(curve_path.read_text())["attacked"]
    pictured = next(s for s in inputs.sets if s.condition in ("image", "plain"))
    prompts_with = tuple(replace(p, image=attacked) for p in pictured.prompts)
    return [replace(pictured, condition="pgd", prompts=prompts_with)]
