"""vLLM against the Hugging Face reference, for every model family, operator and position."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from spo.engines.base import CaptureRequest, LogprobRequest
from spo.records import GenerateRequest, Operator, Positions, Sampling, SteeringSpec
from tests.parity.conftest import make_prompt, make_vector

pytestmark = pytest.mark.vllm
GREEDY = Sampling(max_tokens=6, temperature=0.0)
FAMILIES = ("llava", "llama", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3")


def _requests(image, every):
    """Unsteered, then every operator and every position, with and without a picture.

    With `every`, all pairs of them; otherwise each at least once.
    """
    requests = []
    pairs = list(product(Operator, Positions))
    for picture in (None, image) if image else (None,):
        prompt = make_prompt("tell me of it", picture)
        requests.append(GenerateRequest(request_id="none", prompt=prompt, sampling=GREEDY))
        for number, (operator, positions) in enumerate(pairs if every else pairs[::3]):
            spec = SteeringSpec(
                vector="ab"[number % 2],
                version=3,
                coefficient=(1.0, -0.5, 0.25)[number % 3],
                operator=operator,
                positions=positions,
            )
            requests.append(
                GenerateRequest(
                    request_id=f"{operator}-{positions}",
                    prompt=prompt,
                    sampling=GREEDY,
                    steering=spec,
                )
            )
    return requests


@pytest.mark.parametrize("family", FAMILIES)
def test_steered_answers_equal_the_reference(engines, picture, family):
    vllm, hf = engines(family)
    for engine in (vllm, hf):
        engine.publish("a", make_vector(vllm.info, 1), 3)
        engine.publish("b", make_vector(vllm.info, 2, (0, 2)), 3)
    requests = _requests(picture if vllm.prompts.multimodal else None, every=family == "llava")
    # A random model may say the image placeholder, which the reference refuses to score.
    answered = [
        (rollout, request)
        for rollout, request in zip(vllm.generate(requests), requests, strict=True)
        if vllm.prompts.image_token_id not in rollout.token_ids
    ]
    assert len(answered) > len(requests) // 2
    rollouts, requests = zip(*answered, strict=True)
    scored = [
        LogprobRequest(
            request_id=r.request_id, prompt=r.prompt, token_ids=r.token_ids, steering=q.steering
        )
        for r, q in zip(rollouts, requests, strict=True)
    ]
    reference = hf.logprobs(scored)
    for rollout, request, want, got in zip(
        rollouts, requests, reference, vllm.logprobs(scored), strict=True
    ):
        assert rollout.logprob == pytest.approx(sum(want), abs=1e-3), request.request_id
        assert got == pytest.approx(want, abs=1e-3), request.request_id
        assert (rollout.receipt is None) == (request.steering is None)
    # The comparison means nothing if steering changes nothing.
    assert len({round(sum(want), 3) for want in reference}) > len(requests) // 2


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_captures_equal_the_reference(engines, picture, family):
    vllm, hf = engines(family)
    requests = [
        CaptureRequest(
            request_id=positions.value,
            prompt=make_prompt("tell me of it", picture),
            layers=(0, 3),
            positions=positions,
            token_ids=(5, 6, 7),
        )
        for positions in Positions
    ]
    for got, want in zip(vllm.capture(requests), hf.capture(requests), strict=True):
        assert got.tokens == want.tokens
        scale = np.abs(want.mean).max()
        np.testing.assert_allclose(got.mean / scale, want.mean / scale, atol=1e-4)
        # vLLM's figure is the mean norm, the reference's the median.
        np.testing.assert_allclose(got.norm, want.norm, rtol=0.5)
