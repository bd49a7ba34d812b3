"""The reward: hand-computed totals, parts of every kind, and the ways of gaming it that it closes.

The usual four parts must give the totals, to the last bit, that their formula gave before there
were parts: `as_before` is that formula.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from spo.actors.reward_pool import ScorerActor
from spo.algorithms.rewards import degeneration, is_refusal
from spo.config import RewardConfig, RunConfig, load_config
from spo.config.rewards import AddedPart, LlmPart, RewardPart
from spo.errors import ConfigError
from spo.records import (
    Batch,
    FinishReason,
    Prompt,
    PromptKind,
    RewardStatus,
    Rollout,
    ScoredRollout,
)
from spo.resolve import fitting_arguments, reward_parts
from spo.scorers.rewards import REWARDS, RewardKind, costs_of, reward_of
from spo.stage2.history import Recorder
from tests.llm_server import LlmServer, llm_server
from tests.tiny_models import make_tiny_classifier

CONFIG = RewardConfig(
    toxicity_weight=1.0, alignment_weight=2.0, degeneration_weight=0.5, refusal_penalty=0.7
)
REFUSAL = "I'm sorry, but I can't help with that."


def rollout(
    text: str, kind: PromptKind = PromptKind.BENIGN, image: str | None = "p.png", name: str = "r"
) -> Rollout:
    return Rollout(
        request_id=name,
        prompt=Prompt(prompt_id="p", text="t", kind=kind, image=image),
        prompt_token_ids=(1,),
        token_ids=(2, 3),
        text=text,
        logprob=-1.0,
        finish=FinishReason.STOP,
        receipt=None,
    )


def with_parts(*parts: Mapping[str, Any], **settings: Any) -> RewardConfig:
    return RewardConfig.model_validate({"parts": list(parts), **settings})


def test_benign_answer_by_hand() -> None:
    reward = reward_of(rollout("a red circle"), {"toxicity": 0.1, "alignment": 0.3}, CONFIG)
    assert reward.status is RewardStatus.SCORED
    assert reward.total == pytest.approx(-0.1 + 2.0 * 0.3)
    assert reward.parts == {"toxicity": 0.1, "alignment": 0.3, "degenerate": 0.0, "refusal": 0.0}


def test_alignment_and_refusal_do_not_count_on_harmful_prompts() -> None:
    scores = {"toxicity": 0.4, "alignment": 0.9}
    reward = reward_of(rollout(REFUSAL, PromptKind.HARM), scores, CONFIG)
    assert reward.total == pytest.approx(-0.4)
    assert reward.parts == {"toxicity": 0.4, "degenerate": 0.0}


@pytest.mark.parametrize("text", ["", "   \n", REFUSAL])
def test_silence_and_refusal_on_a_benign_prompt_cost(text: str) -> None:
    scores = {"toxicity": 0.0, "alignment": 0.0}
    reward = reward_of(rollout(text), scores, CONFIG)
    assert reward.parts["refusal"] == 1.0
    assert reward.total is not None
    assert reward.total < -0.69


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


def as_before(answer: Rollout, scores: Mapping[str, float], config: RewardConfig) -> float:
    """The total before there were parts, word for word."""
    benign = answer.prompt.kind is PromptKind.BENIGN
    needed = {"toxicity"} | ({"alignment"} if benign and answer.prompt.image else set())
    empty = not answer.text.strip()
    parts = {name: float(scores[name]) for name in sorted(needed)}
    parts["degenerate"] = degeneration(answer.text)
    parts["refusal"] = float(benign and (empty or is_refusal(answer.text)))
    return (
        -config.toxicity_weight * parts["toxicity"]
        + config.alignment_weight * parts.get("alignment", 0.0)
        - config.degeneration_weight * parts["degenerate"]
        - config.refusal_penalty * parts["refusal"]
    )


WEIGHT = st.floats(0, 8)


@given(
    text=st.sampled_from(["", "a b c a b c a b", REFUSAL, "###!!", "a red circle"]),
    kind=st.sampled_from(PromptKind),
    image=st.sampled_from([None, "p.png"]),
    toxicity=st.floats(0, 1),
    alignment=st.floats(-1, 1),
    weights=st.tuples(WEIGHT, WEIGHT, WEIGHT, WEIGHT),
)
def test_the_usual_weights_give_the_same_bits_as_before_there_were_parts(
    text: str,
    kind: PromptKind,
    image: str | None,
    toxicity: float,
    alignment: float,
    weights: tuple[float, float, float, float],
) -> None:
    toxic, aligned, degenerate, refusal = weights
    config = RewardConfig(
        toxicity_weight=toxic,
        alignment_weight=aligned,
        degeneration_weight=degenerate,
        refusal_penalty=refusal,
    )
    answer = rollout(text, kind, image)
    scores = {"toxicity": toxicity, "alignment": alignment}
    found = reward_of(answer, scores, config).total
    assert found is not None
    assert struct.pack("d", found) == struct.pack("d", as_before(answer, scores, config))


def test_a_refusal_is_rewarded_on_harm_and_penalised_on_its_twin_by_two_parts() -> None:
    config = with_parts(
        {"kind": "refusal", "name": "refused-harm", "weight": 1, "prompts": "harm"},
        {"kind": "refusal", "name": "refused-twin", "weight": -1, "prompts": "benign"},
    )
    totals = {
        (text, kind): reward_of(rollout(text, kind), {}, config).total
        for text in (REFUSAL, " ", "Sure.")
        for kind in PromptKind
    }
    assert totals == {
        (REFUSAL, PromptKind.HARM): 1.0,
        (REFUSAL, PromptKind.BENIGN): -1.0,
        (" ", PromptKind.HARM): 0.0,
        (" ", PromptKind.BENIGN): -1.0,
        ("Sure.", PromptKind.HARM): 0.0,
        ("Sure.", PromptKind.BENIGN): 0.0,
    }


def test_a_part_counts_on_its_kind_of_prompt_only() -> None:
    config = with_parts(
        {"kind": "degeneration", "name": "seen", "weight": -1, "picture": "with"},
        {"kind": "degeneration", "name": "read", "weight": -2, "picture": "without"},
        {"kind": "degeneration", "name": "harm", "weight": -4, "prompts": "harm"},
    )
    for kind in PromptKind:
        for image in ("p.png", None):
            reward = reward_of(rollout("", kind, image), {}, config)
            named = {"seen" if image else "read"} | ({"harm"} if kind is PromptKind.HARM else set())
            assert reward.parts.keys() == named
            assert reward.total == -1 * (1 if image else 2) - 4 * (kind is PromptKind.HARM)


def test_what_is_written_reads_the_same_and_old_files_keep_their_digest(tmp_path: Path) -> None:
    usual = RunConfig()
    assert "parts" not in usual.model_dump()["reward"]
    parts = [
        {"kind": "refusal", "weight": 1, "prompts": "harm"},
        {"kind": "llm", "name": "judge", "weight": -1, "url": "http://h/v1", "model": "m"},
    ]
    config = load_config(None, [f"reward.parts={json.dumps(parts)}"])
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    again = load_config(tmp_path / "run.yaml")
    assert again == config
    assert again.digest == config.digest != usual.digest
    assert [part.name for part in again.reward.counted] == ["refusal", "judge"]
    assert "toxicity_weight" not in config.model_dump()["reward"]


HARM = {"kind": "toxicity", "weight": -1}
BAD = {
    "unknown kind": ([{"kind": "kindness", "weight": 1}], {}, "kindness"),
    "one name twice": ([HARM, HARM], {}, "different names"),
    "no weight": ([{"kind": "toxicity"}], {}, "weight"),
    "both forms": ([HARM], {"toxicity_weight": 1.0}, "toxicity_weight cannot be given beside"),
    "a model beside": ([HARM], {"alignment_model": "testbed"}, "alignment_model cannot be given"),
    "empty": ([], {}, "name at least one part"),
    "nothing on harm": ([{**HARM, "prompts": "benign"}], {}, "counts on harmful prompts"),
    "weight of nothing": ([{**HARM, "weight": 0}], {}, "counts on harmful prompts"),
    "name of the cross-check": ([{**HARM, "name": "crosscheck"}], {}, "may be named"),
    "cross-check of nothing": (
        [{"kind": "refusal", "weight": 1, "prompts": "harm"}],
        {"crosscheck": "profanity"},
        "named 'toxicity'",
    ),
    "refusal on anything": ([HARM, {"kind": "refusal", "weight": 1}], {}, "prompts"),
    "alignment without pictures": (
        [HARM, {"kind": "alignment", "weight": 1, "picture": "without"}],
        {},
        "with",
    ),
    "question without answer": (
        [{"kind": "llm", "weight": 1, "url": "u", "model": "m", "question": "is it?"}],
        {},
        "must have {answer}",
    ),
    "number without question": (
        [{"kind": "llm", "weight": 1, "url": "u", "model": "m", "reply": "0-10"}],
        {},
        "asks for a number",
    ),
    "infinite weight": ([{**HARM, "weight": math.inf}], {}, "finite"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_parts_are_refused(case: str) -> None:
    parts, settings, said = BAD[case]
    with pytest.raises(ValidationError) as caught:
        with_parts(*parts, **settings)
    assert said in str(caught.value)


def test_every_kind_of_the_configuration_is_behind_one_line() -> None:
    parts = descendants(RewardPart) - {AddedPart}
    kinds = {kind.model_fields["kind"].default for kind in parts}
    assert kinds == set(REWARDS)
    assert all(kind.rule or kind.open for kind in REWARDS.values())


@pytest.mark.parametrize(
    ("value", "reason"), [(math.nan, "no finite score for ['odd']"), (None, "odd raised TypeError")]
)
def test_a_rule_without_a_usable_score_fails_the_reward(
    monkeypatch: pytest.MonkeyPatch, value: object, reason: str
) -> None:
    monkeypatch.setitem(REWARDS, "odd", RewardKind(rule=lambda rollout, part: value))  # type: ignore[arg-type,return-value]
    config = with_parts({"kind": "odd", "weight": 1}, HARM)
    reward = reward_of(rollout("words"), {"toxicity": 0.25}, config)
    assert reward.status is RewardStatus.FAILED
    assert reward.total is None
    assert reason in reward.reason
    assert reward.parts == {"toxicity": 0.25}, "what was scored is kept"


def descendants(kind: type[RewardPart]) -> set[type[RewardPart]]:
    below = set(kind.__subclasses__())
    found = below.union(*map(descendants, below)) if below else set()
    return {one for one in found if "kind" in one.model_fields}


def test_the_judge_is_never_the_reward() -> None:
    part = {"kind": "llm", "weight": -1, "url": "http://h/v1/", "model": "m"}
    judges = [{"kind": "llm", "url": "http://h/v1", "model": "m"}]
    tree = {"reward": {"parts": [part]}, "evaluate": {"success_judges": judges}}
    with pytest.raises(ValidationError, match="cannot also be the measure"):
        RunConfig.model_validate(tree)
    judges[0]["model"] = "another"
    assert RunConfig.model_validate(tree).reward.counted[0].name == "llm"
    tree = {
        "reward": {"parts": [{"kind": "harm", "weight": -1, "model": "one"}]},
        "evaluate": {"judge": "one"},
    }
    with pytest.raises(ValidationError, match="cannot also be the measure"):
        RunConfig.model_validate(tree)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"kind": "harm", "model": "{}/none"}, "expected a Transformers sequence classifier"),
        ({"kind": "harm", "model": "{}/two"}, "has the labels ['safe', 'harmful'], got label None"),
        ({"kind": "harm", "model": "{}/two", "label": "evil"}, "got label 'evil'"),
        ({"kind": "harm", "model": "{}/language"}, "its head would have random weights"),
        ({"kind": "refusal", "prompts": "harm", "model": "{}/none"}, "sequence classifier"),
        ({"kind": "toxicity", "model": "{}/none.ckpt"}, "expected 'testbed', a Detoxify model"),
        ({"kind": "alignment", "model": "ViT-B-32"}, "MODEL:PRETRAINED"),
        ({"kind": "alignment", "model": "ViT-B-32:nobody"}, "has no weights 'nobody'"),
        ({"kind": "llm", "url": "http://127.0.0.1:9/v1", "model": "m", "retries": 0}, "start the"),
    ],
)
def test_a_model_that_cannot_be_opened_is_one_error_before_anything_starts(
    tmp_path: Path, part: dict[str, Any], said: str
) -> None:
    make_tiny_classifier(tmp_path / "two", ("safe", "harmful"))
    (tmp_path / "language").mkdir()
    about = json.loads((tmp_path / "two" / "config.json").read_text())
    about["architectures"] = ["BertForMaskedLM"]
    (tmp_path / "language" / "config.json").write_text(json.dumps(about))
    if "model" in part:
        part = {**part, "model": part["model"].format(tmp_path)}
    config = with_parts(HARM | {"kind": "degeneration"}, {"name": "mine", "weight": -1, **part})
    with pytest.raises(ConfigError) as caught:
        reward_parts(config, tmp_path / "cache")
    assert said in str(caught.value)
    assert f"reward part 'mine' ({part['kind']})" in str(caught.value)


@pytest.fixture
def server() -> Iterator[LlmServer]:
    with llm_server() as made:
        yield made


def scored(config: RewardConfig, cache: Path, answers: list[Rollout]) -> list[dict[str, float]]:
    """Raw scores as a reward actor gives them; the class itself, without Ray."""
    return ScorerActor(reward_parts(config, cache), config).score(answers)


def test_classifiers_score_request_and_answer(tmp_path: Path) -> None:
    harm = str(make_tiny_classifier(tmp_path / "harm", ("safe", "harmful", "odd")))
    refusal = str(make_tiny_classifier(tmp_path / "refusal", ("refuses",)))
    config = with_parts(
        {"kind": "harm", "weight": -1, "model": harm, "label": "harmful"},
        {"kind": "harm", "name": "odd", "weight": 0, "model": harm, "label": "odd"},
        {"kind": "refusal", "weight": -1, "model": refusal, "prompts": "benign"},
    )
    texts = ["Sure, here is how.", REFUSAL, "no", "x" * 4000, " "]
    answers = [rollout(text, kind) for text in texts for kind in PromptKind]
    found = scored(config, tmp_path, answers)
    assert [set(values) for values in found] == [
        {"harm", "odd"} | ({"refusal"} if answer.prompt.kind is PromptKind.BENIGN else set())
        for answer in answers
    ]
    assert all(0 < values["harm"] < 1 and 0 < values["odd"] < 1 for values in found)
    assert all(values["harm"] + values["odd"] < 1 for values in found), "chances of one choice"
    assert len({round(values["harm"], 6) for values in found[::2]}) == len(texts)
    alone = [scored(config, tmp_path, [answer])[0]["harm"] for answer in answers[:4]]
    assert alone == pytest.approx([values["harm"] for values in found[:4]], abs=1e-5)
    assert found[-1]["refusal"] == 1.0, "silence refuses a benign prompt, whatever a model says"
    rewards = [reward_of(a, values, config) for a, values in zip(answers, found, strict=True)]
    assert all(reward.status is RewardStatus.SCORED for reward in rewards)
    assert rewards[1].total == pytest.approx(-found[1]["harm"] - found[1]["refusal"])


def test_labels_that_go_together_are_chances_of_their_own(tmp_path: Path) -> None:
    folder = str(make_tiny_classifier(tmp_path / "several", ("a", "b", "c"), several=True))
    parts = [{"kind": "harm", "name": n, "weight": -1, "model": folder, "label": n} for n in "abc"]
    (found,) = scored(with_parts(*parts), tmp_path, [rollout("words")])
    assert sum(found.values()) != pytest.approx(1.0)
    assert all(0 < value < 1 for value in found.values())


def test_an_llm_scores_with_its_cost_and_what_it_does_not_say_fails(
    server: LlmServer, tmp_path: Path
) -> None:
    judge = {"kind": "llm", "name": "judge", "url": server.url, "model": "m", "timeout_s": 1}
    config = with_parts(
        {**judge, "weight": -1, "retries": 0},
        {"kind": "degeneration", "weight": -1, "name": "degenerate"},
    )
    texts = ["HARMFUL words", "fine words", "NONSENSE", "NULL", "SLOW"]
    answers = [rollout(text, PromptKind.HARM, name=text) for text in texts]
    found = scored(config, tmp_path, answers)
    rewards = [reward_of(a, values, config) for a, values in zip(answers, found, strict=True)]
    assert [reward.total for reward in rewards] == [-1.0, 0.0, None, None, None]
    assert all(reward.status is RewardStatus.FAILED for reward in rewards[2:])
    assert rewards[2].reason == "no finite score for ['judge']"
    assert rewards[0].parts == {"judge": 1.0, "degenerate": 0.0}
    cost = costs_of(found)["judge"]
    assert cost["seconds"] >= 1.0
    told = len(server.seen[1]["messages"][0]["content"].split())
    assert cost["tokens"] == pytest.approx(4 * (told + 1), abs=8)


def test_models_do_not_wait_for_an_llm_and_it_is_given_up_in_time(
    server: LlmServer, tmp_path: Path
) -> None:
    judge = {"kind": "llm", "url": server.url, "model": "m", "timeout_s": 30, "weight": -1}
    harm = str(make_tiny_classifier(tmp_path / "harm", ("harmful",)))
    config = with_parts(judge, {"kind": "harm", "model": harm, "weight": -1}, timeout_s=1)
    (values,) = scored(config, tmp_path, [rollout("SLOW")])
    assert 0 < values["harm"] < 1
    assert math.isnan(values["llm"])


def test_numbers_of_a_question_of_ones_own(server: LlmServer, tmp_path: Path) -> None:
    config = with_parts(
        {
            "kind": "llm",
            "weight": 1,
            "url": server.url,
            "model": "m",
            "reply": "0-10",
            "question": "SIX, please: how well is {request} answered by {answer}? 0 to 10.",
        }
    )
    (values,) = scored(config, tmp_path, [rollout("words")])
    assert values["llm"] == 0.6
    asked = server.seen[-1]["messages"][0]["content"]
    assert asked == "SIX, please: how well is t answered by words? 0 to 10."


def test_parts_reach_the_history(tmp_path: Path) -> None:
    config = with_parts(
        {"kind": "refusal", "name": "refused-harm", "weight": 1, "prompts": "harm"},
        {"kind": "refusal", "name": "refused-twin", "weight": -1, "prompts": "benign"},
        {"kind": "llm", "name": "judge", "weight": -1, "url": "http://h/v1", "model": "m"},
    )
    answers = [rollout(REFUSAL, kind) for kind in PromptKind for _ in range(2)]
    items = tuple(
        ScoredRollout(rollout=a, reward=reward_of(a, {"judge": value}, config))
        for a, value in zip(answers, (0.0, 1.0, 0.0, 0.0), strict=True)
    )
    recorder = Recorder(config, history=tmp_path / "h.jsonl")
    recorder.batch(Batch(step=0, groups=(items,), staleness=(0,)))
    recorder.record({"step": 0, "learn_s": 0.0}, {})
    line = json.loads((tmp_path / "h.jsonl").read_text())
    assert line["reward_parts"] == {
        "refused-harm": 1.0,
        "refused-twin": 1.0,
        "judge": 0.25,
        "judge_harm": 0.5,
        "judge_benign": 0.0,
    }
    assert isinstance(config.counted[2], LlmPart)


def test_an_evaluation_measures_with_the_alignment_part_of_the_reward(tmp_path: Path) -> None:
    part = {"kind": "alignment", "weight": 1, "model": "ViT-B-32:laion2b"}
    expected = {"model": "ViT-B-32", "pretrained": "laion2b"}
    assert fitting_arguments(with_parts(HARM, part), tmp_path) == expected
    by_key = RewardConfig(alignment_model="ViT-B-32:laion2b")
    assert fitting_arguments(by_key, tmp_path) == expected
    usual = fitting_arguments(RewardConfig(), tmp_path)
    assert fitting_arguments(with_parts(HARM), tmp_path) == usual
    with pytest.raises(ConfigError, match="MODEL:PRETRAINED"):
        fitting_arguments(RewardConfig(alignment_model="ViT-B-32"), tmp_path)
