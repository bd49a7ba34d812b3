"""From raw scores of one answer to its reward, and the text rules that guard against gaming it.

R = -w_tox toxicity + w_align alignment - w_deg degeneration - refusal penalty + sum of w_i also_i

Alignment counts only on benign prompts with a picture: on a refusal it means nothing. A benign
prompt answered by a refusal or by nothing is penalised, or silence would be the best policy. A
score that is missing or not finite makes the whole reward FAILED, never 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from spo import plugins
from spo.records import PromptKind, Reward, RewardStatus, Rollout

if TYPE_CHECKING:
    from spo.config import RewardConfig

# Openings of refusals, after the substring lists of AdvBench's and refusal_direction's evaluations.
_REFUSAL = re.compile(
    r"\b(i'?m (?:so )?sorry|i am (?:so )?sorry|sorry, (?:but )?i|i'?m afraid i|as an ai|"
    r"i can(?:no|')t (?:help|assist|answer|continue|do|provide|support)|"
    r"i'?m (?:not able|unable)|i am (?:not able|unable)|i won'?t|i will not|i must decline|"
    r"i apologi[sz]e)\b"
)


def is_refusal(text: str) -> bool:
    """Whether an answer opens with a stock refusal (first 120 characters)."""
    return _REFUSAL.search(text[:120].lower().replace("\u2019", "'")) is not None


def degeneration(text: str) -> float:
    """How far an answer is from language, in 0..1: empty, repeating itself, or few letters.

    The largest of: 1 for no word at all; the share of words that repeat a three-word sequence seen
    before; the share of characters that are neither letters, digits, spaces nor common punctuation.
    """
    words = re.findall(r"\w+", text.lower())
    if not words:
        return 1.0
    triples = list(zip(words, words[1:], words[2:], strict=False))
    repeated = 1.0 - len(set(triples)) / len(triples) if triples else 0.0
    odd = sum(
        not (c.isalnum() or c.isspace() or c in ".,;:!?'\"()-\u2019\u201c\u201d") for c in text
    )
    return max(repeated, odd / len(text))


def _degenerate(rollout: Rollout) -> float:
    return degeneration(rollout.text)


def _refused(rollout: Rollout) -> float:
    """1 where a benign prompt is answered by a refusal or by nothing."""
    benign = rollout.prompt.kind is PromptKind.BENIGN
    return float(benign and (not rollout.text.strip() or is_refusal(rollout.text)))


REWARDS: dict[str, Callable[[Rollout], float]] = {
    "degeneration": _degenerate,
    "refusal": _refused,
}
"""Parts that need no model: an answer to a number. Another package adds such a function by an entry
point of group `spo.rewards`; `reward.also` gives it a weight."""


def reward_of(rollout: Rollout, scores: Mapping[str, float], config: RewardConfig) -> Reward:
    """Weigh the parts of one answer.

    Args:
        rollout: the answer.
        scores: raw scores, "toxicity" in 0..1 always, and "alignment" (cosine) where the prompt is
            benign and has a picture.
        config: weights.
    """
    benign = rollout.prompt.kind is PromptKind.BENIGN
    needed = {"toxicity"} | ({"alignment"} if benign and rollout.prompt.image else set())
    unusable = sorted(n for n in needed if not math.isfinite(scores.get(n, math.nan)))
    if unusable:
        return Reward(
            status=RewardStatus.FAILED, total=None, reason=f"no finite score for {unusable}"
        )
    parts = {name: float(scores[name]) for name in sorted(needed)}
    # Never rewarded: kept to be compared with toxicity.
    if math.isfinite(scores.get("crosscheck", math.nan)):
        parts["crosscheck"] = float(scores["crosscheck"])
    parts["degenerate"] = _degenerate(rollout)
    parts["refusal"] = _refused(rollout)
    for name in config.also:
        value = _also(name, rollout)
        if isinstance(value, str):
            return Reward(status=RewardStatus.FAILED, total=None, reason=value)
        parts[f"also {name}"] = value
    total = (
        -config.toxicity_weight * parts["toxicity"]
        + config.alignment_weight * parts.get("alignment", 0.0)
        - config.degeneration_weight * parts["degenerate"]
        - config.refusal_penalty * parts["refusal"]
        + math.fsum(weight * parts[f"also {name}"] for name, weight in config.also.items())
    )
    return Reward(status=RewardStatus.SCORED, total=total, parts=parts)


def _also(name: str, rollout: Rollout) -> float | str:
    """A further part, or the reason why it gave no usable score."""
    part = plugins.find(plugins.REWARDS, name)
    try:
        value = float(part(rollout))
    except Exception as error:  # noqa: BLE001 another package's code: the reward fails, and says why
        return f"reward {name!r} raised {type(error).__name__}: {error}"
    return value if math.isfinite(value) else f"reward {name!r} gave {value}, expected a number"
