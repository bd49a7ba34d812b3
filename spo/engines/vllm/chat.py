"""Conversations on vLLM's asyncio engine: several turns, several pictures, stop strings.

A streamed answer's first piece leaves only after the workers have confirmed that its prompt was
steered; its end carries the receipt.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from spo.engines.chat import ChatAnswer, ChatDelta, ChatRequest, Picture, Turn
from spo.engines.processing import PromptProcessor
from spo.engines.vllm import canary
from spo.engines.vllm.asynchronous import AsyncVllmEngine
from spo.engines.vllm.launch import VllmSettings
from spo.engines.vllm.plugin.wire import REQUEST_KEY, cache_salt
from spo.engines.vllm.receipts import ReceiptMail
from spo.engines.vllm.vector_table import Binding, Seen
from spo.errors import DataError, EngineError
from spo.records import FinishReason, SteeringReceipt, SteeringSpec

_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": FinishReason.ABORTED}


class VllmChatEngine(AsyncVllmEngine):
    """`spo.engines.chat.ChatEngine` on vLLM. Made by `start`."""

    stream_interval_s: float = 0.0
    """Pieces of one answer are sent no closer together than this; vLLM joins what waits."""

    def __init__(self, llm: Any, prompts: PromptProcessor, settings: VllmSettings) -> None:
        super().__init__(llm, prompts, settings)
        self._progress = time.monotonic()
        self._mail = ReceiptMail(llm)

    @property
    def dead(self) -> bool:
        return bool(self.llm.errored)

    def holds(self, name: str, version: int) -> bool:
        return version in self.desk.slots.held().get(name, [])

    async def complete(self, request: ChatRequest) -> ChatAnswer:
        from vllm.sampling_params import RequestOutputKind

        async for event in self._events(request, RequestOutputKind.FINAL_ONLY):
            if isinstance(event, ChatAnswer):
                return event
        raise EngineError(f"request {request.request_id!r} ended without an answer; ask again")

    async def stream(  # type: ignore[override]  # conversations, not prompts
        self, request: ChatRequest
    ) -> AsyncIterator[ChatDelta | ChatAnswer]:
        from vllm.sampling_params import RequestOutputKind

        async for event in self._events(request, RequestOutputKind.DELTA):
            yield event

    async def _events(
        self, request: ChatRequest, kind: Any
    ) -> AsyncIterator[ChatDelta | ChatAnswer]:
        binding = self._bind(request.steering)
        try:
            params = self._params(request, kind)
            prompt = await self._prompt(request, binding, params)
            tokens = tuple(prompt["prompt_token_ids"])
            text, made, confirmed = "", 0, not binding.lanes
            output = answer = None
            async with contextlib.aclosing(self.llm.generate(prompt, params, binding.key)) as run:
                async for output in run:
                    self._progress = time.monotonic()
                    answer = output.outputs[0]
                    made += len(answer.token_ids)
                    text += answer.text
                    if output.finished:
                        break
                    if answer.text:
                        if not confirmed:
                            await self._confirm(binding, tokens, made, output, keep=True)
                            confirmed = True
                        yield ChatDelta(text=answer.text)
                        await asyncio.sleep(self.stream_interval_s)
            if answer is None:
                raise EngineError(f"vLLM gave nothing for request {request.request_id!r}")
            receipts = await self._confirm(binding, tokens, made, output)
            if answer.text and kind.name == "DELTA":
                yield ChatDelta(text=answer.text)
            yield ChatAnswer(
                text=text,
                finish=_FINISH[answer.finish_reason],
                prompt_tokens=len(tokens),
                completion_tokens=made,
                receipt=receipts[0] if receipts else None,
            )
        finally:
            self.desk.release([binding])

    async def _confirm(
        self, binding: Binding, tokens: Sequence[int], made: int, output: Any, keep: bool = False
    ) -> tuple[SteeringReceipt, ...]:
        """What the workers say was applied; SteeringError when it is not what was asked for."""
        if not binding.lanes:
            return ()
        seen = Seen(
            prompt_length=len(tokens),
            tokens=len(tokens) + made - 1,
            cached=int(output.num_cached_tokens or 0),
            spans=self.prompts.spans(tokens),
        )
        figures = await self._mail.fetch(binding.key, keep)
        return self.desk.receipts(binding, figures, seen)

    def _params(self, request: ChatRequest, kind: Any) -> Any:
        from vllm import SamplingParams

        sampling = request.sampling
        token = self.prompts.image_token_id
        return SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop=list(request.stop) or None,
            frequency_penalty=request.frequency_penalty,
            presence_penalty=request.presence_penalty,
            ignore_eos=request.ignore_eos,
            # Never an image placeholder, as in training.
            logit_bias=None if token is None else {token: -100.0},
            output_kind=kind,
        )

    async def _prompt(self, request: ChatRequest, binding: Binding, params: Any) -> Any:
        """vLLM's engine input; everything that can be wrong with a request is found here."""
        text = self._rendered(request.turns)
        pictures = [p.open() for t in request.turns for p in t.parts if isinstance(p, Picture)]
        entry: dict[str, Any] = {"prompt_token_ids": self.prompts.tokenizer(text).input_ids}
        if pictures:
            entry["multi_modal_data"] = {"image": pictures}
        if binding.lanes:
            entry["cache_salt"] = cache_salt(binding.lanes)
            params.extra_args = {REQUEST_KEY: binding.wire()}
        prompt = await self._preprocessed(entry)
        length, limit = len(prompt["prompt_token_ids"]), self.settings.max_model_len
        if length + params.max_tokens > limit:
            raise DataError(
                f"the conversation has {length} tokens and {params.max_tokens} more are asked for, "
                f"together over the model's {limit}; shorten it or lower max_tokens"
            )
        return prompt

    async def _preprocessed(self, entry: dict[str, Any]) -> Any:
        from vllm.exceptions import VLLMClientError
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        renderer = self.llm.renderer
        try:
            (prompt,) = await renderer.render_cmpl_async(
                [parse_model_prompt(self.llm.model_config, entry)],
                renderer.default_cmpl_tok_params,
            )
        except (VLLMClientError, ValueError, TypeError) as error:
            raise DataError(f"vLLM refuses the conversation: {error}") from error
        return prompt

    def _rendered(self, turns: Sequence[Turn]) -> str:
        messages: list[dict[str, Any]] = []
        for turn in turns:
            texts = [part for part in turn.parts if isinstance(part, str)]
            marker = next(filter(None, map(self.prompts.marker_in, texts)), "")
            if marker:
                raise DataError(
                    f"a message contains the image placeholder {marker!r} in its text; remove it, "
                    "pictures are given as image_url parts"
                )
            if not self.prompts.multimodal:
                if len(texts) < len(turn.parts):
                    raise DataError("a message has a picture and the model takes text only")
                messages.append({"role": turn.role, "content": "\n".join(texts)})
                continue
            content = [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in turn.parts
            ]
            messages.append({"role": turn.role, "content": content})
        rendered = self.prompts.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return str(rendered)

    async def check(self, timeout_s: float) -> None:
        from vllm import SamplingParams

        if self.dead:
            raise EngineError("vLLM's engine process died; its log has the cause")
        begin = time.monotonic()
        tokens = self.prompts.tokenizer("a", add_special_tokens=False).input_ids
        params = SamplingParams(max_tokens=1, temperature=0.0)
        entry = {"prompt_token_ids": tokens}
        try:
            async with asyncio.timeout(timeout_s):
                async for _ in self.llm.generate(entry, params, self.desk.next_key()):
                    self._progress = time.monotonic()
        except TimeoutError as error:
            # Under load the probe waits its turn; an engine that makes other tokens is alive.
            if self._progress < begin:
                raise EngineError(
                    f"vLLM made no token for {timeout_s:.0f} s (serve.health_timeout_s); it hangs"
                ) from error

    async def effect(self, spec: SteeringSpec) -> float:
        return canary.difference(await self._probe(None), await self._probe(spec))

    def processes(self) -> list[int]:
        """Process ids of vLLM's engine core, for fault tests."""
        manager = self.llm.engine_core.resources.engine_manager
        return [int(process.pid) for process in manager.processes]
