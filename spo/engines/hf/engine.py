"""Hugging Face engine: exact, differentiable, the reference that other engines are tested against.

Out: rollouts, log-probabilities, pooled activations, and answer logits that are differentiable in
the steering directions and in the pixels. Weights are frozen: none ever requires a gradient.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from spo.algorithms.operators import steer
from spo.engines.base import (
    Capture,
    CaptureRequest,
    EngineInfo,
    LogprobRequest,
    VectorTable,
    receipt_for,
)
from spo.engines.batching import chunks, grouped, sampling_options, seed_sampling
from spo.engines.forward import Steerable, SteeringPlan, TokenBatch, pad_answers, token_logprobs
from spo.engines.hf.capture import PooledReader
from spo.engines.hf.compiled import FusedBlocks
from spo.engines.hf.loading import load_model
from spo.engines.hf.prefix import PrefixRunner
from spo.engines.identity import check_belongs, find_blocks, folder_revision, model_identity
from spo.engines.processing import PICTURE_INPUTS, PromptProcessor
from spo.errors import EngineError
from spo.records import (
    FinishReason,
    GenerateRequest,
    Prompt,
    Rollout,
    SteeringReceipt,
    SteeringSpec,
)
from spo.vector import SteeringVector


class HfEngine:
    """A frozen model in Transformers.

    Args:
        model: local folder in hub layout, or hub id.
        revision: hub revision.
        dtype: "float32", "bfloat16" or "float16".
        device: torch device; several share the decoder blocks, see `spo.engines.hf.spread`.
        batch_size: largest batch of a forward pass.
        compiled_capture: on a GPU, compile the decoder blocks for `capture` (half a minute at the
            first call, 1.25 times as fast afterwards on an H100).
        compiled_scores: compile them for `answer_scores` and its gradients.

    Raises:
        EngineError: the model cannot be loaded, or its decoder blocks cannot be found.
    """

    concurrent = False

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        device: str | Sequence[str] = "cpu",
        batch_size: int = 32,
        compiled_capture: bool = False,
        compiled_scores: bool = False,
    ) -> None:
        self.prompts = PromptProcessor(model, revision)
        self.model = load_model(
            model,
            revision,
            dtype=dtype,
            devices=(device,) if isinstance(device, str) else device,
            pictures=self.prompts.multimodal,
        )
        # Cut to the answer, the states are strided; torch then copies frozen head weights per row.
        self.model.get_output_embeddings().register_forward_pre_hook(
            lambda _, args: (args[0].contiguous(), *args[1:])
        )
        # With its number: "cuda" means another card in each thread.
        self.device = self.model.get_input_embeddings().weight.device
        self.batch_size = batch_size
        self.compiled_capture = compiled_capture
        self.decoder: nn.Module = self.model.get_decoder()
        self.blocks = find_blocks(self.decoder, self.model.config.get_text_config())
        self.fused = FusedBlocks(list(self.blocks))
        fused = partial(self.fused.used, compiled_scores)
        runner = PrefixRunner(self.model, list(self.blocks), self.steered, fused)
        self.answer_scores = runner.scores
        self.turn = threading.Lock()
        """Held while the model computes for `generate` and `capture`, which threads may share."""
        self._reader = PooledReader(self)
        self._table = VectorTable()
        self._info = EngineInfo(
            model_id=model_identity(model),
            model_revision=revision or folder_revision(model),
            hidden_size=self.model.config.get_text_config().hidden_size,
            num_layers=len(self.blocks),
            dtype=dtype,
            backend="hf",
            version=transformers.__version__,
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    def publish(self, name: str, vector: SteeringVector, version: int) -> str:
        check_belongs(vector, self._info)
        self._table.put(name, vector, version)
        return vector.sha256

    def retire(self, name: str, version: int | None = None) -> None:
        self._table.retire(name, version)

    def alive(self) -> bool:
        return True

    def close(self) -> None:
        self._reader.close()
        # The reader refers back to this engine: without it memory is free at once.
        del self.model, self.decoder, self.blocks, self.answer_scores, self.fused, self._reader

    def plan(self, spec: SteeringSpec | None) -> SteeringPlan | None:
        """Tensors of what a request asks for; SteeringError when it is not published."""
        if spec is None:
            return None
        return SteeringPlan.of(self._table.get(spec), spec, self.device)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Rollout]:
        results: dict[int, Rollout] = {}
        for (steering, _), indices in grouped(
            requests, lambda r: (r.steering, replace(r.sampling, seed=None))
        ):
            plan = self.plan(steering)
            receipt = receipt_for(steering, self._table.get(steering)) if steering else None
            for chunk in chunks(indices, self.batch_size):
                with self.turn:
                    rollouts = self._generate([requests[i] for i in chunk], plan, receipt)
                results.update(zip(chunk, rollouts, strict=True))
        return [results[i] for i in range(len(requests))]

    def logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float]]:
        results: dict[int, list[float]] = {}
        for steering, indices in grouped(requests, lambda r: r.steering):
            plan = self.plan(steering)
            for chunk in chunks(indices, self.batch_size):
                batch = self.prepare(
                    [requests[i].prompt for i in chunk], [requests[i].token_ids for i in chunk]
                )
                with torch.no_grad():
                    values = self.answer_logprobs(batch, plan)
                for row, i in enumerate(chunk):
                    results[i] = values[row][batch.answer_mask[row]].tolist()
        return [results[i] for i in range(len(requests))]

    def capture(self, requests: Sequence[CaptureRequest]) -> list[Capture]:
        return self._reader.read(requests)

    def prepare(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[int]] | None = None,
        *,
        processor: PromptProcessor | None = None,
    ) -> TokenBatch:
        """Tokens of prompts with given answers (none: prompts alone), on the engine's device.

        `processor` is a thread's own copy of `self.prompts`.
        """
        encoded = (processor or self.prompts).encode_each(prompts)
        input_ids, attention = encoded.pop("input_ids"), encoded.pop("attention_mask")
        extras = {
            name: value.to(self.device) for name, value in encoded.items() if name in PICTURE_INPUTS
        }
        answers = answers if answers is not None else [()] * len(prompts)
        for prompt, answer in zip(prompts, answers, strict=True):
            if self.prompts.image_token_id in answer:
                raise EngineError(
                    f"the answer to prompt {prompt.prompt_id!r} contains the image placeholder "
                    f"{self.prompts.image_token!r}, which stands for pixels; leave the answer out"
                )
        answer_ids, answer_mask = pad_answers(answers)
        # Qwen-VL places its rotary positions by token type; an answer is text, type 0.
        if "image_grid_thw" in extras:
            is_image = torch.cat([input_ids, answer_ids], dim=1) == self.prompts.image_token_id
            types = torch.as_tensor(is_image).int()
            extras["mm_token_type_ids"] = types.to(self.device)
        pads = tuple((attention.shape[1] - attention.sum(dim=1)).tolist())
        spans = tuple(
            self.prompts.spans(row[pad:].tolist()) for row, pad in zip(input_ids, pads, strict=True)
        )
        return TokenBatch(
            input_ids=torch.cat([input_ids, answer_ids], dim=1).to(self.device),
            attention_mask=torch.cat([attention, answer_mask.long()], dim=1).to(self.device),
            extras=extras,
            prompt_width=input_ids.shape[1],
            pads=pads,
            spans=spans,
            answer_ids=answer_ids.to(self.device),
            answer_mask=answer_mask.to(self.device),
        )

    def answer_logits(
        self,
        batch: TokenBatch,
        plan: SteeringPlan | None = None,
        *,
        pixel_values: Tensor | None = None,
    ) -> Tensor:
        """(batch, answer_width, vocabulary) float32 logits of the answer positions.

        Differentiable in `plan.directions` and in `pixel_values`, which replaces the batch's own.
        """
        extras = dict(batch.extras)
        if pixel_values is not None:
            extras["pixel_values"] = pixel_values
        if "pixel_values" in extras:
            extras["pixel_values"] = extras["pixel_values"].to(self.model.dtype)
        width = batch.answer_ids.shape[1]
        with self.steered(batch, plan):
            output = self.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                logits_to_keep=width + 1,
                use_cache=False,
                **extras,
            )
        return output.logits[:, :-1].float()

    def answer_logprobs(
        self,
        batch: TokenBatch,
        plan: SteeringPlan | None = None,
        *,
        pixel_values: Tensor | None = None,
    ) -> Tensor:
        """(batch, answer_width) natural log-probability of each answer token, 0 on padding."""
        logits = self.answer_logits(batch, plan, pixel_values=pixel_values)
        return token_logprobs(logits, batch.answer_ids, batch.answer_mask)

    @contextmanager
    def reading(self, hooks: dict[int, Callable[[Tensor, int], Tensor | None]]) -> Iterator[None]:
        """Call `hooks[layer](hidden, first_column)` on block outputs; a tensor back replaces it."""
        first_column = 0

        def before_decoder(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            nonlocal first_column
            cache = kwargs.get("past_key_values")
            first_column = 0 if cache is None else int(cache.get_seq_length())

        def after_block(layer: int) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, output: Any) -> Any:
                hidden = output[0] if isinstance(output, tuple) else output
                changed = hooks[layer](hidden, first_column)
                if changed is None:
                    return output
                return (changed, *output[1:]) if isinstance(output, tuple) else changed

            return hook

        handles = [self.decoder.register_forward_pre_hook(before_decoder, with_kwargs=True)]
        handles += [self.blocks[layer].register_forward_hook(after_block(layer)) for layer in hooks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def steered(self, batch: Steerable, plan: SteeringPlan | None) -> Iterator[None]:
        if plan is None:
            yield
            return
        cached: dict[tuple[int, int], Tensor] = {}

        def at_layer(row: int) -> Callable[[Tensor, int], Tensor]:
            def apply(hidden: Tensor, start: int) -> Tensor:
                key = (start, hidden.shape[1])
                if key not in cached:
                    cached[key] = batch.coefficients(plan, *key)
                at = hidden.device  # of several cards, perhaps another than the plan's
                return steer(
                    plan.operator,
                    hidden,
                    plan.directions[row].to(at),
                    coefficient=cached[key].to(at),
                    mean_norm=plan.mean_norms[row].to(at),
                    calibration=plan.calibration[row].to(at),
                    straight_through=plan.straight_through,
                )

            return apply

        with self.reading({layer: at_layer(row) for row, layer in enumerate(plan.layers)}):
            yield

    def _generate(
        self,
        requests: Sequence[GenerateRequest],
        plan: SteeringPlan | None,
        receipt: SteeringReceipt | None,
    ) -> list[Rollout]:
        batch = self.prepare([request.prompt for request in requests])
        sampling = requests[0].sampling
        seed_sampling(requests)
        extras = dict(batch.extras)
        if "pixel_values" in extras:
            extras["pixel_values"] = extras["pixel_values"].to(self.model.dtype)
        with torch.no_grad(), self.steered(batch, plan):
            output = self.model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=sampling.max_tokens,
                pad_token_id=self.prompts.tokenizer.pad_token_id,
                return_dict_in_generate=True,
                output_logits=True,
                **extras,
                **sampling_options(sampling, self.prompts.image_token_id),
            )
        answers = output.sequences[:, batch.prompt_width :]
        logprobs = torch.stack(
            [
                torch.log_softmax(logits.float(), dim=-1).gather(1, answers[:, t : t + 1])[:, 0]
                for t, logits in enumerate(output.logits)
            ],
            dim=1,
        )
        return [
            self._rollout(request, batch, row, answers[row], logprobs[row], receipt)
            for row, request in enumerate(requests)
        ]

    def _rollout(
        self,
        request: GenerateRequest,
        batch: TokenBatch,
        row: int,
        answer: Tensor,
        logprobs: Tensor,
        receipt: SteeringReceipt | None,
    ) -> Rollout:
        stops = self.stop_ids()
        tokens: list[int] = answer.tolist()
        end = next((i + 1 for i, token in enumerate(tokens) if token in stops), None)
        kept = tokens[:end]
        return Rollout(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=tuple(
                batch.input_ids[row, batch.pads[row] : batch.prompt_width].tolist()
            ),
            token_ids=tuple(kept),
            text=self.prompts.decode(kept),
            logprob=float(logprobs[: len(kept)].sum()),
            finish=FinishReason.STOP if end else FinishReason.LENGTH,
            receipt=receipt,
        )

    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        eos = self.model.generation_config.eos_token_id
        if eos is None:
            eos = self.prompts.tokenizer.eos_token_id
        return frozenset(eos if isinstance(eos, list) else [eos])
