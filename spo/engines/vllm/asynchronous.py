"""vLLM's asyncio engine with the same per-request steering as `VllmEngine`, for serving.

Requests of any number of tasks are batched together by vLLM itself; the engine core runs in a
process of its own. Publishing, receipts and refusals are those of `VllmEngine`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Self

from spo.engines.base import EngineInfo
from spo.engines.identity import check_belongs
from spo.engines.processing import PromptProcessor, check_same_tokens
from spo.engines.vllm import canary
from spo.engines.vllm.launch import VllmSettings, plugin_config, start_async_llm
from spo.engines.vllm.outputs import (
    answer_params,
    canary_job,
    canary_logprobs,
    describe,
    rollout_of,
)
from spo.engines.vllm.session import Job, RequestBuilder
from spo.engines.vllm.vector_table import Binding, SteeringDesk
from spo.errors import ArtifactError, EngineError, SteeringError
from spo.records import GenerateRequest, Rollout, SteeringReceipt, SteeringSpec
from spo.vector import SteeringVector

_CANARY_TIMEOUT = 600.0


class AsyncVllmEngine:
    """A frozen model in `AsyncLLM` with per-request steering. Made by `start`."""

    def __init__(self, llm: Any, prompts: PromptProcessor, settings: VllmSettings) -> None:
        self.llm = llm
        self.prompts = prompts
        self.settings = settings
        self.desk = SteeringDesk(plugin_config(settings), settings.max_dose)
        self._builder = RequestBuilder(prompts, settings.max_model_len)
        self._info: EngineInfo | None = None
        self.canary: dict[str, float] = {}

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
            raise EngineError("the engine is not started; use AsyncVllmEngine.start")
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

    async def generate(self, request: GenerateRequest) -> Rollout:
        """One answer; run several at once with `asyncio.gather`."""
        async for piece in self.stream(request):
            if isinstance(piece, Rollout):
                return piece
        raise EngineError(f"request {request.request_id!r} ended without an answer")

    async def stream(self, request: GenerateRequest) -> AsyncIterator[str | Rollout]:
        """Text of one answer piece by piece, then the whole rollout with its receipt.

        Raises:
            SteeringError: refused before it enters the engine, or its receipt does not hold.
        """
        binding = self._bind(request.steering)
        try:
            params = answer_params(request, self.prompts)
            job = self._builder.ask(binding, request.prompt, (), params)
            sent, output = "", None
            async for output in self._run(job):
                check_same_tokens(request.prompt, job.tokens, output.prompt_token_ids)
                text = self.prompts.decode(output.outputs[0].token_ids)
                # A character that is still incomplete decodes to the replacement character.
                if text.startswith(sent) and len(text) > len(sent) and not text.endswith("\ufffd"):
                    yield text[len(sent) :]
                    sent = text
            receipts = await self._receipts(binding, job, output)
            rollout = rollout_of(request, job, output, receipts, self.prompts)
            if rollout.text != sent:
                yield rollout.text[len(sent) :]
            yield rollout
        finally:
            self.desk.release([binding])

    def _bind(self, spec: SteeringSpec | None) -> Binding:
        return self.desk.bind([(spec,) if spec else ()])[0]

    async def _run(self, job: Job) -> AsyncIterator[Any]:
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

    async def _receipts(
        self, binding: Binding, job: Job, output: Any
    ) -> tuple[SteeringReceipt, ...]:
        if not binding.lanes:
            return ()
        ranks = [json.loads(text) for text in await self._rpc("spo_receipts", [binding.key])]
        seen = self._builder.seen(job, output)
        return self.desk.receipts(binding, [rank[0] for rank in ranks], seen)

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
            await self._receipts(binding, job, output)
        finally:
            self.desk.release([binding])
        return canary_logprobs(output)

    def close(self) -> None:
        """Give the model's memory and processes back."""
        self.llm.shutdown()
