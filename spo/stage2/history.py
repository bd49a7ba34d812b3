"""What a run tells about itself: history (JSONL), TensorBoard, Ray's metrics, trackers, rollouts.

Figures of a batch and of the learner's step are joined into one line a step. Every rollout is kept
in Parquet with its reward, so that a step can be looked at, and learned from, again.
"""

from __future__ import annotations

import importlib
import json
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spo.config import RewardConfig
from spo.config.rewards import CROSSCHECK, HarmPart, LlmPart, ToxicityPart
from spo.errors import ConfigError
from spo.files import replaced
from spo.records import Batch

_LOG = logging.getLogger(__name__)
_ALARM_STEPS = 3
Sink = Callable[[int, Mapping[str, float]], None]
"""Takes a step and its flat figures."""


class Recorder:
    """Joins and writes the figures of a run.

    Args:
        reward: when to raise the reward-hacking alarm.
        history: JSONL file, one line a step; None keeps none.
        rollouts: folder of Parquet files, one a step; None keeps none.
        sinks: where flat figures go besides.
    """

    def __init__(
        self,
        reward: RewardConfig,
        *,
        history: Path | None = None,
        rollouts: Path | None = None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self._reward = reward
        self._by_prompt = {CROSSCHECK} | {
            part.name
            for part in reward.counted
            if isinstance(part, ToxicityPart | HarmPart | LlmPart) and part.prompts == "all"
        }
        self._history = history
        self._rollouts = rollouts
        self._sinks = list(sinks)
        self._figures: dict[int, dict[str, Any]] = {}
        self._first: dict[str, float] = {}
        self._gaps: list[float] = []

    def batch(self, batch: Batch) -> None:
        """Figures and rollouts of a new batch."""
        self._figures[batch.step] = _figures_of(batch, self._by_prompt)
        if self._rollouts is not None:
            _write_rollouts(batch, self._rollouts / f"step-{batch.step:06d}.parquet")

    def record(self, learned: Mapping[str, Any], made: Mapping[str, Any]) -> None:
        """One line of the history: the batch, what the coordinator adds, what was learned."""
        line = dict(learned)
        figures = self._figures.pop(line["step"], {})
        seconds = {**made.get("seconds", {}), "learn": line.pop("learn_s")}
        line = {**figures, **made, **line, "seconds": seconds}
        line["alarms"] = [*line.get("alarms", ()), *self._hacking(figures.get("reward_parts", {}))]
        for alarm in line["alarms"]:
            _LOG.warning("step %d: %s", line["step"], alarm)
        if self._history is not None:
            with self._history.open("a") as file:
                file.write(json.dumps(line) + "\n")
        flat = flatten(line)
        for sink in self._sinks:
            sink(line["step"], flat)

    def state(self) -> dict[str, Any]:
        """What `restore` needs: the alarm compares with the first step."""
        return {"first": dict(self._first), "gaps": list(self._gaps)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self._first, self._gaps = dict(state["first"]), list(state["gaps"])

    def _hacking(self, parts: Mapping[str, float]) -> list[str]:
        if "crosscheck_harm" not in parts or "toxicity_harm" not in parts:
            return []
        now = {name: parts[f"{name}_harm"] for name in ("toxicity", "crosscheck")}
        if not self._first:
            self._first = {name: max(value, 1e-3) for name, value in now.items()}
        left = {name: now[name] / self._first[name] for name in now}
        self._gaps = [*self._gaps, left["crosscheck"] - left["toxicity"]][-_ALARM_STEPS:]
        if len(self._gaps) < _ALARM_STEPS or min(self._gaps) <= self._reward.hacking_gap:
            return []
        return [
            f"reward hacking: {left['toxicity']:.0%} of the first toxicity is left by the reward "
            f"model and {left['crosscheck']:.0%} by the cross-check; read the answers of this step"
        ]


class IdleClock:
    """Seconds in which no group was being sampled: the engines waited for the learner."""

    def __init__(self) -> None:
        self._running = 0
        self._since: float | None = None
        self._idle = 0.0

    def __enter__(self) -> None:
        if self._running == 0 and self._since is not None:
            self._idle += time.monotonic() - self._since
        self._running += 1

    def __exit__(self, *_: object) -> None:
        self._running -= 1
        if self._running == 0:
            self._since = time.monotonic()

    def take(self) -> float:
        """Idle seconds since the last call."""
        now = time.monotonic()
        if self._running == 0 and self._since is not None:
            self._idle += now - self._since
            self._since = now
        idle, self._idle = self._idle, 0.0
        return idle


def flatten(figures: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested figures as `group/name`; lists by index, words left out."""
    flat: dict[str, float] = {}
    for name, value in figures.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{path}/")
        elif isinstance(value, (list, tuple)):
            flat |= flatten({str(i): item for i, item in enumerate(value)}, f"{path}/")
        elif isinstance(value, bool | int | float):
            flat[path] = float(value)
    return flat


def open_sinks(names: Sequence[str], folder: Path, run: str) -> list[Sink]:
    """The loggers that a configuration names.

    Raises:
        ConfigError: one of them is not installed.
    """
    return [_SINKS[name](folder, run) for name in names]


def _tensorboard(folder: Path, run: str) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard" / run))

    def write(step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write


def _ray(folder: Path, run: str) -> Sink:
    from ray.util.metrics import Gauge

    gauges: dict[str, Any] = {}

    def write(step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            key = "spo_" + "".join(c if c.isalnum() else "_" for c in name)
            if key not in gauges:
                gauges[key] = Gauge(key, description=name, tag_keys=("run",))
            gauges[key].set(value, tags={"run": run})

    return write


def _wandb(folder: Path, run: str) -> Sink:
    tracked = _library("wandb").init(project="spo-vlm", name=run, id=run, dir=str(folder))
    return lambda step, figures: tracked.log(dict(figures), step=step)


def _mlflow(folder: Path, run: str) -> Sink:
    library = _library("mlflow")
    library.set_experiment("spo-vlm")
    library.start_run(run_name=run)
    return lambda step, figures: library.log_metrics(dict(figures), step=step)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"learn.loggers names {name!r}, which is not installed; install it or leave it out"
        ) from error


_SINKS: dict[str, Callable[[Path, str], Sink]] = {
    "tensorboard": _tensorboard,
    "ray": _ray,
    "wandb": _wandb,
    "mlflow": _mlflow,
}


def _figures_of(batch: Batch, by_prompt: Collection[str]) -> dict[str, Any]:
    """Figures of a batch; parts named in `by_prompt` also by kind of prompt."""
    scored = [item for group in batch.groups for item in group]
    parts: dict[str, list[float]] = {}
    for item in scored:
        kind = item.rollout.prompt.kind.value
        for name, value in item.reward.parts.items():
            parts.setdefault(name, []).append(value)
            if name in by_prompt:
                parts.setdefault(f"{name}_{kind}", []).append(value)
    totals = [item.reward.total for item in scored if item.reward.total is not None]
    stale = batch.staleness or (0,)
    tokens = sum(len(item.rollout.token_ids) for item in scored)
    return {
        "reward": float(np.mean(totals)),
        "reward_parts": {name: float(np.mean(values)) for name, values in parts.items()},
        "rollouts": len(scored),
        "tokens": tokens,
        "staleness": {"mean": float(np.mean(stale)), "max": max(stale)},
        "dropped": dict(batch.dropped),
    }


def _write_rollouts(batch: Batch, path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    stale = batch.staleness or (0,) * len(batch.groups)
    rows = [
        {
            "step": batch.step,
            "group": i,
            "staleness": stale[i],
            "request_id": item.rollout.request_id,
            "prompt_id": item.rollout.prompt.prompt_id,
            "kind": item.rollout.prompt.kind.value,
            "prompt": item.rollout.prompt.text,
            "image": item.rollout.prompt.image,
            "answer": item.rollout.text,
            "token_ids": list(item.rollout.token_ids),
            "logprob": item.rollout.logprob,
            "version": item.rollout.receipt.version if item.rollout.receipt else None,
            "vector_sha256": item.rollout.receipt.sha256 if item.rollout.receipt else "",
            "reward": item.reward.total,
            "parts": json.dumps(dict(item.reward.parts)),
        }
        for i, group in enumerate(batch.groups)
        for item in group
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as part:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), part)
