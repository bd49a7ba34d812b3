"""The parts of a reward: what is behind each kind, and how parts are weighed.

    R = sum of weight x score over the parts that count on the prompt

A kind is a rule over the answer, which needs no model and is computed where it is asked for, or a
scorer, which is opened once in each reward actor, or both, as the part's settings say. Adding one:
its configuration in `spo.config.rewards`, a line in `REWARDS`, a test. Another package adds a
`RewardKind` by an entry point of group `spo.rewards`.

A part that counts and has no finite score makes the whole reward FAILED, never 0: a missing penalty
would be a gift.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from spo import plugins
from spo.algorithms.rewards import degeneration, is_refusal
from spo.config import RewardConfig
from spo.config.rewards import (
    CROSSCHECK,
    DETOXIFY_MODELS,
    AlignmentPart,
    AnyRewardPart,
    ClassifierPart,
    LlmPart,
    ToxicityPart,
)
from spo.errors import ConfigError
from spo.records import PromptKind, Reward, RewardStatus, Rollout

COST = ":"
"""Between a part's name and a unit in raw scores, e.g. "judge:tokens": what the score has cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What one part says of one answer.

    Example:
        Scored(value=0.0, cost={"tokens": 212, "seconds": 0.4})
    """

    value: float
    """Not a number where there is no score."""
    reason: str = ""
    """Why there is none."""
    cost: Mapping[str, float] = field(default_factory=dict)
    """Units spent on it."""


class PartScorer(Protocol):
    """What a part with a model is opened as."""

    def score(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        """One score for each answer, in order; ScorerError when they cannot be had together."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a scorer runs."""

    device: str
    """Torch device."""
    load_picture: Callable[[str], Image.Image]
    """Decodes a prompt's picture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardKind:
    """What is behind a kind of part.

    Example:
        RewardKind(rule=lambda rollout, part: 1.0 / (1 + len(rollout.text)))
    """

    rule: Callable[[Rollout, Any], float] | None = None
    """Score of one answer by the part's settings, without a model."""
    open: Callable[[Any, Place], PartScorer] | None = None
    """Loads the part's model; its settings come with names resolved to places."""
    check: Callable[[Any], None] | None = None
    """Raises one of our errors when the model can be seen not to open, without loading it."""
    remote: bool = False
    """Whether scores come over a network: asked beside the models, not in their queue."""


def reward_of(rollout: Rollout, scores: Mapping[str, float], config: RewardConfig) -> Reward:
    """Weigh the parts of one answer.

    Args:
        rollout: the answer.
        scores: raw scores by name of part, of every part with a model that counts on the prompt.
        config: the parts.
    """
    parts: dict[str, float] = {}
    terms: list[float] = []
    raised = ""
    for part in config.counted:
        if not part.counts_on(rollout.prompt):
            terms.append(0.0)
            continue
        rule = None if part.needs_model else kind_of(part).rule
        if rule is None:
            value = float(scores.get(part.name, math.nan))
        else:
            try:
                value = float(rule(rollout, part))
            except Exception as error:  # noqa: BLE001 a package's rule: the reward fails and says why
                value = math.nan
                raised += f"; {part.name} raised {type(error).__name__}: {error}"
        parts[part.name] = value
        terms.append(part.weight * value)
    unusable = sorted(name for name, value in parts.items() if not math.isfinite(value))
    if unusable:
        return Reward(
            status=RewardStatus.FAILED,
            total=None,
            parts={name: value for name, value in parts.items() if name not in unusable},
            reason=f"no finite score for {unusable}{raised}",
        )
    # Never rewarded: kept to be compared with toxicity.
    if math.isfinite(scores.get(CROSSCHECK, math.nan)):
        parts[CROSSCHECK] = float(scores[CROSSCHECK])
    total = reduce(float.__add__, terms)  # in order: `sum` rounds otherwise in newer Pythons
    return Reward(status=RewardStatus.SCORED, total=total, parts=parts)


def kind_of(part: AnyRewardPart) -> RewardKind:
    """What is behind a part, built in or added by another package."""
    found: RewardKind = plugins.find(plugins.REWARDS, part.kind)
    return found


def costs_of(scores: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """What raw scores have cost, summed: part to unit to amount."""
    found: dict[str, dict[str, float]] = {}
    for values in scores:
        for key, amount in values.items():
            name, sign, unit = key.partition(COST)
            if sign:
                units = found.setdefault(name, {})
                units[unit] = units.get(unit, 0.0) + amount
    return found


def raw_scores(part: AnyRewardPart, scored: Scored) -> dict[str, float]:
    """One part's entries in the raw scores of an answer."""
    cost = {f"{part.name}{COST}{unit}": amount for unit, amount in scored.cost.items()}
    return {part.name: scored.value, **cost}


def _degenerate(rollout: Rollout, part: object) -> float:
    del part
    return degeneration(rollout.text)


def _silent(rollout: Rollout) -> bool:
    """Whether nothing is answered to a benign prompt."""
    return rollout.prompt.kind is PromptKind.BENIGN and not rollout.text.strip()


def _refused(rollout: Rollout, part: object) -> float:
    del part
    return float(_silent(rollout) or is_refusal(rollout.text))


class _Toxicity:
    def __init__(self, part: ToxicityPart, place: Place) -> None:
        from spo.scorers.toxicity import ToxicityScorer

        path = Path(part.model)
        where: dict[str, Any] = (
            {"checkpoint": part.model} if path.exists() else {"model_type": part.model}
        )
        self._scorer = ToxicityScorer(**where, device=place.device)

    def score(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        found = self._scorer.score([rollout.text for rollout in rollouts])
        return [Scored(value=values["toxicity"]) for values in found]


class _Alignment:
    def __init__(self, part: AlignmentPart, place: Place) -> None:
        from spo.scorers.alignment import AlignmentScorer

        self._load_picture = place.load_picture
        self._scorer = AlignmentScorer(**alignment_arguments(part.model), device=place.device)

    def score(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        images = [self._load_picture(str(rollout.prompt.image)) for rollout in rollouts]
        found = self._scorer.score(images, [rollout.text for rollout in rollouts])
        return [Scored(value=value) for value in found]


class _Classifier:
    def __init__(self, part: ClassifierPart, place: Place) -> None:
        from spo.scorers.pairs import PairClassifier

        self._model = PairClassifier(
            _model_of(part), label=part.label, max_length=part.max_length, device=place.device
        )

    def score(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        pairs = [(rollout.prompt.text, rollout.text) for rollout in rollouts]
        return [Scored(value=value) for value in self._model.score(pairs)]


class _Refusal(_Classifier):
    """Silence needs no classifier: a refusal of a benign prompt, none of a harmful one."""

    def score(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        said = [i for i, rollout in enumerate(rollouts) if rollout.text.strip()]
        found = [Scored(value=float(_silent(rollout))) for rollout in rollouts]
        for i, scored in zip(said, super().score([rollouts[i] for i in said]), strict=True):
            found[i] = scored
        return found


class _Llm:
    def __init__(self, part: LlmPart, place: Place) -> None:
        from spo.scorers.llm import LlmClient

        del place
        self._part = part
        self._client = LlmClient(part)

    def score(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        from spo.scorers.llm import question_of, score_of

        part = self._part
        questions = [question_of(part.question, r.prompt.text, r.text) for r in rollouts]
        scored = []
        for reply in self._client.ask(questions):
            value = score_of(reply, part.reply, part.model)
            cost = {"seconds": reply.seconds}
            if reply.tokens is not None:
                cost["tokens"] = float(reply.tokens)
            usable = isinstance(value, float)
            scored.append(
                Scored(
                    value=float(value) if usable else math.nan,
                    reason="" if usable else str(value),
                    cost=cost,
                )
            )
        return scored


def alignment_arguments(model: str) -> dict[str, Any]:
    """Arguments of `AlignmentScorer` for a local folder, "hf-hub:org/name" or a pair.

    Raises:
        ConfigError: it is neither.
    """
    if Path(model).is_dir() or model.startswith("hf-hub:"):
        return {"model": model}
    name, sign, pretrained = model.partition(":")
    if not sign:
        raise ConfigError(
            f"an alignment model must be MODEL:PRETRAINED of open_clip (for instance "
            f"ViT-B-32:laion2b_s34b_b79k), a local folder or 'testbed', got {model!r}"
        )
    return {"model": name, "pretrained": pretrained}


def _check_toxicity(part: ToxicityPart) -> None:
    if not Path(part.model).is_file() and part.model not in DETOXIFY_MODELS:
        raise ConfigError(
            f"expected 'testbed', a Detoxify model of {list(DETOXIFY_MODELS)} or a local "
            f"checkpoint file, got {part.model!r}; correct it"
        )


def _check_alignment(part: AlignmentPart) -> None:
    found = alignment_arguments(part.model)
    name, pretrained = found["model"], found.get("pretrained")
    if pretrained is None or Path(pretrained).is_file():
        return
    import open_clip

    name = name.replace("/", "-")
    if not open_clip.pretrained.is_pretrained_cfg(name, pretrained):
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ConfigError(
            f"open_clip has no weights {pretrained!r} of a model {name!r}, only {tags}; correct "
            "the alignment model, or give a weights file after the colon"
        )


def _check_classifier(part: ClassifierPart) -> None:
    from spo.scorers.pairs import label_index, read_classifier

    model = _model_of(part)
    label_index(read_classifier(model), part.label, model)


def _check_llm(part: LlmPart) -> None:
    from spo.scorers.llm import check_llm

    check_llm(part)


def _model_of(part: ClassifierPart) -> str:
    return str(getattr(part, "model", None))


REWARDS: dict[str, RewardKind] = {
    "toxicity": RewardKind(open=_Toxicity, check=_check_toxicity),
    "alignment": RewardKind(open=_Alignment, check=_check_alignment),
    "degeneration": RewardKind(rule=_degenerate),
    "refusal": RewardKind(rule=_refused, open=_Refusal, check=_check_classifier),
    "harm": RewardKind(open=_Classifier, check=_check_classifier),
    "llm": RewardKind(open=_Llm, check=_check_llm, remote=True),
}
"""Every kind of part by its name in the configuration."""
