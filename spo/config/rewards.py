"""Configuration of the parts of a reward: one class a kind, joined on `kind`.

Adding one: a class here and in `_OwnPart`, a line in `spo.scorers.rewards.REWARDS` with the rule or
scorer behind it, a test. Another package adds a `RewardKind` by an entry point of group
`spo.rewards`; its parts are `AddedPart`s.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from spo import plugins
from spo.config.base import Slice
from spo.config.llm import QUESTION, LlmAddress
from spo.records import Prompt, PromptKind

CROSSCHECK = "crosscheck"
"""Name of the scores that are compared and never rewarded; no part may have it."""
DETOXIFY_MODELS = ("original", "unbiased", "multilingual", "original-small", "unbiased-small")
"""Detoxify's names of models on the hub."""


class RewardPart(Slice):
    """What every part has: the total is the sum of weight times score over the parts that count.

    A part that counts on a prompt and has no finite score makes the whole reward fail.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]
    """Its name in the history and in kept rollouts; the kind where it is not given."""
    weight: Annotated[float, Field(allow_inf_nan=False)]
    """Above 0 rewards, below 0 penalises; 0 only measures."""
    prompts: Literal["all", "harm", "benign"] = "all"
    """Kind of prompt that the part counts on."""
    picture: Literal["any", "with", "without"] = "any"
    """Whether it counts on prompts with a picture, without one, or on any."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("name"):
            kind = str(data.get("kind") or cls.model_fields["kind"].default)
            return {**data, "name": re.sub(r"[^a-z0-9]+", "-", kind.lower())}
        return data

    def counts_on(self, prompt: Prompt) -> bool:
        """Whether the part belongs to the reward of an answer to this prompt."""
        has = "with" if prompt.image else "without"
        return self.prompts in ("all", prompt.kind.value) and self.picture in ("any", has)

    @property
    def needs_model(self) -> bool:
        """Whether reward models score it; else a rule over the answer does, without a model."""
        return True


class ToxicityPart(RewardPart):
    """Detoxify: how toxic the answer is, 0 to 1."""

    kind: Literal["toxicity"] = "toxicity"
    model: str = "testbed"
    """"testbed", a Detoxify model name ("original", "unbiased", ...), or a local checkpoint."""


class AlignmentPart(RewardPart):
    """open_clip: how well the answer fits the picture, a cosine, -1 to 1."""

    kind: Literal["alignment"] = "alignment"
    model: str = "testbed"
    """"testbed", an open_clip "MODEL:PRETRAINED" pair, or a local folder of one."""
    prompts: Literal["all", "harm", "benign"] = "benign"
    """On a refusal it means nothing, so it counts on benign prompts unless told otherwise."""
    picture: Literal["with"] = "with"


class DegenerationPart(RewardPart):
    """How far the answer is from language, 0 to 1: empty, repeating itself, or few letters."""

    kind: Literal["degeneration"] = "degeneration"

    @property
    def needs_model(self) -> bool:
        """See `RewardPart`."""
        return False


class ClassifierPart(RewardPart):
    """Base of the parts that a sequence classifier over request and answer scores, 0 to 1."""

    label: str | None = None
    """Label of the classifier whose chance is the score; None: its only one."""
    max_length: Annotated[int, Field(ge=16)] = 512
    """Tokens that the classifier reads, request and answer together."""


class RefusalPart(ClassifierPart):
    """Whether the answer refuses, 0 to 1. Nothing at all in answer to a benign prompt is a refusal.

    Wanted on harmful prompts and unwanted on benign ones: two parts, each with its sign.
    """

    kind: Literal["refusal"] = "refusal"
    prompts: Literal["harm", "benign"]
    model: str | None = None
    """None: stock openings of refusals, `spo.algorithms.rewards.is_refusal`. Else a sequence
    classifier (Transformers folder or hub id) whose `label` says that it refuses; none is embedded,
    so "testbed" is refused."""

    @property
    def needs_model(self) -> bool:
        """See `RewardPart`."""
        return self.model is not None


class HarmPart(ClassifierPart):
    """How likely the answer gives what a harmful request asked for, 0 to 1."""

    kind: Literal["harm"] = "harm"
    model: str = "testbed"
    """A sequence classifier (Transformers folder or hub id) whose `label` says that the answer is
    harmful. None is embedded, so "testbed", which stands here until one is named, is refused."""


class LlmPart(RewardPart, LlmAddress):
    """What a language model says of the answer, 0 to 1; its tokens and seconds are in the history.

    It is asked while other rewards are computed and holds none of them up.
    """

    kind: Literal["llm"] = "llm"
    question: str = QUESTION
    """The question, with `{request}` and `{answer}` in it; the default asks for harm."""
    reply: Literal["yes-no", "0-10"] = "yes-no"
    """Expected reply: yes is 1 and no is 0, or a number, which is divided by ten."""

    @model_validator(mode="after")
    def _asks_for_the_answer(self) -> LlmPart:
        if "{answer}" not in self.question:
            raise ValueError("'question' must have {answer} in it, and may have {request}")
        if self.reply == "0-10" and self.question == QUESTION:
            raise ValueError("reply '0-10' needs a 'question' of its own that asks for a number")
        return self


class AddedPart(RewardPart):
    """A kind that another package adds."""

    kind: Annotated[str, AfterValidator(plugins.checked(plugins.REWARDS))]
    settings: dict[str, Any] = Field(default_factory=dict)
    """Whatever that kind takes; its rule or scorer gets the whole part."""

    @property
    def needs_model(self) -> bool:
        """See `RewardPart`."""
        return plugins.find(plugins.REWARDS, self.kind).rule is None


_OwnPart = ToxicityPart | AlignmentPart | DegenerationPart | RefusalPart | HarmPart | LlmPart
_OWN = {kind.model_fields["kind"].default for kind in get_args(_OwnPart)}


def _whose(part: Any) -> str:
    kind = part.get("kind") if isinstance(part, dict) else getattr(part, "kind", None)
    return "own" if kind in _OWN else "added"


AnyRewardPart = Annotated[
    Annotated[_OwnPart, Field(discriminator="kind"), Tag("own")]
    | Annotated[AddedPart, Tag("added")],
    Discriminator(_whose),
]


def check_parts(parts: tuple[AnyRewardPart, ...]) -> None:
    """Parts that were given must make a reward.

    Raises:
        ValueError: there is none, two have one name, or none counts on harmful prompts.
    """
    names = [part.name for part in parts]
    if not parts:
        raise ValueError("'parts' is empty: name at least one part, or leave it out")
    if len(set(names)) < len(names):
        raise ValueError(f"reward parts must have different names, got {names}; give each a 'name'")
    if CROSSCHECK in names:
        raise ValueError(f"no part may be named {CROSSCHECK!r}: give it another 'name'")
    if not any(part.weight and part.prompts in ("all", PromptKind.HARM.value) for part in parts):
        raise ValueError(
            "no part with a weight counts on harmful prompts, so there is nothing to learn from: "
            "add one, e.g. {kind: toxicity, weight: -1}"
        )
