"""The caller's side: wire format, slots, refusals, receipts, salts. No engine."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spo.engines.vllm.plugin.wire import Lane, PluginConfig, RequestSteering, cache_salt, op_version
from spo.engines.vllm.vector_table import EngineAccount, SteeringDesk
from spo.errors import SteeringError
from spo.records import Operator, Positions, SteeringSpec
from spo.vector import SteeringVector

lanes = st.builds(
    Lane,
    slot=st.integers(1, 64),
    sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
    coefficient=st.floats(-8, 8, allow_nan=False),
    operator=st.sampled_from(list(Operator)),
    positions=st.sampled_from(list(Positions)),
)
requests = st.builds(
    RequestSteering,
    key=st.text(min_size=1, max_size=20),
    lanes=st.lists(lanes, max_size=4).map(tuple),
    capture_row=st.integers(0, 8),
    capture_positions=st.sampled_from(list(Positions)),
    prompt_length=st.integers(0, 4096),
)
garbage = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["key", "lanes", "capture_row", "capture_positions", "prompt_length", "x"]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=12,
)


def make_vector(seed=0, norm=1.0):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(2, 8, generator=generator)
    return SteeringVector(
        layers=(0, 1),
        directions=norm * directions / directions.norm(dim=-1, keepdim=True),
        mean_norms=torch.ones(2),
        calibration=torch.zeros(2, 8),
        model_id="m",
    )


def make_desk(slots=3, **config):
    desk = SteeringDesk(PluginConfig(slots=slots, **config), max_dose=4.0)
    for version in (1, 2):
        vector = make_vector(version)
        desk.confirm(desk.reserve("a", vector, version), [vector.sha256])
    return desk


def spec(version=1, **changes):
    return SteeringSpec(**{"vector": "a", "version": version, **changes})


@given(requests)
def test_request_survives_the_wire(request):
    wire = json.loads(json.dumps(request.to_wire()))
    assert RequestSteering.from_wire(wire) == request


@given(garbage)
def test_anything_else_on_the_wire_is_refused_by_type(data):
    try:
        made = RequestSteering.from_wire(data)
    except SteeringError:
        return
    assert isinstance(made, RequestSteering)
    assert all(math.isfinite(lane.coefficient) for lane in made.lanes)


def test_config_survives_the_wire_and_refuses_what_it_does_not_know():
    config = PluginConfig(slots=4, lanes=2, operators=(Operator.ADD,), version=op_version())
    assert PluginConfig.from_wire(json.loads(json.dumps(config.to_wire()))) == config
    assert not config.gated
    for bad in ({"slots": 0}, {"slots": True}, {"operators": ["push"]}, {"slot": 4}, ["slots"]):
        with pytest.raises(SteeringError):
            PluginConfig.from_wire(bad)


def test_salt_separates_everything_that_changes_the_hidden_states():
    base = Lane(slot=1, sha256="a", coefficient=1.0, operator=Operator.ADD, positions=Positions.ALL)
    variants = [
        (base,),
        (Lane(**{**_fields(base), "sha256": "b"}),),
        (Lane(**{**_fields(base), "coefficient": 1.0000001}),),
        (Lane(**{**_fields(base), "operator": Operator.CLAMP}),),
        (Lane(**{**_fields(base), "positions": Positions.TEXT}),),
        (base, base),
    ]
    assert len({cache_salt(lanes) for lanes in variants}) == len(variants)
    assert cache_salt((base,), "user") != cache_salt((base,))
    assert cache_salt((Lane(**{**_fields(base), "slot": 2}),)) == cache_salt((base,))
    assert (cache_salt(()), cache_salt((), "user")) == (None, "user")


def _fields(lane):
    return {name: getattr(lane, name) for name in lane.__dataclass_fields__}


def test_a_version_in_use_keeps_its_slot_and_is_freed_afterwards():
    desk = make_desk(slots=2)
    held = desk.bind([(spec(1),), (spec(2),)])
    with pytest.raises(SteeringError, match="all 2 slots are taken"):
        desk.reserve("a", make_vector(3), 3)
    with pytest.raises(SteeringError, match="1 requests in flight"):
        desk.retire("a", 1)
    desk.release(held[:1])
    slot = desk.reserve("a", make_vector(3), 3)
    assert slot.number == held[0].slots[0].number
    assert desk.slots.held() == {"a": [2]}
    with pytest.raises(SteeringError, match="is not published"):
        desk.bind([(spec(3),)])


def test_one_bad_request_holds_nothing():
    desk = make_desk()
    with pytest.raises(SteeringError, match="version 9"):
        desk.bind([(spec(1),), (spec(9),)])
    desk.retire("a")
    assert desk.slots.held() == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"coefficient": math.nan}, "finite"),
        ({"coefficient": -math.inf}, "finite"),
        ({"coefficient": "1"}, "finite"),
        ({"coefficient": 4.1}, "at most 4"),
        ({"operator": Operator.PROJECT, "coefficient": 5.0}, "at most 4"),
        ({"operator": Operator.CLAMP}, "not compiled"),
        ({"positions": "middle"}, "last_prompt"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(changes, words):
    desk = make_desk(operators=(Operator.ADD, Operator.PROJECT))
    with pytest.raises(SteeringError, match=words):
        desk.bind([(spec(**changes),)])
    with pytest.raises(SteeringError, match="lanes=1"):
        desk.bind([(spec(), spec())])
    desk.retire("a")


def test_publishing_needs_the_same_hash_from_every_worker():
    desk = make_desk()
    vector = make_vector(5)
    slot = desk.reserve("b", vector, 1)
    with pytest.raises(SteeringError, match="nothing was published"):
        desk.confirm(slot, [vector.sha256, "0" * 64])
    assert "b" not in desk.slots.held()
    with pytest.raises(SteeringError, match="already published"):
        desk.reserve("a", vector, 1)


def test_receipts_must_agree_with_what_was_asked_on_every_rank():
    desk = make_desk()
    binding = desk.bind([(spec(positions=Positions.GENERATED),)])[0]
    sha = binding.lanes[0].sha256
    seen = EngineAccount(prompt_length=10, tokens=14, cached=4, spans=())
    good = {"sha256": [sha], "steered": [5], "first": 4, "until": 14}
    receipt = desk.receipts(binding, [good, good], seen)[0]
    assert (receipt.sha256, receipt.layers) == (sha, (0, 1))
    for bad in (
        {**good, "sha256": ["0" * 64]},
        {**good, "steered": [4]},
        {**good, "until": 13, "steered": [4]},
        {**good, "first": 5},
        {**good, "first": -1},
    ):
        with pytest.raises(SteeringError, match="cannot be shown"):
            desk.receipts(binding, [bad], seen)
        with pytest.raises(SteeringError, match="disagree"):
            desk.receipts(binding, [good, bad], seen)
