"""Per-request steering in one engine: mixing, caching, publishing, chunked prompts, refusals.

The engine has room for 192 tokens a step, so every long prompt is prefilled in chunks.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spo.engines.base import LogprobRequest
from spo.errors import ArtifactError, DataError, SteeringError
from spo.records import GenerateRequest, Operator, Positions, Sampling, SteeringSpec
from tests.parity.conftest import make_prompt, make_vector

pytestmark = pytest.mark.vllm
GREEDY = Sampling(max_tokens=6, temperature=0.0)
LONG = "a long story that is told again and again, " * 8


@pytest.fixture
def pair(engines):
    vllm, hf = engines(
        "llava", slots=6, lanes=3, max_dose=20.0, engine_options={"max_num_batched_tokens": 192}
    )
    for engine in (vllm, hf):
        engine.publish("a", make_vector(vllm.info, 1), 1)
        engine.publish("b", make_vector(vllm.info, 2, (0, 2)), 1)
        engine.publish("zero", make_vector(vllm.info, 2) * 0.0, 1)
    return vllm, hf


def ask(prompt, steering=None, sampling=GREEDY, name="r"):
    return GenerateRequest(request_id=name, prompt=prompt, sampling=sampling, steering=steering)


def spec(vector="a", coefficient=1.0, **changes):
    return SteeringSpec(vector=vector, version=1, coefficient=coefficient, **changes)


def close(one, other):
    return one.token_ids == other.token_ids and one.logprob == pytest.approx(
        other.logprob, abs=1e-4
    )


def test_each_request_of_a_mixed_batch_equals_its_solo_run(pair, picture):
    vllm, _ = pair
    text, seen = make_prompt("tell me of it"), make_prompt("tell me of it", picture)
    cases = [
        (seen, ()),
        (seen, (spec("a"),)),
        (text, (spec("b", operator=Operator.ADAPTIVE),)),
        (seen, (spec("a", 0.25),)),
        (seen, (spec("a", 0.0),)),
        (seen, (spec("a"), spec("b", 0.5, positions=Positions.TEXT))),
        (seen, (spec("a", positions=Positions.IMAGE),)),
        (text, ()),
    ]
    requests = [(ask(prompt), specs) for prompt, specs in cases]
    together = vllm.generate_stacked(requests)
    alone = [vllm.generate_stacked([request])[0] for request in requests]
    for (one, receipts), (other, _), (_, specs) in zip(together, alone, cases, strict=True):
        assert close(one, other)
        assert [receipt.coefficient for receipt in receipts] == [s.coefficient for s in specs]
    rollouts = [rollout for rollout, _ in together]
    # A coefficient of zero is the unsteered model; every other steering gives another answer.
    assert rollouts[4].token_ids == rollouts[0].token_ids
    assert rollouts[4].logprob == pytest.approx(rollouts[0].logprob, abs=1e-5)
    assert len({round(r.logprob, 4) for r in rollouts}) == len(cases) - 1


@pytest.mark.parametrize("operator", list(Operator))
def test_zero_coefficient_and_zero_vector_are_the_unsteered_model(pair, picture, operator):
    vllm, _ = pair
    prompt = make_prompt("tell me of it", picture)
    base = vllm.generate([ask(prompt)])[0]
    for steering in (spec("a", 0.0, operator=operator), spec("zero", operator=operator)):
        rollout = vllm.generate([ask(prompt, steering)])[0]
        assert (rollout.token_ids, rollout.logprob) == (base.token_ids, base.logprob)
        assert rollout.receipt is not None


def test_stacked_vectors_add_up(pair):
    vllm, hf = pair
    prompt = make_prompt("tell me of it")
    both = vllm.generate_stacked([(ask(prompt), (spec("a"), spec("a", 0.5)))])[0]
    rollout, receipts = both
    assert [receipt.coefficient for receipt in receipts] == [1.0, 0.5]
    want = hf.logprobs(
        [
            LogprobRequest(
                request_id="r", prompt=prompt, token_ids=rollout.token_ids, steering=spec("a", 1.5)
            )
        ]
    )[0]
    assert rollout.logprob == pytest.approx(sum(want), abs=1e-3)


def test_long_prompts_in_chunks_equal_the_reference(pair, picture):
    vllm, hf = pair
    for positions in Positions:
        prompt = make_prompt(LONG + positions, picture)
        steering = spec("a", positions=positions, operator=Operator.ADAPTIVE)
        rollout = vllm.generate([ask(prompt, steering)])[0]
        assert len(rollout.prompt_token_ids) > 192
        want = hf.logprobs(
            [
                LogprobRequest(
                    request_id="r", prompt=prompt, token_ids=rollout.token_ids, steering=steering
                )
            ]
        )[0]
        assert rollout.logprob == pytest.approx(sum(want), abs=1e-3), positions


def test_prefix_cache_is_not_shared_between_steerings(pair, monkeypatch):
    vllm, hf = pair
    prompt = make_prompt("cache " + LONG)
    cached, run = [], vllm.session.run

    def watched(jobs):
        outputs = run(jobs)
        cached.extend(output.num_cached_tokens for output in outputs)
        return outputs

    monkeypatch.setattr(vllm.session, "run", watched)
    for steering in (None, spec("a"), spec("a", 0.5), None, spec("b"), spec("a")):
        rollout = vllm.generate([ask(prompt, steering)])[0]
        want = hf.logprobs(
            [
                LogprobRequest(
                    request_id="r", prompt=prompt, token_ids=rollout.token_ids, steering=steering
                )
            ]
        )[0]
        assert rollout.logprob == pytest.approx(sum(want), abs=1e-3), steering
    # The second unsteered run and the second run of `a` reuse blocks; nobody else's.
    assert [bool(tokens) for tokens in cached] == [False, False, False, True, False, True]


def test_seeds_repeat_answers_even_with_chunked_prompts(pair, picture):
    vllm, _ = pair
    requests = [
        ask(make_prompt(LONG, picture), sampling=Sampling(max_tokens=8, seed=seed))
        for seed in (1, 2, 3, 1)
    ]
    first, second = vllm.generate(requests), vllm.generate(requests)
    assert [r.token_ids for r in first] == [r.token_ids for r in second]
    assert first[0].token_ids == first[3].token_ids != first[1].token_ids


def test_streams_give_the_same_answer_in_pieces_and_may_be_cut_off(pair, picture):
    vllm, _ = pair
    request = ask(make_prompt("stream it", picture), spec("a"), Sampling(max_tokens=12, seed=3))
    whole = vllm.generate([request])[0]
    *pieces, rollout = list(vllm.stream(request))
    assert len(pieces) > 1
    assert "".join(pieces) == rollout.text == whole.text
    assert rollout.receipt == whole.receipt
    cut = vllm.stream(request)
    next(cut)
    cut.close()
    assert not vllm.session.engine.has_unfinished_requests()
    assert vllm.generate([request])[0].token_ids == whole.token_ids


def test_bad_requests_are_refused_before_the_engine_and_name_what_is_allowed(pair):
    vllm, _ = pair
    prompt = make_prompt("fine")
    cases = [
        (replace(spec("a"), vector="nobody"), "it holds"),
        (replace(spec("a"), version=99), "it holds"),
        (replace(spec("a"), coefficient=float("nan")), "finite"),
        (replace(spec("a"), coefficient=float("inf")), "finite"),
        (replace(spec("a"), coefficient=1e6), "at most 20"),
        (replace(spec("a"), positions="middle"), "after_image"),
        (replace(spec("a"), operator="push"), "adaptive"),
    ]
    for steering, words in cases:
        with pytest.raises(SteeringError, match=words):
            vllm.generate([ask(prompt), ask(prompt, steering)])
        assert not vllm.session.engine.has_unfinished_requests()
    with pytest.raises(DataError, match="max_model_len"):
        vllm.generate([ask(make_prompt("word " * 600))])
    assert vllm.generate([ask(prompt)])[0].receipt is None


def test_bad_vectors_are_refused(pair):
    vllm, _ = pair
    good = make_vector(vllm.info, 1)
    wide = good.replace(directions=torch.zeros(4, 256), calibration=torch.zeros(4, 256))
    with pytest.raises(ArtifactError, match="hidden size 256"):
        vllm.publish("wide", wide, 1)
    with pytest.raises(ArtifactError, match="out of range"):
        vllm.publish("deep", good.replace(layers=(0, 1, 2, 40)), 1)
    with pytest.raises(SteeringError, match="already published"):
        vllm.publish("a", make_vector(vllm.info, 77), 1)


def test_a_restarted_engine_gives_the_same_answers(pair, engines):
    vllm, _ = pair
    prompt = make_prompt("again after a restart")
    before = vllm.generate([ask(prompt, spec("a"))])[0]
    other, _ = engines("llava", slots=2)
    other.publish("a", make_vector(other.info, 1), 1)
    after = other.generate([ask(prompt, spec("a"))])[0]
    assert close(before, after)
    assert before.receipt.sha256 == after.receipt.sha256
