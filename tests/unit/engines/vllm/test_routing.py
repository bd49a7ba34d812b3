"""The router: which token of a step gets which row, however vLLM cuts a sequence into steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spo.algorithms.positions import select_positions
from spo.engines.vllm.plugin.routing import Router
from spo.engines.vllm.plugin.wire import OPERATOR_CODES, REQUEST_KEY, Lane, RequestSteering
from spo.errors import SteeringError
from spo.records import Operator, Positions

SHA = "f" * 64


def make_router(lanes=1, max_tokens=64):
    router = Router(lanes=lanes, max_tokens=max_tokens)
    router.slot_hashes = {1: SHA, 2: "e" * 64}
    return router


def steering(key="k", positions=Positions.ALL, coefficient=0.5, lanes=1, **changes):
    lane = Lane(
        slot=1,
        sha256=SHA,
        coefficient=coefficient,
        operator=Operator.ADAPTIVE,
        positions=positions,
    )
    return {REQUEST_KEY: RequestSteering(key=key, lanes=(lane,) * lanes, **changes).to_wire()}


def one_step(router, request_ids, computed, lengths):
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return router.step(request_ids, np.array(computed), starts)


def test_rows_coefficients_and_operators_of_a_mixed_step():
    router = make_router()
    router.admit("plain", None, 3, [])
    router.admit("steered", steering(positions=Positions.GENERATED), 3, [])
    plan = one_step(router, ["plain", "steered"], [0, 0], [3, 3])
    assert plan.plan[:, 0, 0].tolist() == [0, 0, 0, 0, 0, 1]
    assert plan.plan[5, 1, 0] == np.float32(0.5).view(np.int32)
    assert plan.plan[5, 2, 0] == OPERATOR_CODES[Operator.ADAPTIVE]
    plan = one_step(router, ["steered", "plain"], [3, 3], [1, 1])
    # Six rows: those of the longer step before are cleared.
    assert plan.plan[:, 0, 0].tolist() == [1, 0, 0, 0, 0, 0]


def test_nothing_is_copied_while_nothing_is_steered_or_nothing_changes():
    router = make_router()
    router.admit("plain", None, 3, [])
    assert one_step(router, ["plain"], [0], [3]) is None
    router.admit("steered", steering(), 2, [])
    assert one_step(router, ["steered"], [0], [2]).tokens == 2
    assert one_step(router, ["steered"], [2], [1]).tokens == 2
    assert one_step(router, ["steered"], [3], [1]) is None
    router.finish(["steered"])
    assert one_step(router, ["plain"], [3], [1]).plan.any() == False  # noqa: E712
    assert one_step(router, ["plain"], [4], [1]) is None


@given(
    prompt=st.integers(1, 20),
    answer=st.integers(0, 10),
    image=st.tuples(st.integers(0, 10), st.integers(0, 8)),
    positions=st.sampled_from(list(Positions)),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_any_cutting_into_steps_steers_exactly_the_selected_tokens(
    prompt, answer, image, positions, data
):
    total = prompt + answer
    length = min(image[1], prompt - image[0])
    spans = [(image[0], length)] if length > 0 else []
    router = make_router()
    router.admit("r", steering(positions=positions), prompt, spans)
    rows = np.zeros(total, dtype=int)
    on_device = np.zeros((64, 3, 1), dtype=np.int32)
    place = 0
    while place < total:
        length = data.draw(st.integers(1, total - place)) if place < prompt else 1
        plan = one_step(router, ["r"], [place], [length])
        if plan is not None:
            on_device[: plan.tokens] = plan.plan
        rows[place : place + length] = on_device[:length, 0, 0]
        place += length
        if data.draw(st.booleans()) and data.draw(st.integers(0, 9)) == 0:
            place = 0  # preempted: everything is computed again
    index = np.arange(total)
    wanted = select_positions(positions, index, prompt_length=prompt, image_spans=spans)
    assert rows.tolist() == wanted.astype(int).tolist()
    receipt = router.receipts(["k"])[0]
    assert receipt["steered"] == [int(wanted.sum())]
    assert (receipt["first"], receipt["until"]) == (0, total)


def test_more_requests_than_rows_are_kept_apart():
    router = make_router(max_tokens=1024)
    for number in range(600):
        router.admit(f"r{number}", steering(key=f"k{number}", coefficient=number), 1, [])
    ids = [f"r{number}" for number in range(600)]
    plan = one_step(router, ids, [0] * 600, [1] * 600)
    got = plan.plan[:600, 1, 0].view(np.float32)
    assert got.tolist() == list(range(600))
    router.finish(ids[::2])
    router.admit("new", steering(key="new", coefficient=-1.0), 1, [])
    plan = one_step(router, ["r1", "new", "r3"], [1, 0, 1], [1, 1, 1])
    assert plan.plan[:3, 1, 0].view(np.float32).tolist() == [1.0, -1.0, 3.0]


def test_a_request_whose_slot_changed_is_refused_at_admission_and_at_the_receipt():
    router = make_router()
    router.slot_hashes[1] = "0" * 64
    with pytest.raises(SteeringError, match="replaced under the request"):
        router.admit("r", steering(), 3, [])
    router.slot_hashes[1] = SHA
    router.admit("r", steering(), 3, [])
    router.slot_hashes[1] = "0" * 64
    with pytest.raises(SteeringError, match="replaced under the request"):
        router.receipts(["k"])
    with pytest.raises(SteeringError, match="never saw"):
        router.receipts(["other"])
    with pytest.raises(SteeringError, match="lanes=1"):
        router.admit("s", steering(lanes=2), 3, [])


def test_captures_count_each_token_once_and_leave_out_the_first():
    router = make_router()
    wire = RequestSteering(
        key="c", capture_row=2, capture_positions=Positions.ALL, prompt_length=3
    ).to_wire()
    router.admit("r", {REQUEST_KEY: wire}, 5, [])
    assert one_step(router, ["r"], [0], [4]).segments.tolist() == [0, 2, 2, 2]
    assert one_step(router, ["r"], [0], [5]).segments.tolist() == [0, 0, 0, 0, 2]
    assert one_step(router, [], [], []).segments.tolist() == [0] * 5
    assert router.receipts(["c"])[0]["captured"] == 4


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_sequence_of_batches_steers_exactly_the_selected_tokens(data):
    """Requests that come, decode together, are preempted, reordered, finish: no step is stale."""
    router = make_router(max_tokens=128)
    on_device = np.zeros((128, 3, 1), dtype=np.int32)
    prompts, places, choices, reached = {}, {}, {}, {}
    for step in range(data.draw(st.integers(4, 25))):
        while len(prompts) < 4 and (not prompts or data.draw(st.integers(0, 3)) == 0):
            name = f"r{step}-{len(prompts)}"
            choices[name] = data.draw(st.none() | st.sampled_from(list(Positions)))
            prompts[name], places[name] = data.draw(st.integers(1, 6)), 0
            asked = choices[name] and steering(key=name, positions=choices[name])
            router.admit(name, asked, prompts[name], [])
        batch = list(data.draw(st.permutations(list(prompts))))
        if data.draw(st.integers(0, 4)):
            batch = sorted(batch)
        lengths = [
            data.draw(st.integers(1, prompts[n] - places[n])) if places[n] < prompts[n] else 1
            for n in batch
        ]
        computed = [places[name] for name in batch]
        plan = one_step(router, batch, computed, lengths)
        if plan is not None:
            on_device[: plan.tokens] = plan.plan
        rows = on_device[:, 0, 0].tolist()
        wanted = []
        for name, place, length in zip(batch, computed, lengths, strict=True):
            index = np.arange(place, place + length)
            chosen = choices[name] and select_positions(
                choices[name], index, prompt_length=prompts[name], image_spans=[]
            )
            wanted += [0] * length if chosen is None else chosen.astype(int).tolist()
            places[name] = place + length
            reached[name] = max(reached.get(name, 0), places[name])
        assert rows == wanted + [0] * (128 - len(wanted))
        assert router.live == any(wanted)
        assert router.concerns(batch) == any(choices[name] for name in batch)
        for name in list(prompts):
            event = data.draw(st.integers(0, 14))
            if event == 0:
                router.finish([name])
                if choices[name]:
                    index = np.arange(reached[name])
                    count = select_positions(
                        choices[name], index, prompt_length=prompts[name], image_spans=[]
                    ).sum()
                    figures = router.receipts([name])[0]
                    assert (figures["steered"], figures["until"]) == ([count], reached[name])
                del prompts[name]
            elif event == 1:
                places[name] = 0
