"""The order of things: extract, estimate, train, evaluate. Each also runs alone on a run folder.

`train` is the preference loop itself. It knows neither Ray nor vLLM: under Ray Train it runs in
every worker, in tests it runs on fakes in milliseconds.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from spo.algorithms.estimators import estimate
from spo.artifact import SteeringArtifact, write_atomic
from spo.config import RunConfig
from spo.engines.identity import folder_revision
from spo.errors import DataError
from spo.evaluation import PromptSet, evaluate, format_table, save_report
from spo.progress import Reporter, following
from spo.provenance import keep_quarantined, save_environment
from spo.records import Batch, SteeringSpec
from spo.report import write_report
from spo.resources import (
    EvaluationInputs,
    ResolvedModel,
    alignment_arguments,
    contrast_rows,
    evaluation_inputs,
    open_judge,
    resolve_model,
    source_weights,
    toxicity_arguments,
    training_prompts,
)
from spo.stages.attack import AttackJob, run_attack
from spo.stages.coordinator import Coordinator, CoordinatorActor
from spo.stages.extract import digest_of_rows, extract, load_activations
from spo.stages.learn import TrainLoopSettings, Update, fit
from spo.stages.rollout import EnginePool
from spo.stages.score import RewardPool
from spo.vector import SteeringVector

STAGE1, SPO = "stage1", "spo"
HEADLINE_METRICS = ("toxicity", "nll", "attributes", "correct")


class Learner(Protocol):
    """Improves a vector by one batch."""

    @property
    def vector(self) -> SteeringVector: ...

    def update(self, batch: Batch, *, rank: int, world: int) -> Update: ...


def train(
    learner: Learner,
    next_batch: Callable[[int, SteeringVector], Batch],
    *,
    steps: Iterable[int],
    after_step: Callable[[Update, SteeringVector], None],
    shard: tuple[int, int] = (0, 1),
) -> SteeringVector:
    """The preference loop.

    Args:
        learner: holds the vector and its optimiser.
        next_batch: publishes the vector as version `step`, samples, scores; asked again for a step
            it returns the same batch.
        steps: steps still to run.
        after_step: records figures and saves a checkpoint.
        shard: (rank, number of workers): which groups of a batch this worker learns from.
    """
    rank, world = shard
    for step in steps:
        batch = next_batch(step, learner.vector)
        update = learner.update(batch, rank=rank, world=world)
        after_step(update, learner.vector)
    return learner.vector


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
    artifact = _artifact(config, vector, config.estimate.method, found.data_sha256, parent="")
    artifact.save(config.run_dir / STAGE1)
    weights = ", ".join(
        f"{layer} ({weight:.2f})"
        for layer, weight in zip(vector.layers, separability["weights"], strict=True)
    )
    reporter.note(f"layers (weight): {weights}; sources: {', '.join(curves)}")
    return artifact


class Pools:
    """Engines and reward models of one run, started once and shared by training and evaluation."""

    def __init__(self, config: RunConfig, reporter: Reporter) -> None:
        self._config = config
        self._reporter = reporter
        self.prefix = f"{config.name}-{uuid.uuid4().hex[:8]}"
        self.model: ResolvedModel = resolve_model(config.model, config.cache)

    def __enter__(self) -> Pools:
        config = self._config
        self._reporter.stage(
            f"Start {config.engine.replicas} {config.engine.backend} engine(s) and reward models"
        )
        self.rollouts = EnginePool.start(
            self.model.path,
            self.model.revision,
            config.engine,
            prefix=self.prefix,
            seed=config.seed,
        )
        try:
            self.rewards = RewardPool.start(
                toxicity_arguments(config.reward, config.cache),
                alignment_arguments(config.reward, config.cache),
                config.reward,
                prefix=self.prefix,
            )
        except BaseException:
            self.rollouts.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.rewards.close()
        self.rollouts.close()


def run_train(config: RunConfig, reporter: Reporter, pools: Pools) -> SteeringArtifact:
    """Stage II: refine the Stage I vector; continues an interrupted run of the same name."""
    import ray

    start = load_artifact(config, STAGE1, pools)
    prompts, bad = training_prompts(config.data, config.cache, config.seed)
    keep_quarantined(config, "training prompts", bad)
    reporter.stage(
        f"Refine by {config.learn.objective}: {config.learn.steps} steps of "
        f"{config.rollout.harm_prompts}+{config.rollout.benign_prompts} prompts x "
        f"{config.rollout.group_size} answers"
    )
    digest = config.digest_of(
        *("seed", "data", "steering", "rollout", "reward", "learn"),
        also=start.vector.sha256 + repr(prompts),
    )
    history = config.run_dir / f"history-{digest}.jsonl"
    history.touch()
    coordinator = (
        ray.remote(CoordinatorActor)
        .options(name=f"{pools.prefix}-coordinator", num_cpus=0, max_restarts=1)
        .remote(
            _connected_coordinator,
            {"prompts": prompts, "config": config, "prefix": pools.prefix, "history": history},
        )
    )
    settings = TrainLoopSettings(
        model="fake" if config.engine.backend == "fake" else pools.model.path,
        revision=pools.model.revision,
        vector=start.vector.to_bytes(),
        steering=config.steering,
        config=config.learn,
        coordinator=f"{pools.prefix}-coordinator",
        namespace=config.ray.namespace,
        batch_timeout_s=float(config.engine.request_timeout_s + config.reward.timeout_s),
    )

    def show(figures: Mapping[str, Any]) -> None:
        parts = figures["reward_parts"]
        reporter.step(
            figures["step"] + 1,
            config.learn.steps,
            f"reward {figures['reward']:+.3f}  toxicity {parts['toxicity_harm']:.3f}  "
            f"kl {figures['kl']:.3f}",
        )

    with following(history, show):
        vector = fit(settings, train, name=f"train-{digest}", storage=config.run_dir)
    write_atomic(config.run_dir / "history.jsonl", history.read_bytes())
    ray.kill(coordinator)
    method = f"{config.learn.objective} from {config.estimate.method}"
    artifact = _artifact(config, vector, method, start.data_sha256, parent=start.vector.sha256)
    artifact.save(config.run_dir / SPO)
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


def load_artifact(config: RunConfig, name: str, pools: Pools) -> SteeringArtifact:
    """An artifact of this run, checked against the model that the engines hold."""
    folder = config.run_dir / name
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; run jobs.estimate (or jobs.pipeline) first")
    held = pools.rollouts.info
    return SteeringArtifact.load(folder, model_id=held.model_id, model_revision=held.model_revision)


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


def _connected_coordinator(
    prompts: list[Any], config: RunConfig, prefix: str, history: Path
) -> Coordinator:
    """Built inside the coordinator's own process, which finds the pools by name."""
    return Coordinator(
        prompts,
        rollouts=EnginePool.connect(prefix, config.engine),
        scorer=RewardPool.connect(prefix, config.reward),
        steering=config.steering,
        rollout=config.rollout,
        reward=config.reward,
        seed=config.seed,
        history=history,
    )


def _artifact(
    config: RunConfig, vector: SteeringVector, method: str, data_sha256: str, *, parent: str
) -> SteeringArtifact:
    return SteeringArtifact(
        vector=vector,
        operator=config.steering.operator,
        coefficient=config.steering.coefficient,
        positions=config.steering.positions,
        method=method,
        data_sha256=data_sha256,
        config_digest=config.digest,
        parent=parent,
    )
