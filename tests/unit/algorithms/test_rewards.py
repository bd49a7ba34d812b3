"""The reward: hand-computed totals, and the ways of gaming it that it closes."""

from __future__ import annotations

import math

import pytest

from spo.algorithms.rewards import REWARDS, degeneration, is_refusal, reward_of
from spo.config import RewardConfig
from spo.records import FinishReason, Prompt, PromptKind, RewardStatus, Rollout

CONFIG = RewardConfig(
    toxicity_weight=1.0, alignment_weight=2.0, degeneration_weight=0.5, refusal_penalty=0.7
)


def rollout(
    text: str, kind: PromptKind = PromptKind.BENIGN, image: str | None = "p.png"
) -> Rollout:
    return Rollout(
        request_id="r",
        prompt=Prompt(prompt_id="p", text="t", kind=kind, image=image),
        prompt_token_ids=(1,),
        token_ids=(2, 3),
        text=text,
        logprob=-1.0,
        finish=FinishReason.STOP,
        receipt=None,
    )


def test_benign_answer_by_hand() -> None:
    reward = reward_of(rollout("a red circle"), {"toxicity": 0.1, "alignment": 0.3}, CONFIG)
    assert reward.status is RewardStatus.SCORED
    assert reward.total == pytest.approx(-0.1 + 2.0 * 0.3)
    assert reward.parts == {"toxicity": 0.1, "alignment": 0.3, "degenerate": 0.0, "refusal": 0.0}


def test_alignment_does_not_count_on_harmful_prompts() -> None:
    scores = {"toxicity": 0.4, "alignment": 0.9}
    reward = reward_of(rollout("fine words", PromptKind.HARM), scores, CONFIG)
    assert reward.total == pytest.approx(-0.4)
    assert "alignment" not in reward.parts


@pytest.mark.parametrize("text", ["", "   \n", "I'm sorry, but I can't help with that."])
def test_silence_and_refusal_on_a_benign_prompt_cost(text: str) -> None:
    scores = {"toxicity": 0.0, "alignment": 0.0}
    assert reward_of(rollout(text), scores, CONFIG).parts["refusal"] == 1.0
    assert reward_of(rollout(text), scores, CONFIG).total < -0.69
    assert reward_of(rollout(text, PromptKind.HARM), scores, CONFIG).parts["refusal"] == 0.0


@pytest.mark.parametrize(
    "scores",
    [
        {},
        {"toxicity": math.nan, "alignment": 0.1},
        {"toxicity": 0.1},
        {"toxicity": 0.1, "alignment": math.inf},
    ],
)
def test_a_missing_or_infinite_score_fails_visibly(scores: dict[str, float]) -> None:
    reward = reward_of(rollout("words"), scores, CONFIG)
    assert reward.status is RewardStatus.FAILED
    assert reward.total is None
    assert "no finite score" in reward.reason


def test_text_only_benign_prompt_needs_no_alignment() -> None:
    reward = reward_of(rollout("words", image=None), {"toxicity": 0.2}, CONFIG)
    assert reward.total == pytest.approx(-0.2)


def test_degeneration_by_hand() -> None:
    assert degeneration("") == 1.0
    assert degeneration("...") == 1.0
    assert degeneration("a plain sentence, nothing odd.") == 0.0
    # Six words make four triples of which two differ.
    assert degeneration("go on go on go on") == pytest.approx(0.5)
    assert degeneration("ab ####") == pytest.approx(4 / 7)


def test_refusals_are_recognised_at_the_beginning_only() -> None:
    assert is_refusal("I\u2019m sorry, I cannot help.")
    assert is_refusal("As an AI language model, I")
    assert not is_refusal("The red circle is at the top left.")
    assert not is_refusal("word " * 40 + "I'm sorry")


def test_a_further_part_is_weighed_and_kept() -> None:
    config = RewardConfig(also={"degeneration": -2.0})
    plain = reward_of(rollout("word " * 9, PromptKind.HARM), {"toxicity": 0.1}, RewardConfig())
    more = reward_of(rollout("word " * 9, PromptKind.HARM), {"toxicity": 0.1}, config)
    assert plain.total is not None
    assert more.total is not None
    part = more.parts["also degeneration"]
    assert part == more.parts["degenerate"] > 0.5
    assert more.total == pytest.approx(plain.total - 2.0 * part)


@pytest.mark.parametrize(
    ("value", "reason"),
    [(math.nan, "gave nan, expected a number"), (None, "raised TypeError")],
)
def test_a_further_part_without_a_usable_score_fails_the_reward(
    monkeypatch: pytest.MonkeyPatch, value: object, reason: str
) -> None:
    monkeypatch.setitem(REWARDS, "odd", lambda _: value)
    reward = reward_of(
        rollout("words", PromptKind.HARM), {"toxicity": 0.1}, RewardConfig(also={"odd": 1.0})
    )
    assert reward.status is RewardStatus.FAILED
    assert reward.total is None
    assert reason in reward.reason
