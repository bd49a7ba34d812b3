"""Configuration of attacks: one class a kind, joined on `kind`; without torch and Ray.

Adding one: a class here and in `_OwnAttack`, a line in `spo.attacks.prompts.ATTACKS` with the
function behind it, a test. Another package adds an `Attack` by an entry point of group
`spo.attacks`; its settings are an `AddedAttack`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from spo import plugins
from spo.config.base import Positive, Slice


def radius_name(epsilon_255: float) -> str:
    """An L-infinity radius, in units of 1/255, as names of conditions have it."""
    return "unbounded" if epsilon_255 >= 255 else f"{epsilon_255:g}"


class AttackConfig(Slice):
    """What every attack has."""

    kind: str

    @property
    def name(self) -> str:
        """Name of the conditions that it makes, e.g. "pgd-16" or "typographic"."""
        return self.kind


class PgdConfig(AttackConfig):
    """White-box pixels, by gradients of the model. Every budget is stated: steps, restarts, targets
    per step, seconds."""

    kind: Literal["pgd"] = "pgd"
    epsilon_255: Annotated[float, Field(gt=0, le=255)] = 32.0
    """L-infinity bound in units of 1/255; 255 is unbounded."""
    target: Literal["corpus", "prompt"] = "corpus"
    """`corpus`: one picture for all prompts, towards a corpus of harmful sentences (Qi et al.);
    `prompt`: a picture for each prompt, towards its own harmful answer."""
    objective: Literal["toxic", "compliance"] = "toxic"
    """What the picture is to bring about: `toxic` sentences, or `compliance`, openings of answers
    that do what a harmful request asks ("Sure, here is how you can do it. Step 1:")."""
    adaptive: bool = False
    """Attack each defence through its own steering and gate, instead of the unsteered model."""
    steps: Positive = 40
    step_size_255: Annotated[float, Field(gt=0)] = 8.0
    """First step."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How the step decays from `step_size_255` to `final_step` of it."""
    final_step: Annotated[float, Field(gt=0, le=1)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    restarts: Positive = 1
    """The first starts at the clean picture, the others anywhere in the ball; the one that is best
    on a fixed batch of pairs, held apart from the steps, is kept."""
    targets: Positive = 8
    """Pairs per step where `pairs_per_step` is not given."""
    pairs_per_step: Positive | None = None
    """(prompt, target) pairs in each step's batch, drawn afresh from all prompts x targets."""
    flat_steps: Annotated[int, Field(ge=0)] = 0
    """Early stop: when the mean loss of the last so many steps is less than `flat_gain` (relative)
    below the mean of as many before, the attack goes on with the last fifth of its schedule and
    ends. 0: every step is made."""
    flat_gain: Annotated[float, Field(gt=0, lt=1)] = 0.01
    autocast: bool = True
    """Steps in bfloat16 on a GPU, whatever the type of the weights."""
    pictures: Positive = 1
    """Independent pictures of a `corpus` attack, with every prompt shown every one; results are
    means over them, intervals are over prompts, for these pictures. The testbed starts each from
    another clean picture, `evaluate.attack_picture` only from other draws."""
    made_on: str | None = None
    """Transfer: folder or hub id of the model that the picture is made on; None attacks the model
    under test."""
    timeout_s: Positive = 1800

    @model_validator(mode="after")
    def _goes_together(self) -> PgdConfig:
        if self.pictures > 1 and self.target != "corpus":
            raise ValueError("'pictures' goes with target 'corpus' only")
        if self.adaptive and self.made_on:
            raise ValueError("an adaptive attack is made on the model under test: drop 'made_on'")
        return self

    @property
    def name(self) -> str:
        """Such as "pgd-16" or "adaptive-pgd-unbounded"."""
        size = radius_name(self.epsilon_255)
        parts = ["adaptive"] if self.adaptive else ["transfer"] if self.made_on else []
        each = ["each"] if self.target == "prompt" else []
        goal = [self.objective] if self.objective != "toxic" else []
        return "-".join([*parts, "pgd", *goal, *each, size])

    @property
    def pairs(self) -> int:
        """(prompt, target) pairs in each step's batch."""
        return self.pairs_per_step or self.targets


class RequestAttack(AttackConfig):
    """Base of the attacks that rewrite requests and never look at the model."""

    @model_validator(mode="before")
    @classmethod
    def _without_budget(cls, data: Any) -> Any:
        """Files of versions with one class for all attacks state a budget of `pgd` here."""
        if not isinstance(data, dict):
            return data
        foreign = data.keys() & PgdConfig.model_fields.keys() - cls.model_fields.keys()
        usual = PgdConfig().model_dump(mode="json")
        changed = sorted(key for key in foreign if data[key] != usual[key])
        if changed:
            raise ValueError(
                f"{', '.join(map(repr, changed))} goes with kind 'pgd' only, not with "
                f"{data.get('kind')!r}; leave it out"
            )
        return {key: value for key, value in data.items() if key not in foreign}


class TypographicConfig(RequestAttack):
    """The request drawn into the picture (FigStep style)."""

    kind: Literal["typographic"] = "typographic"


class TemplateConfig(RequestAttack):
    """Text jailbreak templates around the request."""

    kind: Literal["template"] = "template"


class AddedAttack(RequestAttack):
    """A kind that another package adds."""

    kind: Annotated[str, AfterValidator(plugins.checked(plugins.ATTACKS))]
    settings: dict[str, Any] = Field(default_factory=dict)
    """Whatever that kind takes; it gets them as `Material.attack`."""
    label: Annotated[str, Field(pattern=r"^[\w-]*$")] = ""
    """Name of its conditions; the kind where it is not given."""

    @model_validator(mode="after")
    def _rewrites(self) -> AddedAttack:
        if plugins.find(plugins.ATTACKS, self.kind).rewrite is None:
            raise ValueError(
                f"attack {self.kind!r} of another package must rewrite requests, and has no "
                "'rewrite'; only 'pgd' changes pixels by gradients"
            )
        return self

    @property
    def name(self) -> str:
        """`label`, or the kind."""
        return self.label or self.kind


_OwnAttack = PgdConfig | TypographicConfig | TemplateConfig
_OWN = {kind.model_fields["kind"].default for kind in get_args(_OwnAttack)}


def _whose(attack: Any) -> str:
    kind = attack.get("kind") if isinstance(attack, dict) else getattr(attack, "kind", None)
    return "own" if kind in _OWN else "added"


def _named(attack: Any) -> Any:
    return {"kind": "pgd", **attack} if isinstance(attack, dict) else attack


AnyAttack = Annotated[
    Annotated[_OwnAttack, Field(discriminator="kind"), Tag("own")]
    | Annotated[AddedAttack, Tag("added")],
    Discriminator(_whose),
    BeforeValidator(_named),
]
"""Of kind `pgd` where none is given."""
