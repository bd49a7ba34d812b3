"""Configuration: one frozen model for each component, and how files and overrides become one.

Importable without torch and Ray. Unknown keys are errors. A component takes only its own slice;
only jobs, the pipeline and the sweep see `RunConfig`. Names carry units.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spo.errors import ConfigError
from spo.records import Operator, Positions
from spo.serve_config import ServeConfig

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class _Slice(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(_Slice):
    """The frozen model."""

    id: str = "testbed"
    """Hub id, local folder in hub layout, or "testbed" for the embedded default."""
    revision: str | None = None


class DataConfig(_Slice):
    """Prompts of the preference stage and of the evaluation."""

    train: str = "testbed"
    """"testbed", or a JSONL file of prompts (fields of `spo.records.Prompt`)."""
    heldout: str = "testbed"
    harm_prompts: Positive = 256
    """Number of harmful training prompts drawn from `train`."""
    benign_prompts: Positive = 128
    image_fraction: Fraction = 0.5
    """Share of the testbed's harmful prompts that come with a picture."""


class SourceConfig(_Slice):
    """One contrast of Stage I."""

    kind: Literal["continuation", "instruction", "typographic", "file"]
    """`continuation`: toxic against clean text; `instruction`: harmful against harmless openings;
    `typographic`: the words in the picture against a plain picture; `file`: your own pairs."""
    rows: Positive = 300
    """Rows on each side."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    path: Path | None = None
    """JSONL with fields id, text, side ("harm" or "safe"), and optionally image; for `file`."""

    @model_validator(mode="after")
    def _path_fits_kind(self) -> SourceConfig:
        if (self.kind == "file") != (self.path is not None):
            raise ValueError("'path' goes with kind 'file' and with no other kind")
        return self


class ExtractConfig(_Slice):
    """Activation extraction with Ray Data."""

    sources: tuple[SourceConfig, ...] = (
        SourceConfig(kind="continuation"),
        SourceConfig(kind="instruction"),
        SourceConfig(kind="typographic", rows=100),
    )
    calibration_rows: Positive = 64
    """Benign generations behind the calibration activation h0 and the mean norms."""
    layers: tuple[int, ...] | None = None
    """Decoder blocks to read; None reads all."""
    workers: Positive = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPU share of each worker; 0 runs on the CPU."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    batch_size: Positive = 32


class EstimateConfig(_Slice):
    """Stage I: from activations to a vector."""

    method: Literal["mean_difference"] = "mean_difference"
    layers: tuple[int, ...] | None = None
    """Steered blocks; None chooses the `num_layers` with the best held-out separability."""
    num_layers: Positive = 5
    depth_window: tuple[Fraction, Fraction] = (0.25, 0.75)
    """Share of the model's depth in which layers are chosen automatically."""
    holdout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.3


class SteeringConfig(_Slice):
    """How the vector is applied, in training, evaluation and serving alike."""

    operator: Operator = Operator.ADD
    positions: Positions = Positions.ALL
    coefficient: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    """With `add`: dose of each layer relative to its mean hidden norm, at full layer weight."""


class EngineConfig(_Slice):
    """Rollout engines."""

    backend: Literal["vllm", "hf", "fake"] = "vllm"
    replicas: Positive = 1
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_model_len: Positive = 2048
    """Longest prompt and answer, picture tokens included."""
    max_num_seqs: Positive = 64
    memory_gib: Annotated[float, Field(gt=0)] = 2.0
    """Cache memory of the engine on a CPU; on a GPU see `gpu_memory_utilization`."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.55
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPU share of each replica in Ray; 0 runs on the CPU."""
    start_timeout_s: Positive = 600
    request_timeout_s: Positive = 600


class RolloutConfig(_Slice):
    """What each training step samples."""

    harm_prompts: Positive = 16
    """Harmful prompts per step."""
    benign_prompts: Annotated[int, Field(ge=0)] = 4
    group_size: Annotated[int, Field(ge=2)] = 4
    """Samples per prompt."""
    max_tokens: Positive = 24
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


class RewardConfig(_Slice):
    """Weights of the reward; the formula is in `spo.algorithms.rewards`."""

    toxicity_model: str = "testbed"
    """"testbed", a Detoxify model name ("original", "unbiased", ...), or a local checkpoint."""
    alignment_model: str = "testbed"
    """"testbed", or an open_clip "MODEL:PRETRAINED" pair."""
    toxicity_weight: Annotated[float, Field(ge=0)] = 1.0
    alignment_weight: Annotated[float, Field(ge=0)] = 1.0
    """Counts only on benign prompts with a picture."""
    degeneration_weight: Annotated[float, Field(ge=0)] = 0.5
    refusal_penalty: Annotated[float, Field(ge=0)] = 0.5
    """Taken off when a benign prompt is answered by a refusal or by nothing."""
    replicas: Positive = 1
    timeout_s: Positive = 300


class LearnConfig(_Slice):
    """Stage II."""

    objective: Literal["dpo", "rloo"] = "rloo"
    steps: Positive = 20
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    """About how far one step moves a layer's vector, relative to the mean hidden norm."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Inverse temperature of `dpo`."""
    margin: Annotated[float, Field(ge=0)] = 0.05
    """Smallest reward gap of a preference pair; groups below it carry no information."""
    kl_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight of KL(steered || unsteered) per token on benign prompts: guards utility."""
    kl_weight_harm: Annotated[float, Field(ge=0)] = 0.1
    """The same on harmful prompts: guards fluency."""
    max_dose: Annotated[float, Field(gt=0)] = 2.0
    """Cap on each layer's |v| relative to the layer's mean hidden norm."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    micro_batch: Positive = 16
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    workers: Positive = 1
    """Ray Train workers; each learns from its share of a batch's groups."""
    use_gpu: bool = False
    num_gpus: Annotated[float, Field(gt=0)] = 1.0
    """GPU share of each worker, with `use_gpu`; below 1 it shares a card with an engine."""
    max_failures: Annotated[int, Field(ge=0)] = 2


class AttackConfig(_Slice):
    """White-box PGD on the picture (universal: one picture for all prompts)."""

    enabled: bool = True
    epsilon_255: Annotated[float, Field(gt=0, le=255)] = 32.0
    """L-infinity bound in units of 1/255."""
    steps: Positive = 40
    step_size_255: Annotated[float, Field(gt=0)] = 4.0
    targets: Positive = 16
    """Toxic target sentences whose likelihood the picture raises, per step."""
    timeout_s: Positive = 1800
    picture: Path | None = None
    """Clean picture to start from; the testbed draws its own."""
    targets_file: Path | None = None
    """Target sentences, one a line; the testbed has its own."""


class EvaluateConfig(_Slice):
    """Evaluation."""

    judge: str = "testbed"
    """"testbed" (a model other than the reward), or a local sequence-classification folder."""
    harm_prompts: Positive = 96
    samples_per_prompt: Positive = 2
    scenes: Positive = 48
    """Unseen drawn scenes for captions and questions."""
    max_tokens: Positive = 24
    caption_tokens: Positive = 48
    bootstrap: Positive = 2000
    attack: AttackConfig = AttackConfig()


class RayConfig(_Slice):
    """The Ray cluster."""

    address: str | None = None
    """None: the cluster of `ray job submit`, or a local one; else its address."""
    num_cpus: Positive | None = None
    """CPUs of a local cluster; None takes Ray's own count."""
    namespace: str = "spo"


class RunConfig(_Slice):
    """Everything one run needs. Saved, resolved, beside every output."""

    name: str = "testbed"
    seed: int = 0
    output_dir: Path = Path("outputs")
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

    @property
    def run_dir(self) -> Path:
        """Absolute folder of this run's outputs."""
        return (self.output_dir / self.name).expanduser().absolute()

    @property
    def cache(self) -> Path:
        """Absolute folder of assembled models and drawn pictures."""
        return self.cache_dir.expanduser().absolute()

    @property
    def digest(self) -> str:
        """Digest of everything that changes results; output folders and Ray address do not."""
        content = self.model_dump(
            mode="json", exclude={"output_dir", "cache_dir", "ray", "serve", "name"}
        )
        return _digest(content)

    def digest_of(self, *sections: str, also: str = "") -> str:
        """Digest of some sections, and of `also`: what the result of one stage depends on."""
        content = self.model_dump(mode="json", include=set(sections))
        return _digest([content, also])

    def to_yaml(self) -> str:
        """The resolved configuration."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `key.sub=value` overrides, validate.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown or out of range; names the key.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        tree = _read_yaml(path)
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not key:
            raise ConfigError(f"expected key.sub=value, got {override!r}, e.g. learn.steps=10")
        _assign(tree, key.split("."), _parse_value(value), override)
    try:
        return RunConfig.model_validate(tree)
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


def _read_yaml(path: Path) -> dict[str, Any]:
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


def _assign(tree: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        branch = tree.setdefault(key, {})
        if not isinstance(branch, dict):
            raise ConfigError(f"override {override!r}: {key!r} is a value, not a group of settings")
        tree = branch
    tree[keys[-1]] = value
