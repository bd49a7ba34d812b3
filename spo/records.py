"""The records that move between stages, processes and files.

Standard library only: no torch, no Ray. Every record is frozen, slotted and keyword-only, and has
no behaviour beyond derived properties. Pictures travel as a path, never as pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class PromptKind(StrEnum):
    """What a good answer to the prompt looks like."""

    HARM = "harm"
    """The prompt pulls towards harmful text: a good answer stays harmless."""
    BENIGN = "benign"
    """An honest request: a good answer is helpful, and a refusal is a fault."""


class PromptFormat(StrEnum):
    """How the text is laid out for the model."""

    CHAT = "chat"
    """One user turn through the model's chat template."""
    PLAIN = "plain"
    """The text itself; the model continues it (RealToxicityPrompts style)."""


class Split(StrEnum):
    """Which part of the work may see the prompt."""

    TRAIN = "train"
    HELDOUT = "heldout"


class Side(StrEnum):
    """Side of a Stage I contrast."""

    HARM = "harm"
    SAFE = "safe"


class Operator(StrEnum):
    """How a vector changes the residual stream h; formulas in `spo.algorithms.operators`."""

    ADD = "add"
    PROJECT = "project"
    ADAPTIVE = "adaptive"
    CLAMP = "clamp"


class Positions(StrEnum):
    """Which token positions are read or steered."""

    ALL = "all"
    PROMPT = "prompt"
    GENERATED = "generated"
    """Position >= prompt length - 1: the last prompt token yields the first new token."""
    LAST_PROMPT = "last_prompt"
    IMAGE = "image"
    TEXT = "text"
    """Every position that is not an image token, generated ones included."""
    AFTER_IMAGE = "after_image"
    """Every position after the last image token; all positions when there is no image."""


class FinishReason(StrEnum):
    """Why generation ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"


class RewardStatus(StrEnum):
    """Whether a reward may be used. A missing score is never a silent 0.0."""

    SCORED = "scored"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the model is asked.

    Example:
        Prompt(prompt_id="train-rude-00012", text="You are the most", kind=PromptKind.HARM,
               format=PromptFormat.PLAIN, category="rude", split=Split.TRAIN)
    """

    prompt_id: str
    """Unique within a run."""
    text: str
    """The words of the user, without template and without image placeholder."""
    kind: PromptKind
    """Decides which rewards apply."""
    format: PromptFormat = PromptFormat.CHAT
    image: str | None = None
    """Path of the picture (PNG or JPEG), or None for a text-only prompt."""
    category: str = ""
    """Free label for tables, e.g. "rude", "caption", "question-colour"."""
    split: Split = Split.TRAIN
    reference: str | None = None
    """True answer or caption where it is known exactly (drawn scenes)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringSpec:
    """Which steering a request asks for.

    Example:
        SteeringSpec(vector="spo", version=7, coefficient=0.1, operator=Operator.ADAPTIVE,
                     positions=Positions.ALL)
    """

    vector: str
    """Name under which the vector was published."""
    version: int
    """Version under which it was published; a request names it, so a stale engine is found out."""
    coefficient: float = 1.0
    """Strength; positive removes harm. With `add` and a vector of full weight it is the dose
    relative to the layer's mean hidden norm."""
    operator: Operator = Operator.ADD
    positions: Positions = Positions.ALL


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringReceipt:
    """What an engine says it applied. Every steered output carries one."""

    vector: str
    version: int
    sha256: str
    """Content hash of the vector that was in the engine."""
    coefficient: float
    operator: Operator
    positions: Positions
    layers: tuple[int, ...]
    """Zero-based decoder blocks whose output was changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn."""

    max_tokens: int = 24
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One generation. `request_id` is unique, so that a retry can be told from a new request."""

    request_id: str
    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)
    steering: SteeringSpec | None = None
    """None asks for the unsteered model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One finished generation.

    Example:
        Rollout(request_id="s3/train-rude-00012/1", prompt=..., prompt_token_ids=(1, 523),
                token_ids=(284, 198), text=" idea", logprob=-4.2, finish=FinishReason.LENGTH,
                receipt=SteeringReceipt(...))
    """

    request_id: str
    prompt: Prompt
    prompt_token_ids: tuple[int, ...]
    """Tokens of the prompt with image placeholders expanded."""
    token_ids: tuple[int, ...]
    """Tokens of the answer."""
    text: str
    logprob: float
    """Sum of the sampler's log-probabilities of `token_ids`, natural log."""
    finish: FinishReason
    receipt: SteeringReceipt | None
    """None only where no steering was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """The judgement of one rollout."""

    status: RewardStatus
    total: float | None
    """None unless `status` is SCORED."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Raw parts before weighting, e.g. {"toxicity": 0.03, "alignment": 0.31}."""
    reason: str = ""
    """Why the status is not SCORED."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRollout:
    """A rollout with its reward; producer: scorer pool, consumer: learner."""

    rollout: Rollout
    reward: Reward


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one learner step consumes: whole groups of rollouts of the same prompt."""

    step: int
    groups: tuple[tuple[ScoredRollout, ...], ...]
    staleness: tuple[int, ...] = ()
    """Of each group: how many steps older than the learner's vector the sampling vector was."""
    engine_logprobs: Mapping[str, float] = field(default_factory=dict)
    """By request id: log-probability of some answers under the learner's own vector, as the engine
    computes it; the learner compares."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Counted reasons for groups or rollouts that did not make it, e.g. {"reward failed": 1}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantinedRow:
    """A row that could not be used, kept with its reason instead of being dropped."""

    row_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean with a bootstrap confidence interval."""

    mean: float
    low: float
    high: float
    count: int
    """Number of independent units that were resampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attacked:
    """How the prompts of a condition were attacked.

    Example:
        Attacked(attack="adaptive-pgd-16", kind="pgd", base="describe", blind="pgd-16")
    """

    attack: str
    """Name of the attack, `AttackConfig.name`."""
    kind: str
    """"pgd", "typographic", "template", or one that another package adds."""
    base: str
    """The condition whose prompts were attacked."""
    blind: str = ""
    """Of an attack made through each defence: name of the same attack made on the unsteered model;
    "" for an attack that knows no defence."""
    step: int | None = None
    """Of a point of a strength curve: after how many steps the picture was taken."""

    @property
    def adaptive(self) -> bool:
        """Whether each defence meets an attack that was made through it."""
        return bool(self.blind)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedAnswer:
    """One answer of the evaluation with everything that was measured on it.

    Example:
        EvaluatedAnswer(condition="pgd", defence="spo", prompt_id="held-rude-0003", sample=0,
                        prompt="You are the most", image="pgd.png", answer=" kind person",
                        measures={"toxicity": 0.02, "nll": 3.1}, receipt_sha256="9f...")
    """

    condition: str
    """Prompt set and attack, e.g. "plain", "pgd", "caption"."""
    defence: str
    """"none", "stage1" or "spo" (or a user's own name)."""
    prompt_id: str
    sample: int
    prompt: str
    image: str | None
    answer: str
    measures: Mapping[str, float]
    """Finite measured values; a measure that does not apply is absent, never 0."""
    receipt_sha256: str
    """Hash of the vector that the engine confirmed; "" for the unsteered model."""
    picture_of: str = ""
    """Where one prompt is shown several pictures of an attack: the prompt id that they share."""

    @property
    def unit(self) -> str:
        """What counts once in a mean: answers to one prompt are not independent."""
        return self.picture_of or self.prompt_id


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationCell:
    """One cell of the table condition x defence."""

    condition: str
    defence: str
    metrics: Mapping[str, Interval]
    """Per metric: mean with bootstrap interval over prompts."""
    paired: Mapping[str, Interval]
    """Per metric: difference to the unsteered model on the same prompts, with interval."""
    cost: Mapping[str, float] = field(default_factory=dict)
    """"seconds" and "tokens" of generating the answers, with whatever else ran beside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """Everything that one evaluation measured."""

    cells: tuple[EvaluationCell, ...]
    answers: tuple[EvaluatedAnswer, ...]
    judge: str
    """Description of the judge; never the reward model."""
    attacks: Mapping[str, Attacked] = field(default_factory=dict)
    """By condition, how its prompts were attacked; a condition that is not here was not."""
    quarantined: tuple[QuarantinedRow, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """One condition: prompts (with the attacked picture already in place) and how to sample."""

    condition: str
    """Unique name, e.g. "plain", "image", "pgd", "caption", "question"."""
    prompts: tuple[Prompt, ...]
    samples: int = 1
    """Answers per prompt; 1 where `temperature` is 0."""
    max_tokens: int = 24
    temperature: float = 1.0
    """0 is greedy."""
    alignment: bool = True
    """Whether answers to benign prompts with a picture are scored against it; False where they do
    not describe it."""
    by_defence: Mapping[str, tuple[Prompt, ...]] = field(default_factory=dict)
    """The same prompts as a defence gets them, where that differs: an adaptive attack's picture, a
    reminder before the request."""
    only: str | None = None
    """The one defence that is asked; None asks all."""
    references: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """By prompt id, tokens of a harmless text that follows the prompt: perplexity."""
    attack: Attacked | None = None
    """How the prompts were attacked; None for prompts as they are."""
    pictures_of: Mapping[str, str] = field(default_factory=dict)
    """By prompt id, the prompt that another picture of the same attack is shown with."""

    def prompts_for(self, defence: str) -> tuple[Prompt, ...]:
        """The prompts that this defence answers."""
        return self.by_defence.get(defence, self.prompts)
