"""Between our records and vLLM's: answers, engine description, canary. For `LLM` and `AsyncLLM`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from spo.algorithms.positions import Span, select_positions
from spo.engines.base import CaptureRequest, EngineInfo
from spo.engines.identity import folder_revision, model_identity
from spo.engines.processing import PromptProcessor
from spo.engines.vllm.canary import Logprobs
from spo.engines.vllm.plugin.wire import PluginConfig
from spo.engines.vllm.session import RequestBuilder, VllmJob, sampling_params
from spo.engines.vllm.vector_table import Binding
from spo.errors import DataError, SteeringError
from spo.records import FinishReason, GenerateRequest, Rollout, Sampling, SteeringReceipt

FINISH = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.ABORTED,
}


def answer_params(sampling: Sampling, prompts: PromptProcessor, **options: Any) -> Any:
    """Parameters of a sampled answer; never an image placeholder, as in `HfEngine`."""
    token = prompts.image_token_id
    banned = {} if token is None else {"logit_bias": {token: -100.0}}
    return sampling_params(sampling, **banned, **options)


def canary_job(builder: RequestBuilder, binding: Binding) -> VllmJob:
    """The canary's fixed prompt; its `engine_input` is still a prompt dictionary."""
    tokens = tuple(builder.prompts.tokenizer("a b c", add_special_tokens=False).input_ids)
    params = sampling_params(Sampling(max_tokens=2, temperature=0.0), logprobs=5)
    params.ignore_eos = True
    return builder.ask_tokens(binding, tokens, params)


def canary_logprobs(output: Any) -> Logprobs:
    """What the canary compares."""
    return [
        {token: float(value.logprob) for token, value in step.items()}
        for step in output.outputs[0].logprobs
    ]


def describe(
    model: str,
    revision: str | None,
    config: PluginConfig,
    workers: Sequence[dict[str, Any]],
    model_config: Any,
) -> EngineInfo:
    """What the workers hold; SteeringError when it is not what was asked for."""
    import vllm

    layers = model_config.hf_text_config.num_hidden_layers
    for worker in workers:
        if worker["config"] != config.to_wire() or worker["layers"] != layers:
            raise SteeringError(
                f"a worker has {worker}, expected {layers} layers and {config.to_wire()}; install "
                "the same spo on every node"
            )
    return EngineInfo(
        model_id=model_identity(model),
        model_revision=revision or folder_revision(model),
        hidden_size=int(workers[0]["hidden_size"]),
        num_layers=int(workers[0]["layers"]),
        dtype=str(model_config.dtype).removeprefix("torch."),
        backend="vllm",
        version=vllm.__version__,
    )


def rollout_of(
    request: GenerateRequest,
    job: VllmJob,
    output: Any,
    receipts: tuple[SteeringReceipt, ...],
    prompts: PromptProcessor,
) -> Rollout:
    """The record of a finished answer."""
    answer = output.outputs[0]
    return Rollout(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=job.tokens,
        token_ids=tuple(answer.token_ids),
        text=prompts.decode(answer.token_ids),
        logprob=float(answer.cumulative_logprob),
        finish=FINISH[answer.finish_reason],
        receipt=receipts[0] if receipts else None,
    )


def pooled_tokens(request: CaptureRequest, job: VllmJob, prompts: PromptProcessor) -> int:
    """How many tokens a capture must pool; DataError if none is left."""
    spans: tuple[Span, ...] = prompts.spans(job.tokens)
    index = np.arange(len(job.tokens), dtype=np.int64)
    chosen = select_positions(
        request.positions, index, prompt_length=job.prompt_length, image_spans=spans
    )
    count = int(chosen[1:].sum())
    if not count:
        raise DataError(
            f"capture {request.request_id!r}: no token is left to pool over "
            f"({request.positions.value} of {len(index)} tokens, first one left out)"
        )
    return count
