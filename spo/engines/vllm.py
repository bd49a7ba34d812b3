"""vLLM engine: continuous batching with per-request steering inside the compiled graph.

In: requests that name published vectors. Out: rollouts with receipts that the workers confirmed,
log-probabilities, pooled activations. How steering gets into vLLM: `spo.engines.vllm_plugin`.

`generate`, `logprobs`, `capture` and `publish` may be called from several threads at once: they
take turns by engine step, so a publish lands between two steps of a running generation.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spo.algorithms.positions import Span, select_positions
from spo.engines.base import Capture, CaptureRequest, EngineInfo, LogprobRequest
from spo.engines.hf import check_belongs, folder_revision, model_identity
from spo.engines.processing import PromptProcessor, check_same_tokens, load_image
from spo.engines.vllm_plugin import canary
from spo.engines.vllm_plugin.desk import Binding, Seen, SteeringDesk
from spo.engines.vllm_plugin.turns import Turns
from spo.engines.vllm_plugin.wire import (
    CONFIG_KEY,
    REQUEST_KEY,
    PluginConfig,
    RequestSteering,
    cache_salt,
    op_version,
)
from spo.errors import ArtifactError, EngineError, SteeringError
from spo.records import (
    FinishReason,
    GenerateRequest,
    Operator,
    Prompt,
    Rollout,
    Sampling,
    SteeringReceipt,
    SteeringSpec,
)
from spo.vector import SteeringVector

_GIB = 1 << 30
_FINISH = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.ABORTED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSettings:
    """How to start the engine."""

    dtype: str = "auto"
    slots: int = 8
    """Vector versions that the engine holds at once."""
    lanes: int = 1
    """Vectors that one request may stack."""
    operators: tuple[Operator, ...] = tuple(Operator)
    """Rules compiled in; `add` alone is the cheapest graph."""
    capture_rows: int | None = None
    """Sequences captured at once; None: 64 on a CPU, 0 (no capture in the graph) on a GPU."""
    max_dose: float = 8.0
    """Largest dose relative to the hidden norm that a request may ask for."""
    max_model_len: int = 2048
    max_num_seqs: int = 64
    kv_cache_gib: float | None = None
    """Cache memory; None lets vLLM choose from `gpu_memory_utilization`."""
    gpu_memory_utilization: float | None = None
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    in_process: bool = False
    """Run the engine core in this process: starts faster, one engine in a process."""
    seed: int = 0
    engine_options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `vllm.LLM`, e.g. {"load_format": "dummy"}."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Job:
    """One sequence on its way through vLLM."""

    key: str
    tokens: tuple[int, ...]
    """Expected prompt tokens, image placeholders expanded, given answer tokens included."""
    prompt_length: int
    engine_input: Any
    params: Any


class VllmEngine:
    """A frozen model in vLLM with per-request steering.

    Args:
        model: local folder in hub layout, or hub id.
        revision: hub revision.
        settings: how to start; or give the fields of `VllmSettings` by keyword.

    Raises:
        EngineError: vLLM cannot start this model.
        SteeringError: it started and steering cannot be shown to work.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        settings: VllmSettings | None = None,
        **options: Any,
    ) -> None:
        self.settings = settings or VllmSettings(**options)
        self.prompts = PromptProcessor(model, revision)
        self._prompt_tokens: dict[Prompt, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._turns = Turns()
        self._capturing = threading.Lock()
        self._finished: dict[str, Any] = {}
        config = self._plugin_config()
        self.desk = SteeringDesk(config, self.settings.max_dose)
        self._llm = start_llm(model, revision, self.settings, config)
        self._engine = self._llm.llm_engine
        try:
            self._info = self._describe(model, revision, config)
            self.canary = self._run_canary()
        except BaseException:
            self.close()
            raise

    def _plugin_config(self) -> PluginConfig:
        rows = self.settings.capture_rows
        if rows is None:
            rows = 64 if _on_cpu() else 0
        return PluginConfig(
            slots=self.settings.slots,
            lanes=self.settings.lanes,
            operators=self.settings.operators,
            capture_rows=rows,
            version=op_version(),
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    def publish(self, name: str, vector: SteeringVector, version: int) -> str:
        if name == canary.NAME:
            raise SteeringError(f"the name {name!r} is reserved; choose another")
        return self._publish(name, vector, version)

    def _publish(self, name: str, vector: SteeringVector, version: int) -> str:
        check_belongs(vector, self._info)
        slot = self.desk.reserve(name, vector, version)
        if slot.ready:
            return vector.sha256
        hashes = self._rpc("spo_publish", slot.number, vector.to_bytes())
        return self.desk.confirm(slot, hashes)

    def retire(self, name: str, version: int | None = None) -> None:
        """Drop one version, or all versions, of a vector; SteeringError while it is in use."""
        self.desk.retire(name, version)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Rollout]:
        pairs = self.generate_stacked(
            [(request, (request.steering,) if request.steering else ()) for request in requests]
        )
        return [rollout for rollout, _ in pairs]

    def generate_stacked(
        self, requests: Sequence[tuple[GenerateRequest, Sequence[SteeringSpec]]]
    ) -> list[tuple[Rollout, tuple[SteeringReceipt, ...]]]:
        """Like `generate`, with several vectors at once for each request.

        Args:
            requests: each with its specs, at most `lanes`; gates read the hidden state before any
                of them changed it, and the changes are added up.

        Returns:
            Each rollout with the receipts of all its specs.
        """
        with self._bound([specs for _, specs in requests]) as bindings:
            jobs = [
                self._job(binding, request.prompt, (), self._sampling(request.sampling))
                for (request, _), binding in zip(requests, bindings, strict=True)
            ]
            outputs = self._run(jobs)
            receipts = self._receipts(bindings, jobs, outputs)
        return [
            (self._rollout(request, job, output, receipt), receipt)
            for (request, _), job, output, receipt in zip(
                requests, jobs, outputs, receipts, strict=True
            )
        ]

    def logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float]]:
        specs = [(request.steering,) if request.steering else () for request in requests]
        options = {"prompt_logprobs": 0, "skip_reading_prefix_cache": True}
        sampling = Sampling(max_tokens=1, temperature=0.0)
        with self._bound(specs) as bindings:
            jobs = [
                self._job(
                    binding, request.prompt, request.token_ids, self._sampling(sampling, **options)
                )
                for request, binding in zip(requests, bindings, strict=True)
            ]
            outputs = self._run(jobs)
            self._receipts(bindings, jobs, outputs)
        return [
            [
                float(output.prompt_logprobs[place][job.tokens[place]].logprob)
                for place in range(job.prompt_length, len(job.tokens))
            ]
            for job, output in zip(jobs, outputs, strict=True)
        ]

    def capture(self, requests: Sequence[CaptureRequest]) -> list[Capture]:
        """Pooled activations; `Capture.norm` is the *mean* hidden norm over the pooled tokens.

        (A median would need every token's norm to leave the graph; the first token, whose norm
        would spoil a mean, is left out.)
        """
        rows = self.desk.config.capture_rows
        if not rows:
            raise EngineError(
                "capturing is not compiled into this engine; start it with capture_rows=64 "
                "(sequences at once), or use the hf engine"
            )
        for request in requests:
            outside = [x for x in request.layers if not 0 <= x < self._info.num_layers]
            if outside or not request.layers:
                raise EngineError(
                    f"capture layers must lie in 0..{self._info.num_layers - 1}, got "
                    f"{list(request.layers)}"
                )
        captures: list[Capture] = []
        for start in range(0, len(requests), rows):
            with self._capturing:
                captures += self._capture(requests[start : start + rows])
        return captures

    def close(self) -> None:
        llm = self.__dict__.pop("_llm", None)
        self.__dict__.pop("_engine", None)
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()

    def _capture(self, requests: Sequence[CaptureRequest]) -> list[Capture]:
        jobs: list[_Job] = []
        sampling = Sampling(max_tokens=1, temperature=0.0)
        for row, request in enumerate(requests, start=1):
            binding = Binding(key=self.desk.next_key(), specs=(), slots=(), lanes=())
            params = self._sampling(sampling, skip_reading_prefix_cache=True)
            job = self._job(binding, request.prompt, request.token_ids, params)
            params.extra_args = {
                REQUEST_KEY: RequestSteering(
                    key=job.key,
                    capture_row=row,
                    capture_positions=request.positions,
                    prompt_length=job.prompt_length,
                ).to_wire()
            }
            jobs.append(job)
        expected = [
            _pooled_tokens(request, job, self.prompts)
            for request, job in zip(requests, jobs, strict=True)
        ]
        self._run(jobs)
        figures = self._figures([job.key for job in jobs])[0]
        raw = self._rpc("spo_captures", list(range(1, len(jobs) + 1)))[0]
        shape = (len(jobs), self._info.num_layers, self._info.hidden_size + 1)
        sums = np.frombuffer(raw, dtype=np.float32).reshape(shape)
        captures = []
        for row, (request, count) in enumerate(zip(requests, expected, strict=True)):
            if figures[row]["captured"] != count:
                raise EngineError(
                    f"capture {request.request_id!r} pooled {figures[row]['captured']} tokens, "
                    f"expected {count}"
                )
            mean = sums[row, list(request.layers)] / count
            captures.append(
                Capture(
                    request_id=request.request_id,
                    mean=mean[:, :-1].copy(),
                    norm=mean[:, -1].copy(),
                    tokens=count,
                )
            )
        return captures

    @contextmanager
    def _bound(self, specs: Sequence[Sequence[SteeringSpec]]) -> Any:
        bindings = self.desk.bind(specs)
        try:
            yield bindings
        finally:
            self.desk.release(bindings)

    def _sampling(self, sampling: Sampling, **options: Any) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **{"logprobs": 0, **options},
        )

    def _job(self, binding: Binding, prompt: Prompt, answer: Sequence[int], params: Any) -> _Job:
        """Everything that can be wrong with a request is found here, before it enters vLLM."""
        short, expanded = self._tokens(prompt)
        tokens = (*expanded, *answer)
        limit = self.settings.max_model_len
        if len(tokens) + params.max_tokens > limit:
            raise EngineError(
                f"prompt {prompt.prompt_id!r} has {len(tokens)} tokens and {params.max_tokens} more "
                f"are asked for, together over max_model_len={limit}; shorten it or raise the limit"
            )
        entry: dict[str, Any] = {"prompt_token_ids": [*short, *answer]}
        if prompt.image is not None:
            entry["multi_modal_data"] = {"image": load_image(prompt.image)}
        if binding.lanes:
            entry["cache_salt"] = cache_salt(binding.lanes)
            length = len(expanded) if answer else 0
            params.extra_args = {REQUEST_KEY: binding.wire(prompt_length=length)}
        engine_input = self._llm._preprocess_cmpl_one(entry)
        check_same_tokens(prompt, tokens, engine_input["prompt_token_ids"])
        return _Job(
            key=binding.key,
            tokens=tokens,
            prompt_length=len(expanded),
            engine_input=engine_input,
            params=params,
        )

    def _tokens(self, prompt: Prompt) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokens with one placeholder for each picture, and expanded as the learner has them."""
        known = self._prompt_tokens.get(prompt)
        if known is None:
            expanded = self.prompts.prompt_tokens(prompt)
            short = expanded
            if prompt.image is not None:
                short = tuple(self.prompts.tokenizer(self.prompts.render(prompt)).input_ids)
            if len(self._prompt_tokens) > 4096:
                self._prompt_tokens.clear()
            known = self._prompt_tokens[prompt] = (short, expanded)
        return known

    def _run(self, jobs: Sequence[_Job]) -> list[Any]:
        """vLLM's outputs of the jobs, in order; other threads' jobs advance in the same steps."""
        waiting = {job.key for job in jobs}
        try:
            with self._turns:
                for job in jobs:
                    self._engine.add_request(job.key, job.engine_input, job.params)
            done: dict[str, Any] = {}
            while waiting:
                with self._turns:
                    ready = [key for key in waiting if key in self._finished]
                    if not ready:
                        for output in self._engine.step():
                            self._finished[output.request_id] = output
                        ready = [key for key in waiting if key in self._finished]
                    for key in ready:
                        done[key] = self._finished.pop(key)
                        waiting.discard(key)
        except BaseException as error:
            self._abort(waiting)
            if type(error).__name__ in ("EngineDeadError", "EngineGenerateError"):
                raise EngineError(
                    f"vLLM's engine died ({error}); its log has the cause. Start a new engine"
                ) from error
            raise
        return [done[job.key] for job in jobs]

    def _abort(self, keys: set[str]) -> None:
        try:
            self._engine.abort_request(list(keys))
        except Exception as error:  # noqa: BLE001 - a dead engine must not hide the first error
            print(f"could not abort {len(keys)} requests: {error}")

    def _figures(self, keys: Sequence[str]) -> list[list[dict[str, Any]]]:
        """The workers' own accounts: [rank][request]."""
        return [json.loads(text) for text in self._rpc("spo_receipts", list(keys))]

    def _receipts(
        self, bindings: Sequence[Binding], jobs: Sequence[_Job], outputs: Sequence[Any]
    ) -> list[tuple[SteeringReceipt, ...]]:
        steered = [binding.key for binding in bindings if binding.lanes]
        ranks = self._figures(steered) if steered else []
        place = {key: i for i, key in enumerate(steered)}
        receipts = []
        for binding, job, output in zip(bindings, jobs, outputs, strict=True):
            if not binding.lanes:
                receipts.append(())
                continue
            seen = Seen(
                prompt_length=job.prompt_length,
                tokens=len(job.tokens) + len(output.outputs[0].token_ids) - 1,
                cached=int(output.num_cached_tokens or 0),
                spans=self.prompts.spans(job.tokens),
            )
            figures = [rank[place[binding.key]] for rank in ranks]
            receipts.append(self.desk.receipts(binding, figures, seen))
        return receipts

    def _rollout(
        self,
        request: GenerateRequest,
        job: _Job,
        output: Any,
        receipts: tuple[SteeringReceipt, ...],
    ) -> Rollout:
        answer = output.outputs[0]
        return Rollout(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=job.tokens,
            token_ids=tuple(answer.token_ids),
            text=self.prompts.decode(answer.token_ids),
            logprob=float(answer.cumulative_logprob),
            finish=_FINISH[answer.finish_reason],
            receipt=receipts[0] if receipts else None,
        )

    def _rpc(self, method: str, *args: Any) -> list[Any]:
        with self._turns:
            try:
                return list(self._llm.collective_rpc(method, args=args))
            except (ArtifactError, SteeringError):
                raise
            except Exception as error:
                raise SteeringError(
                    f"worker call {method} failed: {error}. If the method is unknown, the plugin "
                    "did not load: check that VLLM_PLUGINS is unset or names spo_steering"
                ) from error

    def _describe(self, model: str, revision: str | None, config: PluginConfig) -> EngineInfo:
        import vllm

        workers = [json.loads(text) for text in self._rpc("spo_describe")]
        text = self._llm.model_config.hf_text_config
        for worker in workers:
            if worker["config"] != config.to_wire() or worker["layers"] != text.num_hidden_layers:
                raise SteeringError(
                    f"a worker has {worker}, expected {text.num_hidden_layers} layers and "
                    f"{config.to_wire()}; install the same spo on every node"
                )
        self.runner = workers[0]["runner"]
        return EngineInfo(
            model_id=model_identity(model),
            model_revision=revision or folder_revision(model),
            hidden_size=int(workers[0]["hidden_size"]),
            num_layers=int(workers[0]["layers"]),
            dtype=str(self._llm.model_config.dtype).removeprefix("torch."),
            backend="vllm",
            version=vllm.__version__,
        )

    def _run_canary(self) -> dict[str, float]:
        self._publish(canary.NAME, canary.canary_vector(self._info), 0)
        tokens = tuple(self.prompts.tokenizer("a b c", add_special_tokens=False).input_ids)

        def probe(spec: SteeringSpec | None) -> canary.Logprobs:
            params = self._sampling(Sampling(max_tokens=2, temperature=0.0), logprobs=5)
            params.ignore_eos = True
            with self._bound([(spec,) if spec else ()]) as (binding,):
                entry: dict[str, Any] = {"prompt_token_ids": list(tokens)}
                if binding.lanes:
                    entry["cache_salt"] = cache_salt(binding.lanes)
                    params.extra_args = {REQUEST_KEY: binding.wire()}
                job = _Job(
                    key=binding.key,
                    tokens=tokens,
                    prompt_length=len(tokens),
                    engine_input=self._llm._preprocess_cmpl_one(entry),
                    params=params,
                )
                outputs = self._run([job])
                self._receipts([binding], [job], outputs)
            return [
                {token: float(value.logprob) for token, value in step.items()}
                for step in outputs[0].outputs[0].logprobs
            ]

        try:
            return canary.run_canary(probe, self.desk.config.operators)
        finally:
            self.desk.retire(canary.NAME)


def start_llm(
    model: str, revision: str | None, settings: VllmSettings, config: PluginConfig | None
) -> Any:
    """A `vllm.LLM`; with `config` its workers can steer, without it is plain vLLM.

    Raises:
        EngineError: vLLM does not start; the cause is in its log above.
    """
    options: dict[str, Any] = {
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enforce_eager": settings.enforce_eager,
        "seed": settings.seed,
        "disable_log_stats": True,
        "enable_prefix_caching": True,
    }
    if config is not None:
        options["additional_config"] = {CONFIG_KEY: config.to_wire()}
    if settings.kv_cache_gib is not None:
        options["kv_cache_memory_bytes"] = int(settings.kv_cache_gib * _GIB)
    if settings.gpu_memory_utilization is not None:
        options["gpu_memory_utilization"] = settings.gpu_memory_utilization
    if settings.in_process:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        options["distributed_executor_backend"] = "uni"
    from vllm import LLM

    try:
        return LLM(model, revision=revision, **{**options, **settings.engine_options})
    except (RuntimeError, ValueError, OSError) as error:
        raise EngineError(
            f"vLLM cannot start {model!r}: {error}. Its own log above names the cause"
        ) from error


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _pooled_tokens(request: CaptureRequest, job: _Job, prompts: PromptProcessor) -> int:
    spans: tuple[Span, ...] = prompts.spans(job.tokens)
    index = np.arange(len(job.tokens), dtype=np.int64)
    chosen = select_positions(
        request.positions, index, prompt_length=job.prompt_length, image_spans=spans
    )
    count = int(chosen[1:].sum())
    if not count:
        raise EngineError(
            f"capture {request.request_id!r}: no token is left to pool over "
            f"({request.positions.value} of {len(index)} tokens, first one left out)"
        )
    return count
