"""Conversations on vLLM's asyncio engine: several turns, several pictures, stop strings.

A streamed answer's first piece leaves only after the workers have confirmed that its prompt was
steered; its end carries the receipt.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, Self

from spo.engines.base import EngineInfo
from spo.engines.chat import ChatAnswer, ChatDelta, ChatRequest, Picture
from spo.engines.identity import check_belongs
from spo.engines.processing import PromptProcessor
from spo.engines.vllm import canary
from spo.engines.vllm.launch import VllmSettings, plugin_config, start_async_llm
from spo.engines.vllm.outputs import (
    FINISH,
    answer_params,
    canary_job,
    canary_logprobs,
    describe,
)
from spo.engines.vllm.plugin.wire import REQUEST_KEY, cache_salt
from spo.engines.vllm.receipts import ReceiptMail
from spo.engines.vllm.session import RequestBuilder, VllmJob
from spo.engines.vllm.vector_table import Binding, EngineAccount, SteeringDesk
from spo.errors import ArtifactError, DataError, EngineError, SteeringError
from spo.records import SteeringReceipt, SteeringSpec
from spo.vector import SteeringVector

_CANARY_TIMEOUT = 600.0


class VllmChatEngine:
    """`spo.engines.chat.ChatEngine` on vLLM's `AsyncLLM`, in a process of its own. Made by `start`.

    Requests of any number of tasks are batched together by vLLM itself. Publishing, receipts and
    refusals are those of `VllmEngine`.
    """

    stream_interval_s: float = 0.0
    """Pieces of one answer are sent no closer together than this; vLLM joins what waits."""

    def __init__(self, llm: Any, prompts: PromptProcessor, settings: VllmSettings) -> None:
        self.llm = llm
        self.prompts = prompts
        self.settings = settings
        self.desk = SteeringDesk(plugin_config(settings), settings.max_dose)
        self.canary: dict[str, float] = {}
        self._builder = RequestBuilder(prompts, settings.max_model_len)
        self._info: EngineInfo | None = None
        self._progress = time.monotonic()
        self._mail = ReceiptMail(llm)

    @classmethod
    async def start(
        cls,
        model: str,
        *,
        revision: str | None = None,
        settings: VllmSettings | None = None,
        **options: Any,
    ) -> Self:
        """Load a model and show that steering works.

        Args:
            model: local folder in hub layout, or hub id.
            revision: hub revision.
            settings: how to start; or give the fields of `VllmSettings` by keyword.

        Raises:
            EngineError: vLLM cannot start this model.
            SteeringError: it started and steering cannot be shown to work.
        """
        chosen = settings or VllmSettings(**options)
        prompts = PromptProcessor(model, revision)
        llm = start_async_llm(model, revision, chosen, plugin_config(chosen))
        engine = cls(llm, prompts, chosen)
        try:
            workers = [json.loads(text) for text in await engine._rpc("spo_describe")]
            engine._info = describe(model, revision, engine.desk.config, workers, llm.model_config)
            engine.canary = await engine._run_canary()
        except BaseException:
            engine.close()
            raise
        return engine

    @property
    def info(self) -> EngineInfo:
        """What model it holds."""
        if self._info is None:
            raise EngineError("the engine is not started; use VllmChatEngine.start")
        return self._info

    async def publish(self, name: str, vector: SteeringVector, version: int) -> str:
        """Install a version while requests run; see `VllmEngine.publish`."""
        if name == canary.NAME:
            raise SteeringError(f"the name {name!r} is reserved; choose another")
        return await self._publish(name, vector, version)

    async def _publish(self, name: str, vector: SteeringVector, version: int) -> str:
        check_belongs(vector, self.info)
        slot = self.desk.reserve(name, vector, version)
        if slot.ready:
            return vector.sha256
        hashes = await self._rpc("spo_publish", slot.number, vector.to_bytes())
        return self.desk.confirm(slot, hashes)

    def retire(self, name: str, version: int | None = None) -> None:
        """Drop one version, or all versions, of a vector; SteeringError while it is in use."""
        self.desk.retire(name, version)

    @property
    def dead(self) -> bool:
        return bool(self.llm.errored)

    def holds(self, name: str, version: int) -> bool:
        return version in self.desk.slots.held().get(name, [])

    async def complete(self, request: ChatRequest) -> ChatAnswer:
        from vllm.sampling_params import RequestOutputKind

        async with contextlib.aclosing(self._events(request, RequestOutputKind.FINAL_ONLY)) as run:
            async for event in run:
                if isinstance(event, ChatAnswer):
                    return event
        raise EngineError(f"request {request.request_id!r} ended without an answer; ask again")

    async def stream(self, request: ChatRequest) -> AsyncGenerator[ChatDelta | ChatAnswer]:
        from vllm.sampling_params import RequestOutputKind

        # Closed with this iterator, not when memory is cleaned up: its vector is free at once.
        async with contextlib.aclosing(self._events(request, RequestOutputKind.DELTA)) as run:
            async for event in run:
                yield event

    async def _events(
        self, request: ChatRequest, kind: Any
    ) -> AsyncGenerator[ChatDelta | ChatAnswer]:
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
                finish=FINISH[answer.finish_reason],
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
        seen = EngineAccount(
            prompt_length=len(tokens),
            tokens=len(tokens) + made - 1,
            cached=int(output.num_cached_tokens or 0),
            spans=self.prompts.spans(tokens),
        )
        figures = await self._mail.fetch(binding.key, keep)
        return self.desk.receipts(binding, figures, seen)

    def _params(self, request: ChatRequest, kind: Any) -> Any:
        return answer_params(
            request.sampling,
            self.prompts,
            detokenize=True,
            logprobs=None,
            output_kind=kind,
            stop=list(request.stop) or None,
            frequency_penalty=request.frequency_penalty,
            presence_penalty=request.presence_penalty,
            ignore_eos=request.ignore_eos,
        )

    async def _prompt(self, request: ChatRequest, binding: Binding, params: Any) -> Any:
        """vLLM's engine input; everything that can be wrong with a request is found here."""
        text = self.prompts.render_turns(
            (turn.role, [part if isinstance(part, str) else None for part in turn.parts])
            for turn in request.turns
        )
        pictures = [p.open() for t in request.turns for p in t.parts if isinstance(p, Picture)]
        entry: dict[str, Any] = {"prompt_token_ids": list(self.prompts.short_tokens(text))}
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

    def _bind(self, spec: SteeringSpec | None) -> Binding:
        return self.desk.bind([(spec,) if spec else ()])[0]

    async def _run(self, job: VllmJob) -> AsyncIterator[Any]:
        """vLLM's outputs; leaving early aborts the request."""
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        job.params.output_kind = RequestOutputKind.CUMULATIVE
        try:
            async for output in self.llm.generate(job.engine_input, job.params, job.key):
                yield output
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineError(
                f"vLLM's engine died ({error}); its log has the cause. Start a new engine"
            ) from error

    async def _rpc(self, method: str, *args: Any) -> list[Any]:
        """Call a worker method on every rank."""
        try:
            return list(await self.llm.collective_rpc(method, args=args))
        except (ArtifactError, SteeringError):
            raise
        except Exception as error:
            raise SteeringError(
                f"worker call {method} failed: {error}. If the method is unknown, the plugin did "
                "not load: check that VLLM_PLUGINS is unset or names spo_steering"
            ) from error

    async def _run_canary(self) -> dict[str, float]:
        await self._publish(canary.NAME, canary.canary_vector(self.info), 0)
        loop = asyncio.get_running_loop()

        def probe(spec: SteeringSpec | None) -> canary.Logprobs:
            waiting = asyncio.run_coroutine_threadsafe(self._probe(spec), loop)
            return waiting.result(_CANARY_TIMEOUT)

        try:
            return await asyncio.to_thread(canary.run_canary, probe, self.desk.config.operators)
        finally:
            self.desk.retire(canary.NAME)

    async def _probe(self, spec: SteeringSpec | None) -> canary.Logprobs:
        binding = self._bind(spec)
        try:
            job = canary_job(self._builder, binding)
            *_, output = [output async for output in self._run(job)]
            await self._confirm(binding, job.tokens, len(output.outputs[0].token_ids), output)
        finally:
            self.desk.release([binding])
        return canary_logprobs(output)

    def close(self) -> None:
        """Give the model's memory and processes back."""
        self.llm.shutdown()
