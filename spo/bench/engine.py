"""Throughput of the engine: plain vLLM against ours, side by side on one card.

One process for each engine, all of a model resident on the same card and used in turns, the order
turning with every repeat, so that a share is the median over pairs of runs seconds apart. Several
cards measure several models at once. Canary and receipts come first: a fast engine that does not
steer counts for nothing. The parent (`run`) talks to its children in JSON lines.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from spo.bench.engine_process import EngineProcess
from spo.bench.engine_table import BenchResult, Measure, Workload
from spo.engines.vllm.plugin.install import check_entry_point
from spo.errors import EngineError

_TINY: dict[str, Any] = {
    "batches": [8, 1],
    "runs": {8: 1, 1: 2},
    "tokens": 8,
    "pairs": 8,
    "lanes": 3,
    "dtype": "float32",
    "options": {"limit_mm_per_prompt": {"image": 1, "video": 0}},
    "image": 56,
    "check_shape": "llava-tiny",
    "check_kv_cache_gib": 0.1,
    "check_seconds": 20.0,
    "eager": True,
    "engines": ["plain", "kernel"],
}
_H200: dict[str, Any] = {
    "batches": [1, 64, 256],
    "runs": {1: 4, 64: 2, 256: 1},
    "tokens": 128,
    "pairs": 256,
    "lanes": 3,
    "dtype": "bfloat16",
    "options": {
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        "gpu_memory_utilization": 0.1,
    },
    "image": 448,
    "check_shape": "llava-small",
    "check_kv_cache_gib": 2.0,
    "check_seconds": 30.0,
    "eager": False,
    "engines": ["plain", "kernel"],
}
_TWO_RANKS: dict[str, Any] = {
    "tensor_parallel": 2,
    "steerings": ["add", "adaptive"],
    "pairs": 8,
    # NVLink multicast can take down a host that others share; both engines do without.
    "environment": {
        "NCCL_NVLS_ENABLE": "0",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
        "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
        "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    },
}
_TWO_RANK_OPTIONS = {
    "compilation_config": {
        "pass_config": {"fuse_allreduce_rms": False},
        # The batches that are measured and a few more: a start in half the time.
        "cudagraph_capture_sizes": [1, 2, 8, 32, 64, 128, 256],
    }
}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        **_TINY,
        "models": [
            {"shape": "qwen2.5-vl-tiny", "kv_cache_gib": 0.2},
        ],
    },
    "tiny-tp2": {
        **_TINY,
        **_TWO_RANKS,
        "models": [{"shape": "qwen2.5-vl-tiny", "kv_cache_gib": 0.2}],
    },
    "h200": {
        **_H200,
        "models": [
            # LLaVA has no grouped attention: 0.5 MB a token, so the cache holds a part of 256
            # requests at a time; Qwen's holds them all.
            {"shape": "llava-1.5-7b", "kv_cache_gib": 60.0, "weights_gib": 14.0},
            {"shape": "qwen2.5-vl-7b", "kv_cache_gib": 30.0, "weights_gib": 16.0},
        ],
    },
    "h200-tp2": {
        **_H200,
        **_TWO_RANKS,
        "options": {**_H200["options"], **_TWO_RANK_OPTIONS},
        "models": [{"shape": "llava-1.5-7b", "kv_cache_gib": 48.0, "weights_gib": 14.0}],
    },
}
"""`kv_cache_gib` is shared by the engines of a model on one card."""
STEERINGS = ("add", "adaptive", "pairs", "stacked")


def workloads(batch: int, engines: Sequence[str], steerings: Sequence[str]) -> list[Workload]:
    """Everything measured at one batch size, plain vLLM first."""
    made = []
    for engine in engines:
        if engine == "plain":
            made.append(Workload(engine=engine, batch=batch, steering="none"))
            continue
        listed: Sequence[str] = ("idle", *steerings)
        if engine == "traced" and "kernel" in engines:
            # For comparison only, so that time is left for the other form.
            listed = ("idle", "add") if batch <= 64 else ()
        made += [Workload(engine=engine, batch=batch, steering=name) for name in listed]
    return made


class _Bench:
    """Children, results and the clock of one run."""

    def __init__(
        self,
        sizes: Mapping[str, Any],
        output: Path,
        result: BenchResult,
        time_limit: float,
        say: Callable[[str], None],
    ) -> None:
        self.sizes = sizes
        self.output = output
        self.result = result
        self.begin = time.monotonic()
        self.deadline = self.begin + time_limit
        self.children: dict[tuple[str, str], EngineProcess] = {}
        self.cache = Path(tempfile.mkdtemp(prefix="spo-bench-"))
        self._say = say
        self._lock = threading.Lock()

    def say(self, line: str) -> None:
        """A progress line with the time."""
        with self._lock:
            self._say(f"{time.monotonic() - self.begin:6.1f} s  {line}")

    def left(self) -> float:
        """Seconds until nothing new is measured."""
        return self.deadline - time.monotonic()

    def start(self, cards: Sequence[str]) -> None:
        """Start every engine at once and wait for all."""
        ranks = self.sizes.get("tensor_parallel", 1)
        for number, model in enumerate(self.sizes["models"]):
            engines = self.sizes["engines"]
            card = cards[number % len(cards)] if cards and ranks == 1 else None
            share = {"kv_cache_gib": _cache_gib(model, len(engines), ranks) / len(engines)}
            for name in engines:
                self._start_one(name, card, {**model, **share, "engine": name}, ranks)
        steered = [name for name in self.sizes["engines"] if name != "plain"]
        small = {
            "shape": self.sizes["check_shape"],
            "weights": True,
            "kv_cache_gib": self.sizes["check_kv_cache_gib"],
        }
        # Where the most memory is left.
        last = cards[-1] if cards else None
        for name in steered[: 1 if ranks > 1 else None]:
            self._start_one(f"{name}, checked", last, {**small, "engine": name}, 1)
        if ranks > 1 and steered:
            self._start_one("all ranks", None, {**small, "engine": steered[0]}, ranks)
        for shape, name in self._measured():
            self._ready(shape, name)
        for shape, name in self._measured():
            self._look(shape, name)
        self.write()

    def _measured(self) -> list[tuple[str, str]]:
        return [key for key in self.children if key[0] != self.sizes["check_shape"]]

    def _ready(self, shape: str, name: str) -> None:
        ready = self.ask(shape, name, None)
        if ready is not None:
            card = self.children[shape, name].card
            self.say(f"{shape} {name} ready after {ready['start_seconds']} s {card}")

    def _look(self, shape: str, name: str) -> None:
        """Facts of one engine, canary, parity and all."""
        facts = self.ask(shape, name, {"facts": {}})
        if facts is not None:
            self.result.facts[f"{shape} {name}"] = facts
            self._check(f"{shape} {name}", facts)
            self.say(f"{shape} {name}: {json.dumps(facts)}")

    def check(self) -> None:
        """The small engines with real weights; they started with the others and waited."""
        checked = [key for key in self.children if key[0] == self.sizes["check_shape"]]
        for shape, name in checked:
            self._ready(shape, name)
            self._look(shape, name)
        if "all ranks" in [name for _, name in checked]:
            self._compare_ranks(checked[0][1])
        for key in checked:
            child = self.children.pop(key, None)
            if child is not None:
                child.stop()
        self.write()

    def _start_one(
        self, name: str, card: str | None, changes: Mapping[str, Any], ranks: int
    ) -> None:
        shape = changes["shape"]
        stem = f"{shape}-{name}".replace(" ", "-")
        settings = {
            **self.sizes,
            **changes,
            "tensor_parallel": ranks,
            "folder": str(self.output / "models" / stem),
        }
        environment = dict(self.sizes.get("environment", {}))
        # Graphs that another version or a plain engine left behind must not be found.
        environment["VLLM_CACHE_ROOT"] = str(self.cache / stem)
        if card is not None:
            environment["CUDA_VISIBLE_DEVICES"] = card
        child = EngineProcess(settings, self.output / f"{stem}.log", environment)
        self.children[shape, name] = child

    def _check(self, name: str, facts: Mapping[str, Any]) -> None:
        """A fast engine that steers wrongly or mixes its requests up counts for nothing."""
        mixed = facts.get("mixed_batch")
        if mixed and not mixed["largest gap"] < mixed["least effect of steering"] / 2:
            self.result.failures.append(f"{name}: mixed batch unlike solo runs: {mixed}")
        for operator, seen in facts.get("parity", {}).items():
            if operator != "none" and not seen["mean gap"] < seen["mean effect"] / 4:
                self.result.failures.append(f"{name}: {operator} unlike Transformers: {seen}")

    def ask(
        self, shape: str, name: str, message: Mapping[str, Any] | None
    ) -> dict[str, Any] | None:
        """An answer of a child, or None; a child that fails is stopped and noted."""
        child = self.children.get((shape, name))
        if child is None:
            return None
        try:
            if message is not None:
                child.send(message)
            return child.receive(self.left() + 30.0)
        except (EngineError, OSError) as error:
            with self._lock:
                self.result.failures.append(f"{shape} {name}: {error}")
                child.stop()
                del self.children[shape, name]
            self.say(f"{shape} {name} FAILED: {error}")
            return None

    def measure(self, models: Sequence[Mapping[str, Any]], repeats: int) -> None:
        """All workloads of these models, until the repeats or the time are used up."""
        batches = list(self.sizes["batches"])
        for number in range(repeats):
            for model in models:
                # The last size is not always the one for which no time is left.
                shift = number % len(batches)
                for batch in batches[-shift:] + batches[:-shift] if shift else batches:
                    for run in range(self.sizes["runs"].get(batch, 1)):
                        if self.left() <= self.sizes["check_seconds"]:
                            return
                        self._turn(model["shape"], batch, f"{number}.{run}", number + run)

    def _turn(self, shape: str, batch: int, turn: str, rotation: int) -> None:
        engines = [name for name in self.sizes["engines"] if (shape, name) in self.children]
        listed = workloads(batch, engines, self.sizes.get("steerings", STEERINGS))
        shift = rotation % len(listed) if listed else 0
        seen = []
        for workload in listed[shift:] + listed[:shift]:
            answer = self.ask(shape, workload.engine, {"measure": workload.to_wire()})
            if answer is not None:
                seen.append(Measure(model=shape, workload=workload, turn=turn, **answer))
            if self.left() < self.sizes["check_seconds"] - 20.0:
                break
        with self._lock:
            self.result.measures += seen
        self.write()
        shares = ", ".join(f"{m.workload.name} {m.tokens_per_second:,.0f}" for m in seen)
        self.say(f"{shape} batch {batch} turn {turn}: {shares}")

    def _compare_ranks(self, one: str) -> None:
        """Steered log-probabilities of one rank and of all."""
        shape, names = self.sizes["check_shape"], (one, "all ranks")
        answers = [self.ask(shape, name, {"logprobs": {}}) for name in names]
        found = [answer for answer in answers if answer is not None]
        if len(found) == len(names):
            self.result.compare_ranks(shape, *found)
            self.say(f"{shape} ranks: {json.dumps(self.result.ranks[shape])}")

    def finish(self) -> None:
        """What the workers say about graphs and steps, then stop everything."""
        for shape, name in list(self.children):
            if name != "plain" and self.left() > -30.0:
                facts = self.ask(shape, name, {"describe": {}})
                if facts is not None:
                    self.result.facts.setdefault(f"{shape} {name}", {})["after"] = facts
        for child in self.children.values():
            child.stop()
        shutil.rmtree(self.cache, ignore_errors=True)
        self.write()

    def write(self) -> None:
        """Everything so far; a killed run loses nothing."""
        with self._lock:
            self.result.write(self.output)


def _cache_gib(model: Mapping[str, Any], engines: int, ranks: int) -> float:
    """What the engines of a model share for their caches; less on a card that holds less."""
    import torch

    wanted = float(model["kv_cache_gib"])
    if "weights_gib" not in model or not torch.cuda.is_available():
        return wanted
    card = torch.cuda.get_device_properties(0).total_memory / 2**30
    return min(wanted, 0.92 * card - engines * (model["weights_gib"] / ranks + 4.0))


def visible_cards() -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES, one a card; none without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]


def run(
    preset: str,
    output: Path,
    *,
    time_limit: float,
    repeats: int = 1,
    engines: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    say: Callable[[str], None] = print,
) -> BenchResult:
    """Start all engines of a preset at once and measure them in turns.

    Args:
        preset: key of `PRESETS`.
        output: folder for results.json, table.md, model folders and engine logs.
        time_limit: seconds after which nothing new is measured.
        repeats: rounds over all workloads.
        engines: some of plain, kernel, traced; None for the preset's.
        batches: requests at once; None for the preset's.
        say: receives progress lines.
    """
    sizes = dict(PRESETS[preset])
    if engines is not None:
        sizes["engines"] = list(engines)
    if batches is not None:
        sizes["batches"] = list(batches)
    check_entry_point()
    output.mkdir(parents=True, exist_ok=True)
    result = BenchResult(preset=preset)
    bench = _Bench(sizes, output, result, time_limit, say)
    cards = visible_cards()
    try:
        bench.start(cards)
        if sizes.get("tensor_parallel", 1) > 1:
            cards = cards[:1]
        lanes = max(1, min(len(cards), len(sizes["models"])))
        with ThreadPoolExecutor(lanes) as pool:
            shares = [sizes["models"][i::lanes] for i in range(lanes)]
            list(pool.map(lambda models: bench.measure(models, repeats), shares))
        bench.check()
    finally:
        bench.finish()
    return result
