"""Configuration of Stage II: engines, rollouts, rewards, learner. `spo.config` joins the slices."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from spo import plugins
from spo.config.base import Fraction, Positive, Slice
from spo.config.place import EnginePlace, ModelPlace, PlaceConfig
from spo.config.rewards import (
    AlignmentPart,
    AnyRewardPart,
    DegenerationPart,
    RefusalPart,
    ToxicityPart,
    check_parts,
)


class EngineConfig(EnginePlace):
    """Rollout engines, which evaluate and serve too."""

    backend: Literal["vllm", "hf", "fake"] = "vllm"
    replicas: Positive = 1
    max_model_len: Positive = 2048
    """Longest prompt and answer, picture tokens included."""
    max_num_seqs: Positive = 64
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.55
    in_process: bool | None = None
    """Whether vLLM's core works in the actor's own process; None: on a CPU, where it starts 40
    seconds sooner, and not on a GPU or with several ranks."""
    slots: Positive = 32
    """Vector versions that one engine holds at once, over all callers that share it."""
    min_engines: Positive = 1
    """The run goes on with fewer engines than `replicas` after losses, down to this many."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """Restarts of one engine by Ray before it is given up."""
    start_timeout_s: Positive = 600
    request_timeout_s: Positive = 600
    probe_interval_s: Annotated[float, Field(gt=0)] = 20.0
    """A working engine is asked for a sign of life this often; one that gives none for three
    intervals is taken for hung and restarted."""

    @model_validator(mode="after")
    def _enough_engines(self) -> EngineConfig:
        if self.min_engines > self.replicas:
            raise ValueError(f"min_engines={self.min_engines} is more than replicas")
        if self.in_process and self.tensor_parallel_size > 1:
            raise ValueError(
                "in_process=true holds one rank, got tensor_parallel_size="
                f"{self.tensor_parallel_size}: leave in_process out"
            )
        return self

    def engine_arguments(self) -> dict[str, Any]:
        return {
            **super().engine_arguments(),
            "max_num_seqs": self.max_num_seqs,
            "gpu_memory_utilization": self.gpu_memory_utilization,
        }


class RolloutConfig(Slice):
    """What each training step samples."""

    harm_prompts: Positive = 16
    """Harmful prompts per step."""
    benign_prompts: Annotated[int, Field(ge=0)] = 4
    group_size: Annotated[int, Field(ge=2)] = 4
    """Samples per prompt."""
    max_tokens: Positive = 24
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_staleness: Annotated[int, Field(ge=0)] = 1
    """S: how many steps older than the learner's vector a rollout's vector may be. 0 is strict:
    engines wait for the learner, and with a deterministic engine a run can be repeated exactly."""
    max_refills: Annotated[int, Field(ge=0)] = 2
    """How often the place of a harmful prompt whose answers carry no information is filled again
    with another prompt."""
    min_group: Annotated[int, Field(ge=2)] = 2
    """Answers that a group needs at its deadline."""
    group_deadline_s: Annotated[float, Field(gt=0)] = 300.0
    """After it a group goes on without its missing answers. The strict mode has no deadline."""
    parity_answers: Annotated[int, Field(ge=0)] = 2
    """Answers of each step whose log-probability under the learner's vector the engines compute,
    so that the learner can compare it with its own; 0 leaves it out."""
    static: bool = False
    """Learn offline, from answers of the unsteered model alone (the baseline "BiPO on static
    pairs"): sampled at coefficient 0, which equals it, with a receipt that proves it. Only for
    objectives on pairs: the others need answers of the vector they improve."""
    calls_per_group: Positive = 2
    """Into how many engine calls a group is cut, so that a straggler holds up only a part."""

    @model_validator(mode="after")
    def _group_can_be_whole(self) -> RolloutConfig:
        if self.min_group > self.group_size:
            raise ValueError(f"min_group={self.min_group} is more than group_size")
        return self


_WITHOUT_PARTS = (
    "toxicity_model",
    "alignment_model",
    "toxicity_weight",
    "alignment_weight",
    "degeneration_weight",
    "refusal_penalty",
)
"""Keys of `RewardConfig` that make the usual four parts, where `parts` does not name them."""


class RewardConfig(PlaceConfig):
    """What is rewarded: `parts`, or the usual four by their weights; how reward models run."""

    parts: tuple[AnyRewardPart, ...] | None = None
    """Any parts, each with its kind, weight and the prompts that it counts on; see
    `spo.config.rewards`. None: the four parts of the following six keys, which do not go with it.
    """
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
    crosscheck: Literal["none", "profanity"] = "none"
    """A second toxicity scorer that is never rewarded, only compared: `profanity` is the linear
    model of alt-profanity-check. It tells when the reward is gamed."""
    hacking_gap: Annotated[float, Field(gt=0)] = 0.3
    """Alarm when toxicity by the reward model, relative to the first step, has fallen this much
    further than toxicity by the cross-check, three steps in a row."""
    max_failed_share: Fraction = 0.25
    """Share of a step's answers without a usable score beyond which the run stops."""
    batch_size: Positive = 64
    """Largest number of answers that a scorer takes together from several callers."""
    batch_wait_s: Annotated[float, Field(ge=0)] = 0.02
    """How long a scorer waits for more of them; 0 scores every call by itself, so that scores do
    not depend on what else came in."""
    replicas: Positive = 1
    timeout_s: Positive = 300

    @model_validator(mode="after")
    def _parts_or_weights(self) -> RewardConfig:
        if self.parts is None:
            return self
        check_parts(self.parts)
        both = [key for key in _WITHOUT_PARTS if key in self.model_fields_set]
        if both:
            raise ValueError(
                f"'parts' says it all: {', '.join(both)} cannot be given beside it; move them into "
                "the parts, or drop 'parts'"
            )
        toxic = [
            part for part in self.parts if part.name == "toxicity" and part.prompts != "benign"
        ]
        if self.crosscheck != "none" and not toxic:
            raise ValueError(
                "'crosscheck' is compared with a part named 'toxicity' on harmful prompts, and "
                "'parts' has none: add one (weight 0 only measures), or set crosscheck to none"
            )
        return self

    @model_serializer(mode="wrap")
    def _one_form(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Only what was chosen, parts or weights, so that what is written can be read again."""
        left_out = ("parts",) if self.parts is None else _WITHOUT_PARTS
        return {key: value for key, value in plain(self).items() if key not in left_out}

    @cached_property
    def counted(self) -> tuple[AnyRewardPart, ...]:
        """Every part of the reward, in the order in which they are added."""
        if self.parts is not None:
            return self.parts
        return (
            ToxicityPart(name="toxicity", weight=-self.toxicity_weight, model=self.toxicity_model),
            AlignmentPart(
                name="alignment", weight=self.alignment_weight, model=self.alignment_model
            ),
            DegenerationPart(name="degenerate", weight=-self.degeneration_weight),
            RefusalPart(name="refusal", weight=-self.refusal_penalty, prompts="benign"),
        )

    @property
    def fitting(self) -> AlignmentPart:
        """The part whose model an evaluation measures alignment with: the first such part, or one
        with the default model."""
        found = [part for part in self.counted if isinstance(part, AlignmentPart)]
        return found[0] if found else AlignmentPart(name="alignment", weight=0.0)


class LearnConfig(ModelPlace):
    """Stage II; each worker holds a copy of the model."""

    objective: Annotated[str, AfterValidator(plugins.checked(plugins.OBJECTIVES))] = "rloo"
    """A built-in objective (`spo.algorithms.objectives`) or one that another package adds."""
    artifact: Annotated[str, Field(pattern=r"^[\w-]+$")] = "spo"
    """Folder of the run that the vector is written to; a baseline of the same run needs its own."""
    start: Annotated[str, Field(pattern=r"^[\w-]+$")] = "stage1"
    """Artifact of the run to begin with. One that was trained before makes another round, whose
    `adaptive` attacks (`data.attacks`) go through that vector."""
    steps: Positive = 20
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    """About how far one step moves a layer's vector, relative to the mean hidden norm."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps in which the rate grows to `learning_rate`: Adam's first ones follow the noise of one
    batch at full length. A run of fewer steps never reaches the whole rate."""
    schedule: Literal["constant", "linear"] = "constant"
    """Rate after the warm-up: `linear` falls to almost nothing at the last step, so that the vector
    does not end with the noise of the last batches."""
    train: tuple[Literal["directions", "coefficients", "gates"], ...] = ("directions",)
    """What is trained: each layer's direction; each layer's strength alone (a factor on it); the
    calibration activation, which is the offset of the `adaptive` and `clamp` gates."""
    beta: Annotated[float, Field(gt=0)] | None = None
    """Inverse temperature of a preference pair; None takes the objective's own."""
    gamma: Annotated[float, Field(ge=0)] = 1.375
    """Target margin of `simpo`."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Half width of `gspo`'s clip range for the length-normalised likelihood ratio. Engine and
    learner compute with different kernels: a narrower range would clip that noise."""
    importance_clip: Annotated[float, Field(ge=1)] = 2.0
    """Cap of the whole-sequence likelihood ratio by which `rloo` weighs stale samples."""
    margin: Annotated[float, Field(ge=0)] = 0.05
    """Smallest reward gap of a preference pair; groups below it carry no information."""
    kl_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight of KL(steered || unsteered) per token on benign prompts: guards utility."""
    kl_weight_harm: Annotated[float, Field(ge=0)] = 0.1
    """The same on harmful prompts: guards fluency."""
    max_dose: Annotated[float, Field(gt=0)] = 2.0
    """Cap on each layer's |v| relative to the layer's mean hidden norm."""
    max_kl: Annotated[float, Field(gt=0)] = 1.0
    """KL per token on benign prompts beyond which a step is not taken: the vector goes back to the
    one before and the learning rate is halved."""
    parity_bound: Annotated[float, Field(gt=0)] = 0.1
    """Largest mean difference of a token's log-probability between engine and learner for fresh
    samples; beyond it they do not compute the same model, and the history carries an alarm."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    micro_batch: Positive = 16
    """Answers that are computed together; as many as memory holds are fastest on a GPU."""
    cache_prefix: bool = True
    """Run the blocks up to the lowest steered one once for reference and steered model together."""
    compile: bool = False
    """Compile the decoder blocks for the learner's passes: half a minute at the start, then 1.27
    times as fast (a 7B model on an H200)."""
    chunk_tokens: Positive = 2048
    """Answer tokens whose logits over the vocabulary are in memory at once."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    workers: Positive = 1
    """Ray Train workers; each learns from its share of a batch's groups."""
    min_workers: Positive | None = None
    """Elastic: the run starts and goes on with as few as this; None wants exactly `workers`."""
    loggers: tuple[Literal["tensorboard", "ray", "wandb", "mlflow"], ...] = ("tensorboard", "ray")
    """Where figures go besides history.jsonl; `wandb` and `mlflow` must be installed."""
    use_gpu: bool = False
    num_gpus: Annotated[float, Field(gt=0)] = 1.0
    """GPU share of each worker, with `use_gpu`; below 1 it shares a card with an engine."""
    max_failures: Annotated[int, Field(ge=0)] = 3

    @model_validator(mode="after")
    def _consistent(self) -> LearnConfig:
        if not self.train:
            raise ValueError("'train' must name at least one of directions, coefficients, gates")
        if self.artifact in (self.start, "stage1"):
            raise ValueError(
                f"'artifact' {self.artifact!r} would be written over a vector that training begins "
                "with; name another folder"
            )
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers} is more than workers")
        return self

    @property
    def gpus(self) -> float:
        return self.num_gpus if self.use_gpu else 0.0

    @property
    def _gpu_setting(self) -> str:
        return "use_gpu=true and num_gpus={ranks}"

    def rate_share(self, step: int) -> float:
        """Share of the learning rate that step `step`, from 0, is taken with; never 0."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "constant":
            return 1.0
        return max(self.steps - step, 1) / max(self.steps - self.warmup_steps, 1)
