"""While requests run: publishing, slots in use, refusals, preemption, and arbitrary specs."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from spo.engines.vllm import session
from spo.errors import EngineError, SteeringError
from spo.records import GenerateRequest, Operator, Positions, Sampling, SteeringSpec
from tests.parity.conftest import make_prompt, make_vector

pytestmark = pytest.mark.vllm
SLOTS, MAX_DOSE = 3, 20.0


@pytest.fixture
def vllm(engines):
    engine, _ = engines("llava", slots=SLOTS, lanes=2, max_dose=MAX_DOSE)
    engine.publish("a", make_vector(engine.info, 1), 1)
    yield engine
    for name, versions in engine.desk.slots.held().items():
        for version in versions:
            if (name, version) != ("a", 1):
                engine.retire(name, version)


def spec(vector="a", version=1, coefficient=1.0, **changes):
    return SteeringSpec(vector=vector, version=version, coefficient=coefficient, **changes)


def ask(text="publish while it runs", steering=None, tokens=6):
    return GenerateRequest(
        request_id="r",
        prompt=make_prompt(text),
        sampling=Sampling(max_tokens=tokens, temperature=0.0),
        steering=steering,
    )


def begin(vllm, request):
    """A request that is being answered: its pieces so far, and the rest to come."""
    stream = vllm.stream(request)
    return [next(stream), next(stream)], stream


def same_answer(pieces, stream, whole):
    *rest, rollout = list(stream)
    assert "".join([*pieces, *rest]) == rollout.text == whole.text
    assert rollout.token_ids == whole.token_ids
    assert rollout.logprob == pytest.approx(whole.logprob, abs=1e-4)
    return rollout


def test_a_request_ends_with_the_version_it_began_with(vllm):
    slow = ask(steering=spec(), tokens=60)
    whole = vllm.generate([slow])[0]
    pieces, stream = begin(vllm, slow)
    sha = vllm.publish("a", make_vector(vllm.info, 9), 2)
    newer = vllm.generate([ask(steering=spec(version=2))])[0]
    assert (newer.receipt.version, newer.receipt.sha256) == (2, sha)
    rollout = same_answer(pieces, stream, whole)
    assert (rollout.receipt.version, rollout.receipt.sha256) == (1, whole.receipt.sha256)


def test_threads_may_show_the_same_new_picture(vllm, tmp_path):
    """vLLM sends a rendered picture to its core once; whoever comes second counts on that."""
    failures = []

    def answer(number, together, more):
        path = str(tmp_path / f"{number}.png")
        prompt = make_prompt("look at it", path)
        request = replace(ask(tokens=2), prompt=prompt)
        # Between the picture and the end of a longer batch another thread's may come.
        batch = [request, *(ask(f"{number} and {i}", tokens=2) for i in range(more))]
        together.wait(60)
        try:
            assert len(vllm.generate(batch)[0].token_ids) == 2
        except BaseException as error:  # noqa: BLE001 shown by the test itself
            failures.append(error)

    for number in range(8):
        Image.effect_noise((48, 48), 10 + number).convert("RGB").save(tmp_path / f"{number}.png")
        together = threading.Barrier(6)
        threads = [
            threading.Thread(target=answer, args=(number, together, 8 * i)) for i in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert failures == []


def test_a_refused_batch_leaves_its_pictures_usable(vllm, tmp_path, monkeypatch):
    path = str(tmp_path / "refused.png")
    Image.effect_noise((48, 48), 40).convert("RGB").save(path)
    request = replace(ask(tokens=2), prompt=make_prompt("look at it", path))

    def refuse(*_):
        raise EngineError("refused after it was rendered")

    with monkeypatch.context() as patch:
        patch.setattr(session, "check_same_tokens", refuse)
        with pytest.raises(EngineError, match="refused after"):
            vllm.generate([request])
    assert len(vllm.generate([request])[0].token_ids) == 2


def test_slots_in_use_are_never_given_away_and_running_out_is_an_error(vllm):
    slow = ask(steering=spec(), tokens=60)
    whole = vllm.generate([slow])[0]
    pieces, stream = begin(vllm, slow)
    vllm.publish("b", make_vector(vllm.info, 2), 1)
    vllm.publish("c", make_vector(vllm.info, 3), 1)
    with pytest.raises(SteeringError, match="all 3 slots are taken"):
        vllm.publish("d", make_vector(vllm.info, 4), 1)
    with pytest.raises(SteeringError, match="all 3 slots are taken"):
        vllm.publish("a", make_vector(vllm.info, 5), 2)
    with pytest.raises(SteeringError, match="1 requests in flight"):
        vllm.retire("a", 1)
    same_answer(pieces, stream, whole)
    vllm.publish("a", make_vector(vllm.info, 5), 2)  # the old version is free now
    assert vllm.desk.slots.held() == {"a": [2], "b": [1], "c": [1]}
    with pytest.raises(SteeringError, match="is not published"):
        vllm.generate([slow])
    vllm.retire("a")
    vllm.publish("a", make_vector(vllm.info, 1), 1)


def test_a_hundred_versions_go_through_three_slots(vllm):
    wanted = {
        version: vllm.publish("b", make_vector(vllm.info, version % 7), version)
        for version in range(1, 101)
    }
    held = vllm.desk.slots.held()["b"]
    assert held[-1] == 100
    assert len(held) <= SLOTS - 1
    receipt = vllm.generate([ask(steering=spec("b", 100))])[0].receipt
    assert receipt.sha256 == wanted[100]


BAD = [
    (spec("nobody"), "it holds"),
    (spec(version=99), "it holds"),
    (spec(coefficient=math.nan), "finite"),
    (spec(coefficient=-math.inf), "finite"),
    (spec(coefficient=1e6), "at most 20"),
    (spec(positions="middle"), "after_image"),
    (spec(operator="push"), "adaptive"),
]


def test_a_refused_request_leaves_those_in_flight_alone(vllm):
    slow = ask(steering=spec(operator=Operator.ADAPTIVE), tokens=60)
    whole = vllm.generate([slow])[0]
    pieces, stream = begin(vllm, slow)
    running = vllm.session.engine.get_num_unfinished_requests()
    for bad, words in BAD:
        with pytest.raises(SteeringError, match=words):
            vllm.generate([ask("fine"), ask("bad", bad)])
        assert vllm.session.engine.get_num_unfinished_requests() == running == 1
    same_answer(pieces, stream, whole)


@given(
    vector=st.sampled_from(["a", "nobody", ""]) | st.text(max_size=4),
    version=st.sampled_from([1, 1, 1, 0, -1, 2]) | st.integers(),
    coefficient=st.floats(-4, 4) | st.floats() | st.sampled_from(["1", None, True]),
    operator=st.sampled_from([*Operator, "push", None]),
    positions=st.sampled_from([*Positions, "middle", 3]),
)
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_spec_is_either_served_with_a_true_receipt_or_refused(
    vllm, vector, version, coefficient, operator, positions
):
    asked = SteeringSpec(
        vector=vector,
        version=version,
        coefficient=coefficient,
        operator=operator,
        positions=positions,
    )
    refusal, answers = None, []
    try:
        answers = vllm.generate([ask("any", asked, tokens=2)])
    except SteeringError as error:
        refusal = error
    in_order = (
        (vector, version) == ("a", 1)
        and type(coefficient) is float
        and math.isfinite(coefficient)
        and operator in list(Operator)
        and positions in list(Positions)
    )
    assert not vllm.session.engine.has_unfinished_requests()
    assert in_order or refusal
    if refusal:
        assert not (in_order and abs(coefficient) <= 4), refusal
        return
    receipt = answers[0].receipt
    assert (receipt.vector, receipt.version) == ("a", 1)
    assert receipt.sha256 == make_vector(vllm.info, 1).sha256
    assert (receipt.coefficient, receipt.operator) == (coefficient, operator)
    assert receipt.positions == positions


def test_preempted_requests_equal_their_solo_runs(engines):
    """The cache holds a few sequences only, so vLLM throws some out and computes them again."""
    vllm, _ = engines("llava", slots=SLOTS, lanes=2, engine_options={"num_gpu_blocks_override": 7})
    vllm.publish("a", make_vector(vllm.info, 1), 1)
    scheduler = vllm.session.engine.engine_core.engine_core.scheduler
    preempted, preempt = [], scheduler._preempt_request

    def watched(request, *args, **kwargs):
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    choices = [
        None,
        spec(),
        spec(coefficient=0.5, positions=Positions.GENERATED),
        spec(coefficient=0.25, operator=Operator.ADAPTIVE),
        spec(positions=Positions.PROMPT),
        spec(positions=Positions.LAST_PROMPT, operator=Operator.PROJECT),
    ]
    requests = [ask(f"number {i} " * 3, choice, 150) for i, choice in enumerate(choices)]
    alone = [vllm.generate([request])[0] for request in requests]
    scheduler._preempt_request = watched
    together = vllm.generate(requests)
    scheduler._preempt_request = preempt
    assert len(set(preempted)) > 1
    for one, other in zip(together, alone, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert one.receipt == other.receipt
