"""The learner's step on this machine: everything shared against nothing shared; one card for all.

step: sequences/s of a step with shared prompts and prefix, against the naive step (unsteered pass,
steered pass, backward; nothing cached, all logits kept), on random weights of a real shape.
loop: Stage II with engine and learner on one device, or on a card each, at S = 0 and S = 1: seconds
a step, and the share of the time in which the engine waits for the learner. Rewards are drawn from
the answers' hashes: the shape of the work is real, what is learned means nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image

from spo.bench.loop import measure_loop
from spo.bench.shapes import write_shape
from spo.engines.forward import SteeringPlan, TokenBatch, token_kl, token_logprobs
from spo.engines.hf.engine import HfEngine
from spo.errors import EngineError
from spo.records import Operator, Positions, Prompt, PromptKind
from spo.vector import SteeringVector

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "shape": "llava-tiny",
        "side": 32,
        "layers": (1, 2),
        "prompts": 4,
        "group": 4,
        "tokens": 8,
        "micro": 8,
        "compiled": False,
        "dtype": "float32",
        "device": "cpu",
        "repeats": 2,
        "steps": 3,
        "words": 12,
    },
    "h200": {
        "shape": "llava-1.5-7b",
        "side": 336,
        "layers": (14, 17, 20, 23, 26),
        "prompts": 16,
        "group": 4,
        "tokens": 64,
        "micro": 32,
        "compiled": True,
        "dtype": "bfloat16",
        "device": "cuda",
        "repeats": 5,
        "steps": 12,
        "words": 60,
    },
}


def run(
    preset: str,
    output: Path,
    *,
    time_limit: float,
    only: str | None = None,
    gpus: int = 1,
    tokens: int | None = None,
    micro: int | None = None,
    compiled: bool | None = None,
) -> str:
    """Measure, writing `results.json` after each figure; returns the table.

    Args:
        preset: key of `PRESETS`.
        output: folder for results and the model's shape.
        time_limit: seconds after which nothing new is begun.
        only: "step" or "loop", to leave the other one out.
        gpus: 1: engine and learner share a card; 2: the learner has the second one.
        tokens: length of an answer; the preset's own if absent.
        micro: answers computed together, likewise.
        compiled: whether the decoder blocks are compiled, likewise; the naive step never is.
    """
    given = {"tokens": tokens, "micro": micro, "compiled": compiled}
    chosen = {name: value for name, value in given.items() if value is not None}
    settings = {**PRESETS[preset], **chosen, "gpus": gpus}
    if gpus > 1:
        if settings["device"] != "cuda" or torch.cuda.device_count() < gpus:
            raise EngineError(
                f"{gpus} cards were asked for, preset {preset!r} runs on {settings['device']} and "
                f"{torch.cuda.device_count()} are visible; leave --gpus out"
            )
        torch.cuda.set_device(gpus - 1)
    output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + time_limit
    folder = write_shape(settings["shape"], output / "shape")
    (folder / "BENCHMARK_SHAPE").write_text("random weights\n")
    results: dict[str, Any] = {"preset": preset, "rows": {}, "device": _device(settings)}

    def keep(name: str, figures: dict[str, float] | str) -> None:
        results["rows"][name] = figures
        (output / "results.json").write_text(json.dumps(results, indent=1))
        (output / "table.md").write_text(_table(results))

    engine = HfEngine(
        str(folder),
        dtype=settings["dtype"],
        device=settings["device"],
        compiled_scores=settings["compiled"],
    )
    prompts = _prompts(settings, output)
    if only != "loop":
        _measure_steps(engine, prompts, settings, keep)
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()  # what the naive step took is the rollout engine's now
    if only != "step":
        _measure_loops(engine, folder, prompts, settings, keep, end)
    return _table(results)


def _measure_loops(
    engine: HfEngine,
    folder: Path,
    prompts: Sequence[Prompt],
    settings: dict[str, Any],
    keep: Callable[[str, dict[str, float] | str], None],
    end: float,
) -> None:
    for staleness in (1, 0):
        name = f"loop, S = {staleness}"
        if time.monotonic() > end - 60:
            keep(name, "left out: no time")
            continue
        _reset_peak(engine)
        limit_s = (end - time.monotonic()) / (1 + staleness)
        vector = _vector(engine, settings)
        try:
            figures = measure_loop(engine, folder, prompts, vector, settings, staleness, limit_s)
        except Exception as error:  # noqa: BLE001 what was measured before must not be lost
            keep(name, f"FAILED: {error}")
        else:
            keep(name, figures | {"peak_gib": _peak(engine)})


def _measure_steps(
    engine: HfEngine,
    prompts: Sequence[Prompt],
    settings: dict[str, Any],
    keep: Callable[[str, dict[str, float] | str], None],
) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (settings["micro"], settings["tokens"])
    plans = _plan(engine, settings)
    answers = torch.randint(0, 256, shape, generator=generator).tolist()
    group = settings["group"]
    some = [prompts[i // group] for i in range(settings["micro"])]
    batch = engine.prepare(some, answers)
    ways: dict[str, Callable[[], None]] = {
        "naive step": lambda: _naive(engine, batch, plans),
        "shared prefix and prompts": lambda: _shared(engine, batch, plans, cached=True),
        "shared head only": lambda: _shared(engine, batch, plans, cached=False),
    }
    gradients = {}
    for name, step in ways.items():
        try:
            step()  # warm
            gradients[name] = _taken(plans)
            times = []
            _reset_peak(engine)
            for _ in range(settings["repeats"]):
                _wait(engine)
                begin = time.perf_counter()
                step()
                _wait(engine)
                times.append(time.perf_counter() - begin)
                plans.directions.grad = None
        except RuntimeError as error:
            keep(name, f"FAILED: {str(error)[:200]}")
            plans.directions.grad = None
            continue
        figures = {"sequences_s": len(answers) / median(times), "peak_gib": _peak(engine)}
        naive = gradients.get("naive step")
        if naive is not None:
            cosine = torch.nn.functional.cosine_similarity(
                gradients[name].flatten(), naive.flatten(), dim=0
            )
            figures["gradient_cosine_to_naive"] = float(cosine)
        keep(name, figures)


def _naive(engine: HfEngine, batch: TokenBatch, plan: SteeringPlan) -> None:
    with torch.no_grad():
        reference = engine.answer_logits(batch)
    logits = engine.answer_logits(batch, plan)
    policy = token_logprobs(logits, batch.answer_ids, batch.answer_mask)
    kl = token_kl(logits, reference) * batch.answer_mask
    (policy.sum() + kl.sum()).backward()


def _shared(engine: HfEngine, batch: TokenBatch, plan: SteeringPlan, *, cached: bool) -> None:
    scores = engine.answer_scores(batch, [plan], chunk_tokens=512, cache_prefix=cached)[0]
    (scores.policy.sum() + scores.kl.sum()).backward()


def _prompts(settings: dict[str, Any], folder: Path) -> list[Prompt]:
    made = []
    for i in range(settings["prompts"] * 4):
        path = folder / f"picture-{i % 8}.png"
        if not path.is_file():
            Image.new("RGB", (settings["side"],) * 2, (i % 8 * 30, 90, 160)).save(path)
        kind = PromptKind.BENIGN if i % 4 == 3 else PromptKind.HARM
        text = f"{i} " + "word " * (settings["words"] // 5)
        made.append(Prompt(prompt_id=f"p{i}", text=text, kind=kind, image=str(path)))
    return made


def _vector(engine: HfEngine, settings: dict[str, Any]) -> SteeringVector:
    layers = settings["layers"]
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(len(layers), engine.info.hidden_size, generator=generator)
    return SteeringVector(
        layers=layers,
        directions=directions / directions.norm(dim=1, keepdim=True),
        mean_norms=torch.ones(len(layers)),
        calibration=torch.zeros_like(directions),
        model_id=engine.info.model_id,
        model_revision=engine.info.model_revision,
    )


def _plan(engine: HfEngine, settings: dict[str, Any]) -> SteeringPlan:
    vector = _vector(engine, settings)
    return SteeringPlan(
        layers=vector.layers,
        directions=vector.directions.to(engine.device).requires_grad_(),
        mean_norms=vector.mean_norms.to(engine.device),
        calibration=vector.calibration.to(engine.device),
        operator=Operator.ADD,
        positions=Positions.ALL,
        coefficient=0.1,
    )


def _taken(plan: SteeringPlan) -> torch.Tensor:
    assert plan.directions.grad is not None
    gradient = plan.directions.grad.clone()
    plan.directions.grad = None
    return gradient


def _wait(engine: HfEngine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.synchronize()


def _reset_peak(engine: HfEngine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(engine: HfEngine) -> float:
    if engine.device.type != "cuda":
        return float("nan")
    return torch.cuda.max_memory_allocated() / 2**30


def _device(settings: dict[str, Any]) -> str:
    card = torch.cuda.get_device_name() if settings["device"] == "cuda" else "CPU"
    cards = "a card each for engine and learner" if settings["gpus"] > 1 else "one device for both"
    blocks = "compiled" if settings["compiled"] else "as they are"
    return (
        f"{card}, answers of {settings['tokens']} tokens, {settings['micro']} together, blocks "
        f"{blocks}; loop: {cards}"
    )


def _table(results: dict[str, Any]) -> str:
    rows = results["rows"]
    columns = list(dict.fromkeys(k for row in rows.values() if isinstance(row, dict) for k in row))
    lines = [
        "| " + " | ".join(["", *columns, "of naive"]) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    naive = rows.get("naive step")
    for name, row in rows.items():
        if not isinstance(row, dict):
            lines.append(f"| {name} | {row} |")
            continue
        cells = [f"{row[column]:.3f}" if column in row else "" for column in columns]
        step = isinstance(naive, dict) and not name.startswith("loop")
        share = f"{row['sequences_s'] / naive['sequences_s']:.2f} x" if step else ""
        lines.append("| " + " | ".join([name, *cells, share]) + " |")
    return f"{results['device']}\n\n" + "\n".join(lines) + "\n"
