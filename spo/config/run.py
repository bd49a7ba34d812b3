"""`RunConfig`, everything one run needs, and the slices that belong to no stage.

Importable without torch and Ray. Unknown keys are errors. A component takes only its own slice;
only jobs, the pipeline and the sweep see `RunConfig`. Names carry units.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from spo import plugins
from spo.config.attacks import PgdConfig
from spo.config.base import Fraction, Location, Positive, Slice
from spo.config.evaluation import EvaluateConfig, LlmJudgeConfig
from spo.config.place import AttackPlace, ModelPlace
from spo.config.serving import ServeConfig
from spo.config.stage1 import EstimateConfig, ExtractConfig
from spo.config.stage2 import EngineConfig, LearnConfig, RewardConfig, RolloutConfig
from spo.config.text import dump
from spo.records import Operator, Positions

DEFAULT_CACHE = Path("~/.cache/spo-vlm")
"""Folder of assembled models and drawn pictures."""


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
    attacks: tuple[PgdConfig, ...] = ()
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

    @field_validator("attacks", mode="before")
    @classmethod
    def _pictures_only(cls, attacks: Any) -> Any:
        listed = attacks if isinstance(attacks, list | tuple) else ()
        kinds = [one.get("kind", "pgd") if isinstance(one, dict) else one.kind for one in listed]
        others = [kind for kind in kinds if kind != "pgd"]
        if others:
            raise ValueError(
                f"'attacks' takes kind 'pgd', got {others}; drawn words: 'typographic_fraction'"
            )
        return attacks


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


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusSettings:
    """What decides the prompts and pictures that a run is made on."""

    model: ModelConfig
    """Its tokenizer cuts reference texts."""
    data: DataConfig
    extract: ExtractConfig
    evaluate: EvaluateConfig
    cache: Path
    """Folder of drawn pictures."""
    seed: int


class RunConfig(Slice):
    """Everything one run needs. Saved, resolved, beside every output."""

    name: str = "testbed"
    seed: int = 0
    output_dir: Location = "outputs"
    """Folder, or URL such as s3://bucket/prefix; a run writes to `output_dir/name`."""
    cache_dir: Path = DEFAULT_CACHE
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    extract: ExtractConfig = ExtractConfig()
    estimate: EstimateConfig = EstimateConfig()
    steering: SteeringConfig = SteeringConfig()
    engine: EngineConfig = EngineConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    learn: LearnConfig = LearnConfig()
    attack: AttackPlace = AttackPlace()
    evaluate: EvaluateConfig = EvaluateConfig()
    serve: ServeConfig = ServeConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _learns_from_what_it_samples(self) -> RunConfig:
        if self.rollout.static and plugins.find(plugins.OBJECTIVES, self.learn.objective).on_policy:
            fit = [n for n, o in plugins.built_in(plugins.OBJECTIVES).items() if not o.on_policy]
            raise ValueError(
                f"rollout.static goes with an objective on pairs, got {self.learn.objective!r}; "
                f"set learn.objective to {', '.join(fit[:-1])} or {fit[-1]}"
            )
        return self

    @model_validator(mode="after")
    def _judge_is_not_rewarded(self) -> RunConfig:
        """What is optimised against cannot also be the measure."""
        judges = self.evaluate.success_judges
        llms = [judge for judge in judges if isinstance(judge, LlmJudgeConfig)]
        measures = {(judge.url.rstrip("/"), judge.model) for judge in llms}
        embedded = EvaluateConfig.model_fields["judge"].default
        if self.evaluate.judge != embedded:  # which names another model than in a reward
            measures.add(("", self.evaluate.judge))
        for part in self.reward.parts or ():
            named = getattr(part, "url", "").rstrip("/"), getattr(part, "model", None)
            if named in measures:
                raise ValueError(
                    f"reward part {part.name!r} and a judge of the evaluation are one model, "
                    f"{named[1]}: what is rewarded cannot also be the measure; change one of them"
                )
        return self

    @model_validator(mode="after")
    def _plugins_are_sound(self) -> RunConfig:
        for group in plugins.HOMES:  # a name used twice is an error even where a default is taken
            plugins.names(group)
        return self

    @model_validator(mode="after")
    def _attacks_have_a_place(self) -> RunConfig:
        try:
            assert self.attack_place
        except ValidationError as error:
            said = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ValueError(f"'attack', filled up from 'learn': {said}") from error
        return self

    @property
    def attack_place(self) -> ModelPlace:
        """Where picture attacks run: as `attack` says, or else as the learner does."""
        return self.attack.beside(self.learn)

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
    def corpus(self) -> CorpusSettings:
        """The slices that a corpus is opened from."""
        return CorpusSettings(
            model=self.model,
            data=self.data,
            extract=self.extract,
            evaluate=self.evaluate,
            cache=self.cache,
            seed=self.seed,
        )

    @property
    def digest(self) -> str:
        """Digest of everything that changes results; output folders and Ray address do not."""
        places = dict.fromkeys(("output_dir", "cache_dir", "ray", "serve", "name"), True)
        # Younger than digests that must stay, and of it only the computation type counts.
        attack = True if self.attack.dtype is None else {"num_gpus": True}
        exclude = {**places, "attack": attack, **self._left_out}
        return _digest(self.model_dump(mode="json", exclude=exclude))

    def digest_of(self, *sections: str, also: str = "") -> str:
        """Digest of some sections, and of `also`: what the result of one stage depends on."""
        content = self.model_dump(mode="json", include=set(sections), exclude=self._left_out)
        return _digest([content, also])

    @property
    def _left_out(self) -> dict[str, Any]:
        """Settings that no digest counts; a later key that is not set is one of them, so that
        what was made before it came is found again."""
        return {**_MANNER, "extract": {"calibration": self.extract.calibration is None}}

    def to_yaml(self) -> str:
        """The resolved configuration."""
        return dump(self.model_dump(mode="json"))


_MANNER = {"learn": {"compile": True}, "engine": {"in_process": True}}
"""Settings that change how something is computed, and no result beyond its last bits."""


_PLACE = {"labels", "tensor_parallel_size"}
_LATER_ATTACK = {
    "objective": "toxic",
    "schedule": "linear",
    "final_step": 0.1,
    "pairs_per_step": None,
    "flat_steps": 0,
    "flat_gain": 0.01,
    "autocast": True,
}
"""Keys of a picture attack that came later, as they were before they were keys: at these values
they count in no digest, so that a run of that time is found again."""


def _placeless(content: Any) -> Any:
    """Without node labels, ranks and later keys that are not set.

    Where a model runs does not change what it computes.
    """
    if isinstance(content, dict):
        later = _LATER_ATTACK.items() if "epsilon_255" in content else ()
        unset = {key for key, value in later if content.get(key, value) == value}
        left_out = _PLACE | unset
        return {key: _placeless(value) for key, value in content.items() if key not in left_out}
    return [_placeless(item) for item in content] if isinstance(content, list) else content


def _digest(content: object) -> str:
    content = _placeless(content)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
