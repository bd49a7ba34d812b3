"""Set-ups that need processes or compilation of their own: slow to start, so one test each."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from spo.engines.base import CaptureRequest, LogprobRequest, confirm
from spo.engines.chat import ChatRequest, Picture, Turn
from spo.engines.processing import load_image
from spo.engines.vllm.chat import VllmChatEngine
from spo.engines.vllm.launch import VllmSettings, start_llm, stop_llm
from spo.errors import SteeringError
from spo.records import GenerateRequest, Operator, Positions, Sampling, SteeringSpec
from tests.parity.conftest import make_prompt, make_vector

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
GREEDY = Sampling(max_tokens=6, temperature=0.0)


def _equals_reference(vllm, hf, prompt):
    for engine in (vllm, hf):
        engine.publish("a", make_vector(vllm.info, 1), 1)
    for operator in (None, *Operator):
        steering = operator and SteeringSpec(vector="a", version=1, operator=operator)
        request = GenerateRequest(request_id="r", prompt=prompt, sampling=GREEDY, steering=steering)
        rollout = vllm.generate([request])[0]
        scored = LogprobRequest(
            request_id="r", prompt=prompt, token_ids=rollout.token_ids, steering=steering
        )
        assert rollout.logprob == pytest.approx(sum(hf.logprobs([scored])[0]), abs=1e-3)


def test_a_plain_engine_s_compile_cache_does_not_unsteer_the_next(engines, tiny_folder, picture):
    """Unsteered, compiled; then steered, compiled, with the same cache folder."""
    settings = VllmSettings(
        dtype="float32", max_model_len=512, kv_cache_gib=0.05, enforce_eager=False, in_process=True
    )
    engines.close()
    plain = start_llm(str(tiny_folder("llava")), None, settings, None)
    plain_hash = plain.llm_engine.vllm_config.compute_hash()
    stop_llm(plain)
    vllm, hf = engines("llava", enforce_eager=False)
    assert vllm.session.engine.vllm_config.compute_hash() != plain_hash
    _equals_reference(vllm, hf, make_prompt("tell me of it", picture))


def test_the_traced_formula_equals_the_reference_when_compiled(engines, picture):
    """The form that Inductor fuses, compiled for the CPU: three lanes, all operators."""
    vllm, hf = engines("llava", enforce_eager=False, lanes=3, body="traced")
    _equals_reference(vllm, hf, make_prompt("tell me of it", picture))
    engines.close()


def test_two_tensor_parallel_ranks_equal_the_reference(engines, picture):
    vllm, hf = engines("llava", tensor_parallel_size=2)
    prompt = make_prompt("tell me of it", picture)
    _equals_reference(vllm, hf, prompt)
    layers = tuple(range(vllm.info.num_layers))
    asked = CaptureRequest(request_id="r", prompt=prompt, layers=layers, positions=Positions.TEXT)
    (read,), (reference,) = vllm.capture([asked]), hf.capture([asked])
    assert read.tokens == reference.tokens
    np.testing.assert_allclose(read.mean, reference.mean, rtol=1e-3, atol=1e-3)


def _whole(text):
    """Whole characters: the pieces of one that is cut off are decoded differently as they come."""
    return text.replace("\ufffd", "")


def test_the_serving_engine_mixes_publishes_and_refuses_like_the_other(engines, picture):
    """`AsyncLLM` in its own process: its conversations against the prompts of `VllmEngine`."""
    vllm, hf = engines("llava")
    path, prompt = vllm.session.llm.model_config.model, make_prompt("tell me of it", picture)
    old, new = make_vector(vllm.info, 1), make_vector(vllm.info, 2)
    specs = [
        None,
        SteeringSpec(vector="a", version=1),
        SteeringSpec(vector="a", version=1, operator=Operator.ADAPTIVE),
        SteeringSpec(vector="a", version=1, coefficient=0.25),
    ]
    image = load_image(picture)
    shown = Picture(width=image.width, height=image.height, rgb=image.tobytes())
    turns = (Turn(role="user", parts=(shown, prompt.text)),)

    def ask(spec, tokens=6):
        sampling = Sampling(max_tokens=tokens, temperature=0.0)
        return ChatRequest(request_id="r", turns=turns, sampling=sampling, steering=spec)

    async def talk():
        engine = await VllmChatEngine.start(
            path, dtype="float32", max_model_len=512, kv_cache_gib=0.05, slots=2
        )
        try:
            await engine.publish("a", old, 1)
            together = await asyncio.gather(*(engine.complete(ask(spec)) for spec in specs))
            running = engine.stream(ask(specs[1], 40))
            first = await anext(running)
            await engine.publish("a", new, 2)
            newer = await engine.complete(ask(SteeringSpec(vector="a", version=2)))
            with pytest.raises(SteeringError, match="slots are taken"):
                await engine.publish("b", new, 1)
            with pytest.raises(SteeringError, match="it holds"):
                await engine.complete(ask(SteeringSpec(vector="nobody", version=1)))
            *deltas, slow = [first, *[event async for event in running]]
            assert slow.text == "".join(delta.text for delta in deltas)
            cut = engine.stream(ask(specs[1], 40))
            await anext(cut)
            await cut.aclose()
            engine.retire("a", 1)  # would raise if the aborted request still held it
            await engine.publish("b", new, 1)
            return together, slow, newer
        finally:
            engine.close()

    together, slow, newer = asyncio.run(talk())
    for vector, version in ((old, 1), (new, 2)):
        hf.publish("a", vector, version)
        vllm.publish("a", vector, version)
    later = SteeringSpec(vector="a", version=2)
    for answer, spec in zip([*together, slow, newer], [*specs, specs[1], later], strict=True):
        vector = new if spec is later else old
        confirm(answer.receipt, spec, vector.sha256 if spec else "", answer="r")
        sampling = Sampling(max_tokens=answer.completion_tokens, temperature=0.0)
        request = GenerateRequest(request_id="r", prompt=prompt, sampling=sampling, steering=spec)
        rollout = vllm.generate([request])[0]
        assert _whole(answer.text) == _whole(rollout.text)
        assert answer.prompt_tokens == len(rollout.prompt_token_ids)
        scored = LogprobRequest(
            request_id="r", prompt=prompt, token_ids=rollout.token_ids, steering=spec
        )
        assert rollout.logprob == pytest.approx(sum(hf.logprobs([scored])[0]), abs=1e-3)
    assert together[0].text != together[1].text
