"""Set-ups that need processes or compilation of their own: slow to start, so one test each."""

from __future__ import annotations

import pytest

from spo.engines.base import LogprobRequest
from spo.engines.vllm_plugin import op
from spo.engines.vllm_plugin.launch import VllmSettings, start_llm, stop_llm
from spo.records import GenerateRequest, Operator, Sampling, SteeringSpec
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


def test_the_traced_formula_equals_the_reference_when_compiled(engines, picture, monkeypatch):
    """What a GPU compiles, compiled for the CPU: three lanes, all operators."""
    engines.close()
    monkeypatch.setattr(op, "OPAQUE_DEVICES", frozenset())
    vllm, hf = engines("llava", enforce_eager=False, lanes=3)
    _equals_reference(vllm, hf, make_prompt("tell me of it", picture))
    engines.close()


def test_two_tensor_parallel_ranks_equal_the_reference(engines, picture, monkeypatch):
    # One NUMA node for two ranks: vLLM must not try to bind their threads.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    vllm, hf = engines("llava", tensor_parallel_size=2)
    _equals_reference(vllm, hf, make_prompt("tell me of it", picture))
