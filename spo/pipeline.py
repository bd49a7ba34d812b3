"""The order of things: extract, estimate, train, evaluate. Each also runs alone on a run folder.

Stage II (`Pools`, `run_train`) is in `spo.refine`.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from spo.algorithms.estimators import estimate
from spo.artifact import SteeringArtifact, write_atomic
from spo.config import RunConfig
from spo.engines.identity import folder_revision
from spo.errors import DataError
from spo.evaluation import PromptSet, evaluate, format_table, save_report
from spo.progress import Reporter
from spo.provenance import keep_quarantined, save_environment
from spo.records import SteeringSpec
from spo.refine import SPO as SPO
from spo.refine import STAGE1 as STAGE1
from spo.refine import Pools as Pools
from spo.refine import load_artifact, make_artifact
from spo.refine import run_train as run_train
from spo.report import write_report
from spo.resources import (
    EvaluationInputs,
    alignment_arguments,
    contrast_rows,
    evaluation_inputs,
    open_judge,
    resolve_model,
    source_weights,
    training_prompts,
)
from spo.stages.attack import AttackJob, run_attack
from spo.stages.extract import digest_of_rows, extract, load_activations
from spo.vector import SteeringVector

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


def run_extract(config: RunConfig, reporter: Reporter) -> Path:
    """Stage I, first half: pooled activations of all contrasts."""
    model = resolve_model(config.model, config.cache)
    rows, bad = contrast_rows(config)
    reporter.stage(f"Extract activations of {len(rows)} rows")
    content = digest_of_rows(rows) + folder_revision(model.path)
    folder = extract(
        rows,
        config.run_dir / "activations",
        model=model.path,
        revision=model.revision,
        config=config.extract,
        digest=config.digest_of("seed", "model", "extract", also=model.path + content),
    )
    keep_quarantined(config, "extract", bad)
    return folder


def run_estimate(config: RunConfig, reporter: Reporter) -> SteeringArtifact:
    """Stage I, second half: the vector, its layers and their weights."""
    reporter.stage("Estimate the Stage I vector")
    found = load_activations(config.run_dir / "activations", source_weights(config))
    result = estimate(found.contrasts, found.layers, found.num_layers, config.estimate)
    rows = list(result.chosen)
    norms = torch.from_numpy(found.mean_norms[rows])
    scale = torch.from_numpy(result.weights[rows]) * norms
    vector = SteeringVector(
        layers=tuple(found.layers[row] for row in rows),
        directions=torch.from_numpy(result.units[rows]) * scale.unsqueeze(1),
        mean_norms=norms,
        calibration=torch.from_numpy(found.calibration[rows]),
        model_id=found.model_id,
        model_revision=found.model_revision,
    )
    curves = {
        name: {
            "auc": [interval.mean for interval in intervals],
            "low": [interval.low for interval in intervals],
            "high": [interval.high for interval in intervals],
        }
        for name, intervals in result.auc.items()
    }
    separability = {
        "layers": list(found.layers),
        "sources": curves,
        "source_weights": {name: list(values) for name, values in result.source_weights.items()},
        "combined": {"auc": list(result.mean_auc)},
        "chosen": list(vector.layers),
        "weights": result.weights[rows].tolist(),
        "mean_norms": found.mean_norms.tolist(),
        "cosines": {pair: list(values) for pair, values in result.cosines.items()},
    }
    write_atomic(config.run_dir / "separability.json", json.dumps(separability).encode())
    keep_quarantined(config, "activations", found.quarantined)
    artifact = make_artifact(config, vector, config.estimate.method, found.data_sha256, parent="")
    artifact.save(config.run_dir / STAGE1)
    weights = ", ".join(
        f"{layer} ({weight:.2f})"
        for layer, weight in zip(vector.layers, separability["weights"], strict=True)
    )
    reporter.note(f"layers (weight): {weights}; sources: {', '.join(curves)}")
    return artifact


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
