"""Records: frozen, slotted, keyword-only, documented, picklable, and usable as keys."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import pickle
from enum import StrEnum
from pathlib import Path

import pytest

from spo import records
from spo.records import (
    GenerateRequest,
    Operator,
    Positions,
    Prompt,
    PromptFormat,
    PromptKind,
    Reward,
    RewardStatus,
    Sampling,
    Split,
    SteeringSpec,
)

RECORDS = [
    item
    for _, item in inspect.getmembers(records, inspect.isclass)
    if dataclasses.is_dataclass(item)
]
SOURCE = ast.parse(Path(records.__file__).read_text())


def test_prompt_defaults() -> None:
    prompt = Prompt(prompt_id="p1", text="Describe the picture.", kind=PromptKind.BENIGN)
    assert (prompt.format, prompt.split, prompt.image) == (PromptFormat.CHAT, Split.TRAIN, None)


@pytest.mark.parametrize("record", RECORDS)
def test_frozen_slotted_keyword_only(record: type) -> None:
    parameters = record.__dataclass_params__  # type: ignore[attr-defined]
    assert parameters.frozen
    assert "__slots__" in vars(record)
    kinds = {p.kind for p in list(inspect.signature(record).parameters.values())}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize(
    "record", [n for n in SOURCE.body if isinstance(n, ast.ClassDef)], ids=lambda n: n.name
)
def test_every_record_has_a_docstring(record: ast.ClassDef) -> None:
    assert ast.get_docstring(record)


def test_equal_specs_are_one_key() -> None:
    """Engines group requests by (steering, sampling): equal values must hash alike."""
    one = SteeringSpec(vector="spo", version=7, coefficient=0.1)
    two = SteeringSpec(vector="spo", version=7, coefficient=0.1)
    other = dataclasses.replace(one, version=8)
    assert {one: "a"}[two] == "a"
    assert one != other
    assert hash(Sampling(seed=3)) == hash(Sampling(seed=3))


def test_setting_a_field_is_refused() -> None:
    spec = SteeringSpec(vector="spo", version=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.version = 2  # type: ignore[misc]


def test_request_survives_the_wire() -> None:
    request = GenerateRequest(
        request_id="s3/p/1",
        prompt=Prompt(
            prompt_id="p", text="größer\n\u202e\x00", kind=PromptKind.HARM, image="a b.png"
        ),
        sampling=Sampling(max_tokens=3, seed=11),
        steering=SteeringSpec(
            vector="v", version=2, operator=Operator.CLAMP, positions=Positions.AFTER_IMAGE
        ),
    )
    assert pickle.loads(pickle.dumps(request)) == request


def test_unscored_reward_has_no_number() -> None:
    reward = Reward(status=RewardStatus.FAILED, total=None, reason="judge timed out")
    assert reward.total is None
    assert reward.parts == {}


@pytest.mark.parametrize(
    "kind", [c for _, c in inspect.getmembers(records, inspect.isclass) if issubclass(c, StrEnum)]
)
def test_enums_read_back_from_their_text(kind: type[StrEnum]) -> None:
    for member in kind:
        assert kind(str(member)) is member
        assert str(member) == member.value == member.value.lower()
