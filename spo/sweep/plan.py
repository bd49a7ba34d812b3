"""Where a sweep keeps things, and what one trial is.

A trial is named by a digest of everything that decides its result, so that a trial that is
suggested again, by the search or after a kill, continues where its folder is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spo.config import RunConfig
from spo.errors import DataError
from spo.sweep.settings import Metric, Scalar, SweepConfig
from spo.sweep.space import Space
from spo.sweep.validation import Measured, dump_measured, load_measured

BASE = "base"
"""Label of the setting that the sweep starts from: the base configuration, unchanged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepFolder:
    """Files of a sweep, all inside its run folder."""

    path: Path

    @property
    def storage(self) -> Path:
        """Optuna's database."""
        return self.path / "study.db"

    @property
    def rungs(self) -> Path:
        return self.path / "rungs.json"

    @property
    def lock(self) -> Path:
        return self.path / "sweep.lock"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def table(self) -> Path:
        return self.path / "sweep.csv"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def heldout(self) -> Path:
        """Comparison on the held-out prompts."""
        return self.path / "heldout.json"

    def trial(self, digest: str) -> Path:
        return self.path / "trials" / digest

    def stage1(self, digest: str) -> Path:
        """Run folder of one Stage I vector, shared by the trials that use it."""
        return self.path / "vectors" / digest


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialPlan:
    """Everything that a trial's process needs besides its point. Plain values: it crosses Ray."""

    sweep: SweepConfig
    base: RunConfig
    num_layers: int
    prefix: str
    """Names of the shared actors; "" where each trial starts its own."""
    steps: tuple[int, ...]
    """Learner steps after which trials are measured, the last one ends them; (0,): no training."""

    @property
    def trains(self) -> bool:
        """Whether trials train."""
        return self.steps != (0,)

    @property
    def folder(self) -> SweepFolder:
        """The sweep's files."""
        return SweepFolder(path=self.base.run_dir)

    def space(self) -> Space:
        """The space; it was checked before the plan was made."""
        return Space(self.sweep.space, self.base, num_layers=self.num_layers, check=False)

    def config(self, values: Mapping[str, Scalar]) -> RunConfig:
        """Run configuration of a point; the base itself for no values."""
        return self.space().config(values) if values else self.base

    def digest(self, config: RunConfig) -> str:
        """Digest of everything that decides a trial's result."""
        sections = ["seed", "model", "data", "extract", "estimate", "steering"]
        if self.trains:
            sections += ["rollout", "reward", "learn"]
        also = [self.sweep.validation.model_dump_json(), str(self.sweep.vector), repr(self.trains)]
        return config.digest_of(*sections, also="|".join(also))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """What is kept of a trial, in `result.json` of its folder."""

    digest: str
    values: Mapping[str, Scalar]
    """The point; empty for the base."""
    step: int
    """Learner steps behind the figures."""
    steps: int
    """Learner steps of a whole trial."""
    measured: Measured
    layers: tuple[int, ...]
    sha256: str
    """Hash of the vector."""
    seconds: float
    history: tuple[Mapping[str, Any], ...] = field(default=())
    """Figures by learner step."""

    @property
    def whole(self) -> bool:
        """Whether the trial ran to its end."""
        return self.step >= self.steps

    def mean(self, metric: Metric) -> float:
        """Mean of a metric over the validation prompts."""
        return self.measured.metrics[metric].mean

    def to_json(self) -> str:
        """Inverse of `from_json`."""
        content = {
            name: getattr(self, name)
            for name in ("digest", "values", "step", "steps", "layers", "sha256", "seconds")
        }
        content["measured"] = dump_measured(self.measured)
        content["history"] = list(self.history)
        return json.dumps(content)

    @classmethod
    def from_json(cls, text: str) -> TrialResult:
        """Read what `to_json` wrote; DataError when it is something else."""
        try:
            content = json.loads(text)
            return cls(
                measured=load_measured(content.pop("measured")),
                layers=tuple(content.pop("layers")),
                history=tuple(content.pop("history")),
                **content,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"expected the result of a trial, got {error!r}") from error


def read_result(folder: Path) -> TrialResult | None:
    """The result in a trial's folder; None where there is none yet."""
    path = folder / "result.json"
    return TrialResult.from_json(path.read_text()) if path.is_file() else None


def stage1_digest(config: RunConfig) -> str:
    """What a Stage I vector depends on beyond the extracted activations."""
    sources = [(source.label, source.weight) for source in config.extract.sources]
    content = [config.estimate.model_dump(mode="json"), sources]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
