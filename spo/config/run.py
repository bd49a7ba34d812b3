"""Configuration: one frozen model for each component, and how files and overrides become one.

Importable without torch and Ray. Unknown keys are errors. A component takes only its own slice;
only jobs, the pipeline and the sweep see `RunConfig`. Names carry units.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from spo.config.base import Fraction, Location, Positive, Slice
from spo.config.datasets import DatasetConfig
from spo.config.evaluation import AttackConfig, EvaluateConfig
from spo.config.serving import ServeConfig
from spo.config.stage1 import (
    AdversarialSource,
    AttributionSource,
    ContinuationSource,
    EstimateConfig,
    ExtractConfig,
    FileSource,
    InstructionSource,
    SourceConfig,
    TypographicSource,
)
from spo.config.stage2 import EngineConfig, LearnConfig, RewardConfig, RolloutConfig
from spo.errors import ConfigError
from spo.records import Operator, Positions

__all__ = [
    "AdversarialSource",
    "AttackConfig",
    "AttributionSource",
    "ContinuationSource",
    "DataConfig",
    "DatasetConfig",
    "EngineConfig",
    "EstimateConfig",
    "EvaluateConfig",
    "ExtractConfig",
    "FileSource",
    "InstructionSource",
    "LearnConfig",
    "ModelConfig",
    "RayConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SourceConfig",
    "SteeringConfig",
    "TypographicSource",
    "load_config",
]


class ModelConfig(Slice):
    """The frozen model."""

    id: str = "testbed"
    """Hub id, local folder in hub layout, or "testbed" for the embedded default."""
    revision: str | None = None


class DataConfig(Slice):
    """Prompts of the preference stage and of the evaluation."""

    train: str = "testbed"
    """"testbed", or a JSONL file of prompts (fields of `spo.records.Prompt`)."""
    heldout: str = "testbed"
    harm_prompts: Positive = 256
    """Number of harmful training prompts drawn from `train`."""
    benign_prompts: Positive = 128
    image_fraction: Fraction = 0.5
    """Share of the testbed's harmful prompts that come with a picture."""
    typographic_fraction: Fraction = 0.0
    """Share of the harmful training prompts whose words are drawn into the picture: the attack in
    the loop."""
    picture_size: Positive | None = None
    """Side of such a drawn picture; None takes the testbed's own, or 336 for other prompts."""
    attacks: tuple[AttackConfig, ...] = ()
    """Picture attacks in the loop of Stage II, made before its first step, on training prompts and
    training targets; an `adaptive` one goes through `learn.start`'s vector as it is applied."""
    attacked_fraction: Fraction = 0.25
    """Share of the harmful training prompts asked with an attacked picture, where `attacks` has
    any. The testbed asks about the picture then."""
    attacked_pictures: Positive = 2
    """Clean pictures that each attack starts from."""
    attack_targets_file: Path | None = None
    """Harmful sentences, one a line, that these attacks aim at; the testbed has its own. Not those
    of `evaluate.attack_targets_file`."""

    @model_validator(mode="after")
    def _pictures_only(self) -> DataConfig:
        kinds = [attack.kind for attack in self.attacks if attack.kind != "pgd"]
        if kinds:
            raise ValueError(
                f"'attacks' takes kind 'pgd', got {kinds}; drawn words: 'typographic_fraction'"
            )
        return self


class SteeringConfig(Slice):
    """How the vector is applied, in training, evaluation and serving alike."""

    operator: Operator = Operator.ADD
    positions: Positions = Positions.ALL
    coefficient: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    """With `add`: dose of each layer relative to its mean hidden norm, at full layer weight."""


class RayConfig(Slice):
    """The Ray cluster."""

    address: str | None = None
    """None: the cluster of `ray job submit`, or a local one; else its address."""
    num_cpus: Positive | None = None
    """CPUs of a local cluster; None takes Ray's own count."""
    namespace: str = "spo"
    node_wait_s: Annotated[int, Field(ge=0)] = 0
    """How long an autoscaler gets to add nodes that a job lacks; 0 refuses at once."""


class RunConfig(Slice):
    """Everything one run needs. Saved, resolved, beside every output."""

    name: str = "testbed"
    seed: int = 0
    output_dir: Location = "outputs"
    """Folder, or URL such as s3://bucket/prefix; a run writes to `output_dir/name`."""
    cache_dir: Path = Path("~/.cache/spo-vlm")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    extract: ExtractConfig = ExtractConfig()
    estimate: EstimateConfig = EstimateConfig()
    steering: SteeringConfig = SteeringConfig()
    engine: EngineConfig = EngineConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    learn: LearnConfig = LearnConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    serve: ServeConfig = ServeConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _learns_from_what_it_samples(self) -> RunConfig:
        if self.rollout.static and self.learn.objective in ("rloo", "gspo"):
            raise ValueError(
                f"rollout.static goes with an objective on pairs, got {self.learn.objective!r}; "
                "set learn.objective to dpo, simpo, bipo or reps"
            )
        return self

    @property
    def run_url(self) -> str | None:
        """URL of this run when its outputs go to remote storage; None for a folder."""
        return f"{self.output_dir.rstrip('/')}/{self.name}" if "://" in self.output_dir else None

    @property
    def run_dir(self) -> Path:
        """Absolute folder of this run's outputs; a local mirror of `run_url` if there is one."""
        if self.run_url is not None:
            return self.cache / "mirror" / f"{self.name}-{_digest(self.run_url)[:8]}"
        return (Path(self.output_dir) / self.name).expanduser().absolute()

    @property
    def storage(self) -> str:
        """Where Ray keeps its own checkpoints: `run_url`, or `run_dir` as text."""
        return self.run_url or str(self.run_dir)

    @property
    def cache(self) -> Path:
        """Absolute folder of assembled models and drawn pictures."""
        return self.cache_dir.expanduser().absolute()

    @property
    def digest(self) -> str:
        """Digest of everything that changes results; output folders and Ray address do not."""
        places = dict.fromkeys(("output_dir", "cache_dir", "ray", "serve", "name"), True)
        return _digest(self.model_dump(mode="json", exclude={**places, **_MANNER}))

    def digest_of(self, *sections: str, also: str = "") -> str:
        """Digest of some sections, and of `also`: what the result of one stage depends on."""
        content = self.model_dump(mode="json", include=set(sections), exclude=_MANNER)
        return _digest([content, also])

    def to_yaml(self) -> str:
        """The resolved configuration."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


_MANNER = {"learn": {"compile": True}, "engine": {"in_process": True}}
"""Settings that change how something is computed, and no result beyond its last bits."""


def _placeless(content: Any) -> Any:
    """Without node labels: where a process runs does not change what it computes."""
    if isinstance(content, dict):
        return {key: _placeless(value) for key, value in content.items() if key != "labels"}
    return [_placeless(item) for item in content] if isinstance(content, list) else content


def _digest(content: object) -> str:
    content = _placeless(content)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `key.sub=value` overrides, validate.

    A file may begin with `base: FILE`, another one beside it: its own keys are laid over that.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown or out of range; names the key.
    """
    tree, files = ({}, "") if path is None else read_run(path)
    for override in overrides:
        assign_override(tree, *split_override(override), override)
    return validated(RunConfig, tree, files)


_Model = TypeVar("_Model", bound=BaseModel)


def validated(kind: type[_Model], tree: dict[str, Any], path: Path | str | None) -> _Model:
    """Settings of one kind out of a tree; ConfigError names every key that cannot be used."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, item['loc']))}: {item['msg']} (got {item['input']!r})"
            for item in error.errors()
        ]
        where = f" in {path}" if path else ""
        raise ConfigError(
            f"{len(lines)} setting(s){where} cannot be used:\n"
            + "\n".join(lines)
            + "\n`--dry-run` without overrides prints every key with its default"
        ) from error


def split_override(override: str) -> tuple[list[str], Any]:
    """Keys and value of `key.sub=value`."""
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"expected key.sub=value, got {override!r}, e.g. learn.steps=10")
    return key.split("."), _parse_value(value)


def read_run(path: Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], str]:
    """The keys of a run's file over those of its `base`, and the files' names for messages.

    Raises:
        ConfigError: a file cannot be read, or bases go in a circle.
    """
    if path.resolve() in above:
        raise ConfigError(f"{path} is a base of itself: {' -> '.join(map(str, above))}")
    tree = read_yaml(path)
    base = tree.pop("base", None)
    if base is None:
        return tree, str(path)
    if not isinstance(base, str):
        raise ConfigError(f"{path}: 'base' names a file beside it, got {base!r}")
    whole, files = read_run(path.parent / base, (*above, path.resolve()))
    merge(whole, tree)
    return whole, f"{path} with its base {files}"


def merge(tree: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Lay changes over a tree in place; groups of settings join, values and lists replace."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            merge(tree[key], value)
        else:
            tree[key] = value


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a YAML file; ConfigError when it cannot be read."""
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: it is not UTF-8 text ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys at the top level, got {type(tree).__name__}")
    return tree


def _parse_value(text: str) -> Any:
    """A YAML value, except that `1e-4` is a number (YAML 1.1 reads it as a string)."""
    if "e" in text.lower():
        try:
            return float(text)
        except ValueError:
            pass  # a word with an "e"
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"the value {text!r} of an override is not valid YAML; put text with special signs "
            "in quotes"
        ) from error


def assign_override(tree: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    """Set one key of a tree in place; `override` is the text for the message."""
    for key in keys[:-1]:
        branch = tree.setdefault(key, {})
        if not isinstance(branch, dict):
            raise ConfigError(f"override {override!r}: {key!r} is a value, not a group of settings")
        tree = branch
    tree[keys[-1]] = value
