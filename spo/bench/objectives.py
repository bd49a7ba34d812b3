"""All objectives of Stage II side by side: one Stage I, one set of engines, several seeds each.

The runs share everything but the objective and the seed. The learner runs in this process, without
Ray Train around it; coordinator, engines and reward models are those of every run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from spo.actors.pools import Pools
from spo.algorithms.metrics import runs_interval
from spo.algorithms.objectives import OBJECTIVES
from spo.artifact import SteeringArtifact
from spo.config import RunConfig
from spo.engines.factory import open_learner_engine
from spo.engines.forward import DifferentiableEngine
from spo.evaluation import evaluate
from spo.evaluation.defences import UNDEFENDED, Defence
from spo.pipeline import open_pools, prepare
from spo.progress import Reporter, Silent
from spo.resolve import learner_model, open_corpus, open_judge
from spo.stage1.job import run_estimate, run_extract
from spo.stage2.coordinator import CoordinatorFiles, make_coordinator
from spo.stage2.coordinator_thread import CoordinatorThread
from spo.stage2.job import attacked_prompts, coordinator_settings, load_artifact
from spo.stage2.learner import Update, VectorLearner, step_figures
from spo.stage2.loop import train
from spo.vector import SteeringVector

COLUMNS = ("reward", "toxicity", "nll", "attributes", "correct", "kl_benign", "seconds")
_CONDITIONS = {"plain": ("toxicity", "nll"), "caption": ("attributes",), "question": ("correct",)}


def compare(
    config: RunConfig,
    reporter: Reporter,
    *,
    objectives: Sequence[str] = tuple(OBJECTIVES),
    seeds: int = 3,
) -> Path:
    """Run what is missing of the comparison, and write it; returns the table's path.

    Each finished run is a line of `objectives.jsonl`, so that an interrupted comparison goes on.
    """
    prepare(config)
    run_extract(config, reporter)
    run_estimate(config, reporter)
    rows_path = config.run_dir / "objectives.jsonl"
    rows, table = _read(rows_path), config.run_dir / "objectives.md"
    with open_pools(config, reporter) as pools:
        start = load_artifact(config, config.learn.start, pools)
        engine = open_learner_engine(
            learner_model(config.engine, pools.model), pools.model.revision, config.learn
        )
        wanted: list[tuple[str, int]] = [("unsteered", 0), ("Stage I", 0)]
        wanted += [(name, seed) for seed in range(seeds) for name in objectives]
        done = {(row["objective"], row["seed"]) for row in rows}
        for number, (name, seed) in enumerate(wanted):
            if (name, seed) not in done:
                row = _one(config, pools, engine, start, name, seed)
                rows.append(row)
                with rows_path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                write_table(rows, table, baseline=config.learn.objective)
            reporter.step(number + 1, len(wanted), f"{name}, seed {seed}")
    return table


def write_table(rows: Sequence[dict[str, Any]], path: Path, *, baseline: str = "rloo") -> None:
    """Mean and standard deviation over seeds of each objective, as Markdown.

    The last column is the paired difference of toxicity to `baseline` over the seeds that both
    have, with its 95 % interval (Student's t; a seed is one draw).
    """
    columns = (*COLUMNS, f"toxicity - {baseline}'s")
    lines = [
        "| objective | seeds | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["objective"], {})[row["seed"]] = row
    for name, mine in groups.items():
        cells = []
        for column in COLUMNS:
            values = [row[column] for row in mine.values() if column in row]
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}" if values else "")
        cells.append("" if name == baseline else _difference(mine, groups.get(baseline, {})))
        lines.append(f"| {name} | {len(mine)} | " + " | ".join(cells) + " |")
    path.write_text("\n".join(lines) + "\n")


def _difference(mine: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]]) -> str:
    shared = sorted(mine.keys() & other.keys())
    if len(shared) < 2:
        return ""
    found = runs_interval(
        [({"": [mine[seed]["toxicity"]]}, {"": [other[seed]["toxicity"]]}) for seed in shared]
    )
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _one(
    config: RunConfig,
    pools: Pools,
    engine: DifferentiableEngine,
    start: SteeringArtifact,
    name: str,
    seed: int,
) -> dict[str, Any]:
    begin = time.monotonic()
    row: dict[str, Any] = {"objective": name, "seed": seed}
    vector: SteeringVector | None = start.vector
    if name == "unsteered":
        vector = None
    elif name != "Stage I":
        learn = config.learn.model_copy(update={"objective": name})
        mine = config.model_copy(update={"learn": learn, "seed": seed})
        vector, figures = _refine(mine, pools, engine, start)
        row |= figures
    row["seconds"] = time.monotonic() - begin
    return row | _measure(config, pools, start, vector, f"{name}-{seed}")


def _refine(
    config: RunConfig, pools: Pools, engine: DifferentiableEngine, start: SteeringArtifact
) -> tuple[SteeringVector, dict[str, float]]:
    drawn, _ = open_corpus(config.corpus).training_prompts()
    prompts = attacked_prompts(config, drawn, start, pools.model, Silent())
    name = f"{config.learn.objective}-{config.seed}"
    files = CoordinatorFiles.named(config.run_dir, name, config.learn.loggers)
    history = config.run_dir / f"history-{name}.jsonl"
    history.write_text("")
    settings = coordinator_settings(config, name)
    coordinator = make_coordinator(prompts, pools.rollouts, pools.rewards, settings, files)
    learner = VectorLearner(engine, start.vector, steering=config.steering, config=config.learn)
    updates: list[Update] = []

    def after_step(update: Update, vector: SteeringVector) -> None:
        line.record(step_figures(update, vector, start.vector))
        updates.append(update)

    steps = range(config.learn.steps)
    engines = config.engine
    timeout_s = float(engines.start_timeout_s + 2 * engines.request_timeout_s)
    with closing(CoordinatorThread(coordinator, timeout_s)) as line:
        vector = train(learner, line.batch, steps=steps, after_step=after_step)
    pools.rollouts.retire(settings.name)
    rewards = [json.loads(line)["reward"] for line in history.read_text().splitlines()]
    return vector, {"reward": float(np.mean(rewards[-2:])), "kl_benign": updates[-1].kl_benign}


def _measure(
    config: RunConfig,
    pools: Pools,
    start: SteeringArtifact,
    vector: SteeringVector | None,
    name: str,
) -> dict[str, float]:
    defence = UNDEFENDED
    if vector is not None:
        pools.rollouts.publish(name, vector, 0)
        defence = Defence(name="steered", spec=start.spec(name), sha256=vector.sha256)
    inputs = open_corpus(config.corpus).evaluation_inputs()
    report = evaluate(
        pools.rollouts,
        [defence],
        [part for part in inputs.sets if part.condition in _CONDITIONS],
        judge=open_judge(config.evaluate),
        alignment=None,
        checks=inputs.checks,
        config=config.evaluate,
        seed=config.seed,
    )
    pools.rollouts.retire(name)
    return {
        metric: cell.metrics[metric].mean
        for cell in report.cells
        for metric in _CONDITIONS[cell.condition]
        if metric in cell.metrics
    }


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]
