"""vLLM behind the chat protocol: its asynchronous engine, whose core runs in a process of its own.

The same plugin, desk, canary and receipts as `VllmEngine`. A streamed answer's first piece leaves
only after the workers have confirmed that its prompt was steered, and its end carries the receipt.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from spo.engines.base import EngineInfo
from spo.engines.chat import ChatAnswer, ChatDelta, ChatRequest, Picture, Turn
from spo.engines.identity import check_belongs, folder_revision, model_identity
from spo.engines.processing import PromptProcessor
from spo.engines.vllm_plugin import canary
from spo.engines.vllm_plugin.desk import Binding, Seen, SteeringDesk
from spo.engines.vllm_plugin.launch import VllmSettings, llm_options
from spo.engines.vllm_plugin.mail import ReceiptMail
from spo.engines.vllm_plugin.wire import REQUEST_KEY, PluginConfig, cache_salt, op_version
from spo.errors import DataError, EngineError, SteeringError
from spo.records import FinishReason, SteeringReceipt, SteeringSpec
from spo.vector import SteeringVector

_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": FinishReason.ABORTED}
_CANARY_TEXT = "a b c"


class VllmChatEngine:
    """See the module's text. Made by `start`.

    Args:
        llm: a started `vllm.v1.engine.async_llm.AsyncLLM`.
        prompts: the processor of the same model.
        desk: slots and checks.
        settings: how `llm` was started.
        stream_interval_s: pieces of one answer are sent no closer together than this.
    """

    def __init__(
        self,
        llm: Any,
        prompts: PromptProcessor,
        desk: SteeringDesk,
        settings: VllmSettings,
        stream_interval_s: float,
    ) -> None:
        self.llm = llm
        self.prompts = prompts
        self.desk = desk
        self.settings = settings
        self._interval = stream_interval_s
        self._progress = time.monotonic()
        self._receipts = ReceiptMail(llm)
        self._info: EngineInfo | None = None
        self.canary: dict[str, float] = {}

    @classmethod
    async def start(
        cls,
        model: str,
        *,
        revision: str | None = None,
        settings: VllmSettings,
        stream_interval_s: float = 0.0,
    ) -> VllmChatEngine:
        """Load the model and show that steering works.

        Raises:
            EngineError: vLLM cannot start this model.
            SteeringError: it started and steering cannot be shown to work.
        """
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        config = PluginConfig(
            slots=settings.slots,
            lanes=settings.lanes,
            operators=settings.operators,
            version=op_version(),
        )
        prompts = PromptProcessor(model, revision)
        try:
            llm = AsyncLLM.from_engine_args(
                AsyncEngineArgs(model=model, revision=revision, **llm_options(settings, config))
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise EngineError(
                f"vLLM cannot start {model!r}: {error}. Its own log above names the cause"
            ) from error
        # The canary needs a strong dose; requests are held to the limit from then on.
        desk = SteeringDesk(config, max(settings.max_dose, 2.0 * canary.DOSE))
        engine = cls(llm, prompts, desk, settings, stream_interval_s)
        try:
            engine._info = await engine._describe(model, revision, config)
            engine.canary = await engine._run_canary()
            desk.max_dose = settings.max_dose
        except BaseException:
            engine.close()
            raise
        return engine

    @property
    def info(self) -> EngineInfo:
        assert self._info is not None, "set by start"
        return self._info

    @property
    def dead(self) -> bool:
        return bool(self.llm.errored)

    async def publish(self, name: str, vector: SteeringVector, version: int) -> str:
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

    def holds(self, name: str, version: int) -> bool:
        return version in self.desk.slots.held().get(name, [])

    async def complete(self, request: ChatRequest) -> ChatAnswer:
        from vllm.sampling_params import RequestOutputKind

        async for event in self._answer(request, RequestOutputKind.FINAL_ONLY):
            if isinstance(event, ChatAnswer):
                return event
        raise EngineError(f"request {request.request_id!r} ended without an answer; ask again")

    async def stream(self, request: ChatRequest) -> AsyncIterator[ChatDelta | ChatAnswer]:
        from vllm.sampling_params import RequestOutputKind

        async for event in self._answer(request, RequestOutputKind.DELTA):
            yield event

    async def _answer(
        self, request: ChatRequest, kind: Any
    ) -> AsyncIterator[ChatDelta | ChatAnswer]:
        specs = (request.steering,) if request.steering else ()
        bindings = self.desk.bind([specs])
        binding = bindings[0]
        try:
            params = self._params(request, kind)
            prompt = await self._prompt(request, binding, params)
            tokens: tuple[int, ...] = ()
            text, made, confirmed = "", 0, not specs
            async with contextlib.aclosing(self.llm.generate(prompt, params, binding.key)) as run:
                async for output in run:
                    self._progress = time.monotonic()
                    answer = output.outputs[0]
                    tokens = tokens or tuple(output.prompt_token_ids)
                    made += len(answer.token_ids)
                    text += answer.text
                    if output.finished:
                        break
                    if answer.text:
                        if not confirmed:
                            await self._confirm(binding, tokens, made, output, keep=True)
                            confirmed = True
                        yield ChatDelta(text=answer.text)
                        await asyncio.sleep(self._interval)
            receipts = await self._confirm(binding, tokens, made, output)
            if output.outputs[0].text and kind.name == "DELTA":
                yield ChatDelta(text=output.outputs[0].text)
            yield ChatAnswer(
                text=text,
                finish=_FINISH[output.outputs[0].finish_reason],
                prompt_tokens=len(tokens),
                completion_tokens=made,
                receipt=receipts[0] if receipts else None,
            )
        finally:
            self.desk.release(bindings)

    async def _confirm(
        self,
        binding: Binding,
        tokens: Sequence[int],
        made: int,
        output: Any,
        keep: bool = False,
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
        figures = await self._receipts.fetch(binding.key, keep)
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
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        renderer = self.llm.renderer
        try:
            (prompt,) = await renderer.render_cmpl_async(
                [parse_model_prompt(self.llm.model_config, entry)],
                renderer.default_cmpl_tok_params,
            )
        except (ValueError, TypeError) as error:
            raise DataError(f"vLLM refuses the conversation: {error}") from error
        return prompt

    def _rendered(self, turns: Sequence[Turn]) -> str:
        marker = self.prompts.image_token
        messages: list[dict[str, Any]] = []
        for turn in turns:
            texts = [part for part in turn.parts if isinstance(part, str)]
            if marker and any(marker in text for text in texts):
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
        prompt = await self._preprocessed(self._canary_entry(None))
        params = SamplingParams(max_tokens=1, temperature=0.0)
        try:
            async with asyncio.timeout(timeout_s):
                async for _ in self.llm.generate(prompt, params, self.desk.next_key()):
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

    def close(self) -> None:
        self.llm.shutdown()

    async def _rpc(self, method: str, *args: Any) -> list[Any]:
        try:
            return list(await self.llm.collective_rpc(method, args=args))
        except SteeringError:
            raise
        except Exception as error:
            raise SteeringError(
                f"worker call {method} failed: {error}. If the method is unknown, the plugin did "
                "not load: check that VLLM_PLUGINS is unset or names spo_steering"
            ) from error

    async def _describe(self, model: str, revision: str | None, config: PluginConfig) -> EngineInfo:
        import vllm

        workers = [json.loads(text) for text in await self._rpc("spo_describe")]
        text = self.llm.model_config.hf_text_config
        for worker in workers:
            if worker["config"] != config.to_wire() or worker["layers"] != text.num_hidden_layers:
                raise SteeringError(
                    f"a worker has {worker}, expected {text.num_hidden_layers} layers and "
                    f"{config.to_wire()}; install the same spo on every node"
                )
        return EngineInfo(
            model_id=model_identity(model),
            model_revision=revision or folder_revision(model),
            hidden_size=int(workers[0]["hidden_size"]),
            num_layers=int(workers[0]["layers"]),
            dtype=str(self.llm.model_config.dtype).removeprefix("torch."),
            backend="vllm",
            version=vllm.__version__,
        )

    def _canary_entry(self, binding: Binding | None) -> dict[str, Any]:
        tokens = self.prompts.tokenizer(_CANARY_TEXT, add_special_tokens=False).input_ids
        entry: dict[str, Any] = {"prompt_token_ids": tokens}
        if binding is not None and binding.lanes:
            entry["cache_salt"] = cache_salt(binding.lanes)
        return entry

    async def _probe(self, spec: SteeringSpec | None) -> canary.Logprobs:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=2,
            temperature=0.0,
            logprobs=5,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        bindings = self.desk.bind([(spec,) if spec else ()])
        try:
            prompt = await self._preprocessed(self._canary_entry(bindings[0]))
            if spec:
                params.extra_args = {REQUEST_KEY: bindings[0].wire()}
            run = self.llm.generate(prompt, params, bindings[0].key)
            (output,) = [output async for output in run]
            answer = output.outputs[0]
            await self._confirm(bindings[0], output.prompt_token_ids, len(answer.token_ids), output)
        finally:
            self.desk.release(bindings)
        return [
            {token: float(value.logprob) for token, value in step.items()}
            for step in answer.logprobs
        ]

    async def _run_canary(self) -> dict[str, float]:
        await self._publish(canary.NAME, canary.canary_vector(self.info), 0)
        loop = asyncio.get_running_loop()

        def probe(spec: SteeringSpec | None) -> canary.Logprobs:
            return asyncio.run_coroutine_threadsafe(self._probe(spec), loop).result()

        try:
            return await asyncio.to_thread(canary.run_canary, probe, self.desk.config.operators)
        finally:
            self.desk.retire(canary.NAME)
