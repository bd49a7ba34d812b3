"""Throughput of the engine: plain vLLM against ours, side by side on one machine.

One process for each engine, all resident at once and used in turns, so that a comparison is a pair
of runs seconds apart. Canary and receipts come first: a fast engine that does not steer counts for
nothing. The parent (`run`) talks to its children in JSON lines.
"""

from __future__ import annotations

import json
import math
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import IO, Any

from spo.errors import EngineError

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "models": [
            {"shape": "llava-tiny", "kv_cache_gib": 0.1, "lanes": 1},
            {"shape": "qwen2.5-vl-tiny", "kv_cache_gib": 0.1, "lanes": 3},
        ],
        "batches": [8, 1],
        "tokens": 8,
        "pairs": 8,
        "dtype": "float32",
        "options": {"limit_mm_per_prompt": {"image": 1, "video": 0}},
        "image": 56,
        "eager": True,
    },
    "h200": {
        "models": [
            {"shape": "qwen2.5-vl-7b", "kv_cache_gib": 7.5, "lanes": 3},
            {"shape": "llava-1.5-7b", "kv_cache_gib": 20.0, "lanes": 1},
        ],
        "batches": [256, 64, 1],
        "tokens": 128,
        "pairs": 256,
        "dtype": "bfloat16",
        "options": {
            "limit_mm_per_prompt": {"image": 1, "video": 0},
            "gpu_memory_utilization": 0.1,
        },
        "image": 448,
        "eager": False,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One thing to measure."""

    name: str
    """Row of the table."""
    engine: str
    """"plain" or "steered"."""
    batch: int
    steering: str = "none"
    """none, add, adaptive, pairs (every request its own vector and coefficient), stacked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One timed run."""

    model: str
    workload: Workload
    tokens_per_second: float
    seconds: float
    tokens: int


@dataclass(slots=True, kw_only=True)
class BenchResult:
    """Everything that was seen."""

    preset: str
    facts: dict[str, Any] = field(default_factory=dict)
    measures: list[Measure] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """JSON, rewritten after every measure so that a killed run loses nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [asdict(measure) for measure in self.measures]
        text = json.dumps(
            {"preset": self.preset, "facts": self.facts, "measures": rows, "skipped": self.skipped},
            indent=1,
        )
        path.write_text(text)

    def table(self) -> str:
        """Median tokens/s, and the share of plain vLLM at the same batch size."""
        groups: dict[tuple[str, int, str], list[float]] = {}
        for measure in self.measures:
            key = (measure.model, measure.workload.batch, measure.workload.name)
            groups.setdefault(key, []).append(measure.tokens_per_second)
        lines = [
            "| model | batch | engine | tokens/s | of plain | runs |",
            "|---|---|---|---|---|---|",
        ]
        for (model, batch, name), values in groups.items():
            plain = groups.get((model, batch, "plain vLLM"))
            share = f"{median(values) / median(plain):.1%}" if plain else "?"
            lines.append(
                f"| {model} | {batch} | {name} | {median(values):,.0f} | {share} | {len(values)} |"
            )
        return "\n".join(lines)


def workloads(batches: Sequence[int], lanes: int) -> list[Workload]:
    """Everything measured for one model, plain and steered next to each other."""
    made = []
    for batch in batches:
        made.append(Workload(name="plain vLLM", engine="plain", batch=batch))
        made.append(Workload(name="plugin idle", engine="steered", batch=batch))
        for steering in ("add", "adaptive", "pairs", *(["stacked"] if lanes > 1 else [])):
            made.append(Workload(name=steering, engine="steered", batch=batch, steering=steering))
    return made


class _Child:
    """A process that holds one engine."""

    def __init__(self, settings: Mapping[str, Any], log: IO[str]) -> None:
        self.settings = settings
        command = [sys.executable, "-m", "spo.engines.vllm_plugin.bench_engine"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self.send({"start": dict(settings)})

    def send(self, message: Mapping[str, Any]) -> None:
        """One request."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@"):
                self._answers.put(line[1:])
        self._answers.put(None)

    def receive(self, timeout: float) -> dict[str, Any]:
        """The next answer; EngineError when the child died, is late, or reports an error."""
        name = f"{self.settings['shape']} {self.settings['engine']}"
        try:
            line = self._answers.get(timeout=max(timeout, 1.0))
        except queue.Empty:
            raise EngineError(f"{name} gave no answer within {timeout:.0f} s") from None
        if line is None:
            raise EngineError(f"the engine process of {name} died; see its log")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{name}: {answer['error']}")
        return answer

    def stop(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()


def run(
    preset: str,
    output: Path,
    *,
    time_limit: float,
    repeats: int = 1,
    say: Callable[[str], None] = print,
) -> BenchResult:
    """Start all engines of a preset at once and measure them in turns.

    Args:
        preset: key of `PRESETS`.
        output: folder for results.json, model folders and engine logs.
        time_limit: seconds after which nothing new is measured.
        repeats: rounds over all workloads.
        say: receives progress lines.
    """
    begin = time.monotonic()
    sizes = PRESETS[preset]
    output.mkdir(parents=True, exist_ok=True)
    result = BenchResult(preset=preset)
    children: dict[tuple[str, str], _Child] = {}
    try:
        for model in sizes["models"]:
            for engine in ("plain", "steered"):
                settings = {**sizes, **model, "engine": engine, "folder": str(output / "models")}
                log = (output / f"{model['shape']}-{engine}.log").open("w")
                children[(model["shape"], engine)] = _Child(settings, log)
        for (shape, engine), child in list(children.items()):
            try:
                facts = child.receive(begin + time_limit - time.monotonic())
            except EngineError as error:
                facts = {"error": str(error)}
                child.stop()
                del children[(shape, engine)]
            result.facts[f"{shape} {engine}"] = facts
            say(f"{time.monotonic() - begin:6.1f} s  {shape} {engine}: {json.dumps(facts)}")
        result.write(output / "results.json")
        for round_number in range(repeats):
            for model in sizes["models"]:
                _measure(model, sizes, children, result, begin + time_limit, say)
                result.write(output / "results.json")
            say(f"{time.monotonic() - begin:6.1f} s  round {round_number + 1} done")
    finally:
        for child in children.values():
            child.stop()
        result.write(output / "results.json")
        (output / "table.md").write_text(result.table() + "\n")
    return result


def _measure(
    model: Mapping[str, Any],
    sizes: Mapping[str, Any],
    children: dict[tuple[str, str], _Child],
    result: BenchResult,
    deadline: float,
    say: Callable[[str], None],
) -> None:
    for workload in workloads(sizes["batches"], model["lanes"]):
        name = f"{model['shape']} batch {workload.batch} {workload.name}"
        child = children.get((model["shape"], workload.engine))
        if child is None or time.monotonic() > deadline:
            result.skipped.append(f"{name}: {'no engine' if child is None else 'time limit'}")
            continue
        child.send({"measure": asdict(workload)})
        try:
            answer = child.receive(deadline + 60.0 - time.monotonic())
        except EngineError as error:
            result.skipped.append(f"{name}: {error}")
            child.stop()
            del children[(model["shape"], workload.engine)]
            continue
        speed = answer["tokens"] / answer["seconds"]
        result.measures.append(
            Measure(
                model=model["shape"],
                workload=workload,
                tokens_per_second=speed,
                seconds=answer["seconds"],
                tokens=answer["tokens"],
            )
        )
        say(f"{name}: {speed:,.0f} tokens/s ({answer['seconds']:.2f} s)")


def spread(count: int) -> list[float]:
    """`count` different small doses."""
    return [0.01 + 0.04 * (math.sin(3.0 * i) + 1.0) for i in range(count)]
