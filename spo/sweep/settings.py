"""What a sweep file may say: the space, the objectives, the search, the validation, the pool.

Importable without torch and Ray, like `spo.config`. A sweep file names a run configuration as its
`base`; keys of `RunConfig` beside the sweep's own keys override it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from spo.config import RunConfig
from spo.config.base import Positive, Slice
from spo.config.load import assign_override, merge, read_run, read_yaml, split_override, validated
from spo.config.text import dump
from spo.errors import ConfigError, DataError

Metric = Literal["toxicity", "utility", "kl", "nll", "degenerate"]
Mode = Literal["min", "max"]
Scalar = bool | int | float | str

BEST_IS: Mapping[Metric, Mode] = {
    "toxicity": "min",
    "utility": "max",
    "kl": "min",
    "nll": "min",
    "degenerate": "min",
}
"""Every metric that a trial measures and its better direction; see `spo.sweep.validation`."""


class WindowSpace(Slice):
    """Runs of neighbouring decoder blocks."""

    first: tuple[int, int]
    """Lowest and highest first block."""
    width: tuple[Positive, Positive]
    """Fewest and most blocks."""
    step: Positive = 1
    """Distance between two first blocks."""


class SubsetSpace(Slice):
    """Any set out of some decoder blocks, each in or out on its own."""

    of: str
    """Blocks to choose from, e.g. "8-20" or "8,12,16"."""
    at_most: Positive | None = None


class Parameter(Slice):
    """One dimension of the space: exactly one of the kinds, and when it applies."""

    choices: tuple[Any, ...] | None = None
    """Named values; layer sets are written as text, e.g. "12-16" or "8,12,16"."""
    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    integer: tuple[int, int] | None = None
    """Both ends belong to it."""
    window: WindowSpace | None = None
    subset: SubsetSpace | None = None
    step: Annotated[float, Field(gt=0)] | None = None
    """Resolution of `uniform` and `integer`."""
    when: Mapping[str, Scalar | tuple[Scalar, ...]] = {}
    """Parameters named earlier and the values of theirs for which this one applies; elsewhere the
    base configuration's value is kept."""
    grid: Annotated[int, Field(ge=2)] = 5
    """Number of values of a continuous range in a grid search."""

    @property
    def kind(self) -> str:
        """Which of the kinds it is."""
        return next(name for name in _KINDS if getattr(self, name) is not None)

    @model_validator(mode="after")
    def _makes_sense(self) -> Parameter:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of {', '.join(_KINDS)}, got {given or 'none'}")
        for name, (low, high) in self._ranges().items():
            if low > high:
                raise ValueError(f"{name} [{low}, {high}] is empty: the low end comes first")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform needs a low end above 0, got {self.loguniform[0]}")
        if self.choices is not None and not self.choices:
            raise ValueError("choices is empty: name at least one value")
        if self.choices is not None and len(set(map(repr, self.choices))) < len(self.choices):
            raise ValueError(f"choices names a value twice: {list(self.choices)}")
        if self.step and self.kind not in ("uniform", "integer"):
            raise ValueError(f"'step' goes with uniform and integer, not with {self.kind}")
        return self

    def _ranges(self) -> dict[str, tuple[float, float]]:
        ranges: dict[str, tuple[float, float] | None] = {
            "uniform": self.uniform,
            "loguniform": self.loguniform,
            "integer": self.integer,
            "window.first": self.window.first if self.window else None,
            "window.width": self.window.width if self.window else None,
        }
        return {name: ends for name, ends in ranges.items() if ends is not None}


_KINDS = ("choices", "uniform", "loguniform", "integer", "window", "subset")


class AshaConfig(Slice):
    """Asynchronous successive halving over learner steps (arXiv 1810.05934), multi-objective: a
    trial is ranked by how many others at the same rung dominate it."""

    grace_steps: Positive = 4
    """First rung: no trial is stopped before it."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """About one in this many goes on from each rung to the next."""


class SearchConfig(Slice):
    """How the space is searched."""

    algorithm: Literal["tpe", "nsga2", "random", "grid"] = "tpe"
    trials: Positive = 50
    """Finished trials to reach, stopped ones counted; raise it to extend a finished sweep. A grid
    search takes its own number."""
    concurrent: Positive = 2
    """Trials at the same time."""
    seed: int = 0
    startup_trials: Positive = 12
    """Random trials before `tpe` models the space."""
    asha: AshaConfig | None = None
    """Early stopping of trials that train; None runs each to its end."""
    max_failed: Annotated[int, Field(ge=0)] = 5
    """Failed trials after which the sweep stops."""


class ValidationConfig(Slice):
    """What the objectives are measured on: training prompts that no trial learns from."""

    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the training prompts, chosen by a hash of their ids."""
    harm_prompts: Positive = 48
    benign_prompts: Annotated[int, Field(ge=0)] = 24
    samples_per_prompt: Positive = 1
    max_tokens: Positive = 24
    benign_tokens: Positive = 40
    bootstrap: Positive = 500


class PoolConfig(Slice):
    """Engines and reward models of the trials."""

    mode: Literal["shared", "isolated"] = "shared"
    """`isolated` starts an engine and reward models of its own for each trial."""
    lease_s: Annotated[float, Field(gt=0)] = 60.0
    """Time without a sign of life after which a trial's slots are taken back."""
    wait_s: Positive = 900
    """Longest wait of a trial for a slot."""


class SweepConfig(Slice):
    """A sweep. Saved, resolved, in the sweep's folder."""

    name: str = "sweep"
    base: Path | None = None
    """Run configuration, relative to the sweep file; None is the built-in default."""
    vector: Path | None = None
    """Artifact to search coefficients on; None makes the Stage I vector of each trial."""
    train: Literal["auto", "never"] = "auto"
    """`auto`: trials train when the space holds keys of learn, rollout or reward."""
    objectives: Mapping[Metric, Mode] = {"toxicity": "min", "utility": "max", "kl": "min"}
    space: Mapping[str, Parameter] = {}
    """Configuration key to dimension, e.g. `steering.coefficient`."""
    first: tuple[Mapping[str, Any], ...] = ()
    """Points to evaluate first, e.g. {estimate.layers: "10-14", steering.coefficient: 0.5}."""
    search: SearchConfig = SearchConfig()
    validation: ValidationConfig = ValidationConfig()
    pool: PoolConfig = PoolConfig()
    compare: bool = True
    """Evaluate the chosen setting and the base on the held-out prompts when the search is over."""

    @model_validator(mode="after")
    def _makes_sense(self) -> SweepConfig:
        if not self.space:
            raise ValueError("space is empty: name at least one configuration key to search")
        if not self.objectives:
            raise ValueError(f"objectives is empty: choose from {', '.join(BEST_IS)}")
        wrong = [name for name, mode in self.objectives.items() if BEST_IS[name] != mode]
        if wrong:
            raise ValueError(f"objectives {wrong} point the wrong way; better is {dict(BEST_IS)}")
        return self

    def to_yaml(self) -> str:
        """The resolved sweep."""
        content = self.model_dump(mode="json", exclude_defaults=True)
        return dump({"name": self.name, **content})


def load_sweep(path: Path | None, overrides: Sequence[str] = ()) -> tuple[SweepConfig, RunConfig]:
    """Read a sweep file and its base configuration; overrides may change either.

    A key at the top of the file or of an override that is a section of `RunConfig` changes the
    base, every other key the sweep. The run's `name` is the sweep's.

    Raises:
        ConfigError: a file cannot be read, or a key is unknown or out of range; names the key.
    """
    tree: dict[str, Any] = {} if path is None else read_yaml(path)
    run_keys = set(RunConfig.model_fields) - {"name"}
    changes = {key: tree.pop(key) for key in list(tree) if key in run_keys}
    base_tree: dict[str, Any] = {}
    for override in overrides:
        keys, value = split_override(override)
        if keys[0] in run_keys:
            continue
        assign_override(tree, keys, value, override)
    sweep = validated(SweepConfig, tree, path)
    if sweep.base is not None:
        base_path = sweep.base if path is None else path.parent / sweep.base
        base_tree, _ = read_run(base_path)
    merge(base_tree, changes)
    for override in overrides:
        keys, value = split_override(override)
        if keys[0] in run_keys:
            assign_override(base_tree, keys, value, override)
    base_tree["name"] = sweep.name
    base = validated(RunConfig, base_tree, path)
    if base.data.attacks:
        raise ConfigError(
            f"sweep {sweep.name!r}: its base has {len(base.data.attacks)} data.attacks, and trials "
            "attack no pictures; set data.attacks=[] and train the chosen setting with them"
        )
    if base.learn.start != "stage1":
        raise ConfigError(
            f"sweep {sweep.name!r}: learn.start={base.learn.start!r}, and trials begin with their "
            "own Stage I vector; leave it out, or name an artifact by 'vector'"
        )
    return sweep, base


def load_finished(folder: Path) -> tuple[SweepConfig, RunConfig]:
    """The configuration that a sweep's folder holds."""
    if not (folder / "sweep.yaml").is_file():
        raise DataError(f"{folder} holds no sweep (no sweep.yaml); run jobs.sweep first")
    config = validated(SweepConfig, read_yaml(folder / "sweep.yaml"), folder / "sweep.yaml")
    base = validated(RunConfig, read_yaml(folder / "config.yaml"), folder / "config.yaml")
    return config, base


def parse_layers(text: str) -> tuple[int, ...]:
    """Decoder blocks written as "12-16" or "8,12,16-18"; ascending and unique.

    Raises:
        ConfigError: the text is not of this form.
    """
    layers: set[int] = set()
    for part in str(text).split(","):
        first, sign, last = part.strip().partition("-")
        if not first.isdigit() or (sign and not last.isdigit()):
            raise ConfigError(f'layers are written as "12-16" or "8,12,16", got {text!r}')
        low, high = int(first), int(last or first)
        if low > high:
            raise ConfigError(f"layers {text!r}: {low}-{high} is empty, the lower one is first")
        layers |= set(range(low, high + 1))
    return tuple(sorted(layers))


def format_layers(layers: Sequence[int]) -> str:
    """Inverse of `parse_layers`, as short as it goes."""
    parts: list[list[int]] = []
    for layer in sorted(set(layers)):
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 2 else ",".join(map(str, p)) for p in parts)
