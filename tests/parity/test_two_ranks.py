"""A model that lies on two ranks in the stages that hold it in vLLM: two processes on the CPU.

Each stage is entered where the jobs enter it, configured by `tensor_parallel_size` alone, and
compared with the same model whole in Transformers. Minutes each, so by `-m long` alone; CI starts
two ranks once, in `test_vllm_processes.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from spo.actors.engine_pool import EnginePool
from spo.config import EngineConfig, ExtractConfig
from spo.config.serving import ServeConfig
from spo.engines.base import LogprobRequest
from spo.engines.chat import ChatRequest, Turn
from spo.engines.hf.engine import HfEngine
from spo.records import (
    GenerateRequest,
    Operator,
    Positions,
    Prompt,
    PromptKind,
    Sampling,
    Side,
    SteeringSpec,
)
from spo.serving.deployment import ServeSettings, open_chat_engine
from spo.stage1.activations import ContrastRow, decode_half, row_to_json
from spo.stage1.extract import ActivationExtractor
from tests.parity.conftest import make_prompt, make_vector
from tests.tiny_models import HIDDEN

pytestmark = [pytest.mark.vllm, pytest.mark.long]
GREEDY = Sampling(max_tokens=6, temperature=0.0)
SPEC = SteeringSpec(vector="a", version=1, operator=Operator.ADAPTIVE)
ENGINE = EngineConfig(
    tensor_parallel_size=2, dtype="float32", max_model_len=256, max_num_seqs=4, memory_gib=0.05
)


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.ray
def test_rollouts(cluster: None, tiny_llava: Path) -> None:
    """Engines of training and evaluation: steered answers and the log-probabilities of others."""
    pool = EnginePool.start(str(tiny_llava), None, ENGINE, prefix="ranks", seed=0)
    whole = HfEngine(str(tiny_llava))
    try:
        for engine in (pool, whole):
            engine.publish("a", make_vector(whole.info, 1), 1)
        prompt = make_prompt("tell me of it")
        for spec in (None, SPEC):
            asked = GenerateRequest(request_id="r", prompt=prompt, sampling=GREEDY, steering=spec)
            (said,) = pool.generate([asked])
            scored = LogprobRequest(
                request_id="r", prompt=prompt, token_ids=said.token_ids, steering=spec
            )
            expected = whole.logprobs([scored])[0]
            assert said.logprob == pytest.approx(sum(expected), abs=1e-3)
            assert pool.logprobs([scored])[0] == pytest.approx(expected, abs=1e-3)
            assert (said.receipt is None) == (spec is None)
    finally:
        pool.close()
        whole.close()


def test_extraction(tiny_llava: Path) -> None:
    prompts = [
        Prompt(prompt_id=name, text=f"some {name} to read", kind=PromptKind.HARM)
        for name in ("words", "more words")
    ]
    rows = [
        ContrastRow(source="s", side=Side.HARM, prompt=prompt, positions=Positions.TEXT)
        for prompt in prompts
    ]
    batch = {"row": np.array([row_to_json(row) for row in rows])}
    config = ExtractConfig(
        dtype="float32", batch_size=4, max_model_len=256, memory_gib=0.1, layers=(0, 2)
    )
    two = config.model_copy(update={"backend": "vllm", "tensor_parallel_size": 2})
    exact, read = (ActivationExtractor(str(tiny_llava), None, c)(batch) for c in (config, two))
    assert read["reason"] == exact["reason"] == ["", ""]
    assert read["tokens"] == exact["tokens"]
    for a, b in zip(exact["mean"], read["mean"], strict=True):
        first, second = (decode_half(x, "float16").reshape(2, HIDDEN) for x in (a, b))
        np.testing.assert_allclose(second, first, rtol=2e-2, atol=5e-3)


def test_serving(tiny_llava: Path, tmp_path: Path) -> None:
    settings = ServeSettings(
        model=str(tiny_llava),
        revision=None,
        name="tiny",
        engine=ENGINE,
        serve=ServeConfig(),
        state_dir=tmp_path,
        artifacts={},
    )
    whole = HfEngine(str(tiny_llava))
    vector = make_vector(whole.info, 1)
    whole.publish("a", vector, 1)

    async def ask() -> str:
        engine = await open_chat_engine(settings)
        try:
            await engine.publish("a", vector, 1)
            answer = await engine.complete(
                ChatRequest(
                    request_id="r",
                    turns=(Turn(role="user", parts=("tell me of it",)),),
                    sampling=GREEDY,
                    steering=SPEC,
                    sha256=vector.sha256,
                )
            )
            return answer.text
        finally:
            engine.close()

    said = asyncio.run(ask())
    asked = GenerateRequest(
        request_id="r", prompt=make_prompt("tell me of it"), sampling=GREEDY, steering=SPEC
    )
    (expected,) = whole.generate([asked])
    whole.close()
    assert said == expected.text
