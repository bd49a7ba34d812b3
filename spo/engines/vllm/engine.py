"""vLLM engine: continuous batching with per-request steering inside the compiled graph.

In: requests that name published vectors. Out: rollouts with receipts that the workers confirmed,
log-probabilities, pooled activations. How steering gets into vLLM: `spo.engines.vllm.plugin`.

`generate`, `logprobs`, `capture` and `publish` may be called from several threads at once: they
take turns by engine step, so a publish lands between two steps of a running generation.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from spo.engines.base import Capture, CaptureRequest, EngineInfo, LogprobRequest
from spo.engines.identity import check_belongs
from spo.engines.processing import PromptProcessor
from spo.engines.vllm import canary
from spo.engines.vllm.launch import VllmSettings, plugin_config, start_llm, stop_llm
from spo.engines.vllm.outputs import (
    answer_params,
    canary_job,
    canary_logprobs,
    describe,
    pooled_tokens,
    rollout_of,
)
from spo.engines.vllm.plugin.wire import REQUEST_KEY, PluginConfig, RequestSteering
from spo.engines.vllm.session import VllmJob, VllmSession, sampling_params
from spo.engines.vllm.vector_table import Binding, SteeringDesk
from spo.errors import EngineError, SteeringError
from spo.records import GenerateRequest, Rollout, Sampling, SteeringReceipt, SteeringSpec
from spo.vector import SteeringVector


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

    concurrent = True

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
        self._capturing = threading.Lock()
        config = plugin_config(self.settings)
        self.desk = SteeringDesk(config, self.settings.max_dose)
        llm = start_llm(model, revision, self.settings, config)
        self.session = VllmSession(llm, self.prompts, self.desk, self.settings.max_model_len)
        try:
            self._info = self._describe(model, revision, config)
            self.canary = self._run_canary()
        except BaseException:
            self.close()
            raise

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
        hashes = self.session.rpc("spo_publish", slot.number, vector.to_bytes())
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
        with self.session.bound([specs for _, specs in requests]) as bindings:
            jobs = [
                self.session.job(
                    binding, request.prompt, (), answer_params(request.sampling, self.prompts)
                )
                for (request, _), binding in zip(requests, bindings, strict=True)
            ]
            outputs = self.session.run(jobs)
            receipts = self.session.receipts(bindings, jobs, outputs)
        return [
            (rollout_of(request, job, output, receipt, self.prompts), receipt)
            for (request, _), job, output, receipt in zip(
                requests, jobs, outputs, receipts, strict=True
            )
        ]

    def stream(self, request: GenerateRequest) -> Iterator[str | Rollout]:
        """Text of one answer piece by piece, then the whole rollout with its receipt.

        Streams of several threads are batched together. Closing the iterator aborts the request.
        """
        specs = (request.steering,) if request.steering else ()
        with self.session.bound([specs]) as (binding,):
            job = self.session.job(
                binding, request.prompt, (), answer_params(request.sampling, self.prompts)
            )
            sent, output = "", None
            for output in self.session.stream(job):
                text = self.prompts.decode(output.outputs[0].token_ids)
                # A character that is still incomplete decodes to the replacement character.
                if text.startswith(sent) and len(text) > len(sent) and not text.endswith("\ufffd"):
                    yield text[len(sent) :]
                    sent = text
            receipts = self.session.receipts([binding], [job], [output])[0]
            rollout = rollout_of(request, job, output, receipts, self.prompts)
            if rollout.text != sent:
                yield rollout.text[len(sent) :]
            yield rollout

    def logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float]]:
        specs = [(request.steering,) if request.steering else () for request in requests]
        options = {"prompt_logprobs": 0, "skip_reading_prefix_cache": True}
        sampling = Sampling(max_tokens=1, temperature=0.0)
        with self.session.bound(specs) as bindings:
            jobs = [
                self.session.job(
                    binding, request.prompt, request.token_ids, sampling_params(sampling, **options)
                )
                for request, binding in zip(requests, bindings, strict=True)
            ]
            outputs = self.session.run(jobs)
            self.session.receipts(bindings, jobs, outputs)
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

    def alive(self) -> bool:
        """False once vLLM has noticed that its engine core is gone (it watches the process)."""
        resources = getattr(self.session.engine.engine_core, "resources", None)
        return not getattr(resources, "engine_dead", False)

    def close(self) -> None:
        session = self.__dict__.pop("session", None)
        if session is not None:
            stop_llm(session.llm)

    def _capture(self, requests: Sequence[CaptureRequest]) -> list[Capture]:
        jobs: list[VllmJob] = []
        sampling = Sampling(max_tokens=1, temperature=0.0)
        for row, request in enumerate(requests, start=1):
            binding = Binding(key=self.desk.next_key(), specs=(), slots=(), lanes=())
            params = sampling_params(sampling, skip_reading_prefix_cache=True)
            job = self.session.job(binding, request.prompt, request.token_ids, params)
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
            pooled_tokens(request, job, self.prompts)
            for request, job in zip(requests, jobs, strict=True)
        ]
        self.session.run(jobs)
        figures = self.session.figures([job.key for job in jobs])[0]
        raw = self.session.rpc("spo_captures", list(range(1, len(jobs) + 1)))[0]
        shape = (len(jobs), self._info.num_layers, self._info.hidden_size + 1)
        sums = np.frombuffer(raw, dtype=np.float32).reshape(shape)
        captures = []
        for row, (request, count) in enumerate(zip(requests, expected, strict=True)):
            if figures[row]["captured"] != count:
                raise EngineError(
                    f"capture {request.request_id!r} pooled {figures[row]['captured']} tokens, "
                    f"expected {count}"
                )
            mean = (sums[row, list(request.layers)] / count).astype(np.float32)
            captures.append(
                Capture(
                    request_id=request.request_id,
                    mean=mean[:, :-1].copy(),
                    norm=mean[:, -1].copy(),
                    tokens=count,
                )
            )
        return captures

    def _describe(self, model: str, revision: str | None, config: PluginConfig) -> EngineInfo:
        workers = [json.loads(text) for text in self.session.rpc("spo_describe")]
        self.runner = workers[0]["runner"]
        return describe(model, revision, config, workers, self.session.llm.model_config)

    def _run_canary(self) -> dict[str, float]:
        self._publish(canary.NAME, canary.canary_vector(self._info), 0)

        def probe(spec: SteeringSpec | None) -> canary.Logprobs:
            with self.session.bound([(spec,) if spec else ()]) as (binding,):
                job = canary_job(self.session.builder, binding)
                outputs = self.session.run([job])
                self.session.receipts([binding], [job], outputs)
            return canary_logprobs(outputs[0])

        try:
            return canary.run_canary(probe, self.desk.config.operators)
        finally:
            self.desk.retire(canary.NAME)
