"""Requests on their way through one `vllm.LLM`: rendered, bound, run, and their receipts fetched.

Several threads may use a session at once. They take turns by engine step.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from spo.engines.processing import PromptProcessor, check_same_tokens, load_image
from spo.engines.vllm.plugin.wire import REQUEST_KEY, cache_salt
from spo.engines.vllm.vector_table import Binding, EngineAccount, SteeringDesk
from spo.errors import ArtifactError, DataError, EngineError, SteeringError
from spo.records import Prompt, Sampling, SteeringReceipt, SteeringSpec

_LOG = logging.getLogger(__name__)


class Turns:
    """Lock that serves in order of arrival.

    A plain lock would let a generating thread take it again at once, step after step, and starve a
    publish from another thread.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._next = 0
        self._serving = 0

    def __enter__(self) -> Turns:
        with self._condition:
            ticket = self._next
            self._next += 1
            self._condition.wait_for(lambda: self._serving == ticket)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._condition:
            self._serving += 1
            self._condition.notify_all()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VllmJob:
    """One sequence on its way through vLLM."""

    key: str
    tokens: tuple[int, ...]
    """Expected prompt tokens, image placeholders expanded, given answer tokens included."""
    prompt_length: int
    engine_input: Any
    """Prompt dictionary, not yet rendered."""
    params: Any
    prompt: Prompt | None = None
    """None where the prompt is tokens only."""


def sampling_params(sampling: Sampling, **options: Any) -> Any:
    """vLLM's parameters: the log-probability of each new token, no detokenising, unless told."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        **{
            "detokenize": False,
            "logprobs": 0,
            "output_kind": RequestOutputKind.FINAL_ONLY,
            **options,
        },
    )


class RequestBuilder:
    """From prompts to what vLLM takes. Used by `LLM` and `AsyncLLM` alike.

    Args:
        prompts: the processor of the model.
        max_model_len: longest sequence.
    """

    def __init__(self, prompts: PromptProcessor, max_model_len: int) -> None:
        self.prompts = prompts
        self.max_model_len = max_model_len
        self._prompt_tokens: dict[Prompt, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def ask(self, binding: Binding, prompt: Prompt, answer: Sequence[int], params: Any) -> VllmJob:
        """A job for a prompt, with the answer's tokens so far.

        Raises:
            DataError: the sequence is too long, or the prompt or its picture cannot be used.
        """
        short, expanded = self._tokens(prompt)
        tokens = (*expanded, *answer)
        limit = self.max_model_len
        if len(tokens) + params.max_tokens > limit:
            raise DataError(
                f"prompt {prompt.prompt_id!r} has {len(tokens)} tokens and {params.max_tokens} "
                f"more are asked for, together over max_model_len={limit}; shorten it or raise "
                "the limit"
            )
        entry: dict[str, Any] = {"prompt_token_ids": [*short, *answer]}
        if prompt.image is not None:
            entry["multi_modal_data"] = {"image": load_image(prompt.image)}
        if binding.lanes:
            entry["cache_salt"] = cache_salt(binding.lanes)
            length = len(expanded) if answer else 0
            params.extra_args = {REQUEST_KEY: binding.wire(prompt_length=length)}
        return VllmJob(
            key=binding.key,
            tokens=tokens,
            prompt_length=len(expanded),
            engine_input=entry,
            params=params,
            prompt=prompt,
        )

    def ask_tokens(self, binding: Binding, tokens: Sequence[int], params: Any) -> VllmJob:
        """A job for a prompt that is tokens already, without a picture."""
        entry: dict[str, Any] = {"prompt_token_ids": list(tokens)}
        if binding.lanes:
            entry["cache_salt"] = cache_salt(binding.lanes)
            params.extra_args = {REQUEST_KEY: binding.wire()}
        return VllmJob(
            key=binding.key,
            tokens=tuple(tokens),
            prompt_length=len(tokens),
            engine_input=entry,
            params=params,
        )

    def _tokens(self, prompt: Prompt) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokens with one placeholder for each picture, and expanded as the learner has them."""
        known = self._prompt_tokens.get(prompt)
        if known is None:
            expanded = self.prompts.prompt_tokens(prompt)
            short = expanded
            if prompt.image is not None:
                short = self.prompts.short_tokens(self.prompts.render(prompt))
            if len(self._prompt_tokens) > 4096:
                self._prompt_tokens.clear()
            known = self._prompt_tokens[prompt] = (short, expanded)
        return known

    def seen(self, job: VllmJob, output: Any) -> EngineAccount:
        """The engine's account of a finished job, to hold against the workers'."""
        return EngineAccount(
            prompt_length=job.prompt_length,
            tokens=len(job.tokens) + len(output.outputs[0].token_ids) - 1,
            cached=int(output.num_cached_tokens or 0),
            spans=self.prompts.spans(job.tokens),
        )


class VllmSession:
    """See the module's text.

    Args:
        llm: a started `vllm.LLM`.
        prompts: the processor of the same model.
        desk: slots and checks.
        max_model_len: longest sequence.
    """

    def __init__(
        self, llm: Any, prompts: PromptProcessor, desk: SteeringDesk, max_model_len: int
    ) -> None:
        self.llm = llm
        self.engine = llm.llm_engine
        self.desk = desk
        self.builder = RequestBuilder(prompts, max_model_len)
        self._turns = Turns()
        self._arrived: dict[str, list[Any]] = {}

    @contextmanager
    def bound(self, specs: Sequence[Sequence[SteeringSpec]]) -> Iterator[list[Binding]]:
        """Hold the slots of these requests while they run."""
        bindings = self.desk.bind(specs)
        try:
            yield bindings
        finally:
            self.desk.release(bindings)

    def job(self, binding: Binding, prompt: Prompt, answer: Sequence[int], params: Any) -> VllmJob:
        """See `RequestBuilder.ask`."""
        return self.builder.ask(binding, prompt, answer, params)

    def run(self, jobs: Sequence[VllmJob]) -> list[Any]:
        """vLLM's outputs of the jobs, in order; other threads' jobs advance in the same steps."""
        done: dict[str, Any] = {}
        for output in self._outputs_of(jobs):
            if output.finished:
                done[output.request_id] = output
        return [done[job.key] for job in jobs]

    def stream(self, job: VllmJob) -> Iterator[Any]:
        """vLLM's outputs of one job as they come; closing the iterator aborts the request."""
        from vllm.sampling_params import RequestOutputKind

        job.params.output_kind = RequestOutputKind.CUMULATIVE
        yield from self._outputs_of([job])

    def _outputs_of(self, jobs: Sequence[VllmJob]) -> Iterator[Any]:
        waiting = {job.key for job in jobs}
        try:
            with self._turns:
                self._enter(jobs)
            while waiting:
                with self._turns:
                    if not any(key in self._arrived for key in waiting):
                        for output in self.engine.step():
                            self._arrived.setdefault(output.request_id, []).append(output)
                    fresh = [o for key in waiting for o in self._arrived.pop(key, ())]
                waiting -= {output.request_id for output in fresh if output.finished}
                yield from fresh
        except BaseException as error:
            self._abort(waiting)
            if type(error).__name__ in ("EngineDeadError", "EngineGenerateError"):
                raise EngineError(
                    f"vLLM's engine died ({error}); its log has the cause. Start a new engine"
                ) from error
            raise

    def _enter(self, jobs: Sequence[VllmJob]) -> None:
        """Render the jobs and hand them over, in one turn: nothing enters unless all are right.

        vLLM keeps rendered pictures on both sides and sends one only the first time it renders it.
        Were two threads' requests with one picture handed over in another order than rendered, or
        one of them dropped in between, its core would miss the picture.
        """
        try:
            rendered = [self.llm._preprocess_cmpl_one(job.engine_input) for job in jobs]
            for job, engine_input in zip(jobs, rendered, strict=True):
                if job.prompt is not None:
                    check_same_tokens(job.prompt, job.tokens, engine_input["prompt_token_ids"])
            for job, engine_input in zip(jobs, rendered, strict=True):
                self.engine.add_request(job.key, engine_input, job.params)
        except BaseException:
            self.engine.reset_mm_cache()
            raise

    def _abort(self, keys: set[str]) -> None:
        with self._turns:
            try:
                self.engine.abort_request(list(keys))
            except (RuntimeError, OSError) as error:  # a dead engine must not hide the cause
                _LOG.warning("could not abort %d requests: %s", len(keys), error)
            for key in keys:
                self._arrived.pop(key, None)

    def figures(self, keys: Sequence[str]) -> list[list[dict[str, Any]]]:
        """The workers' own accounts: [rank][request]."""
        return [json.loads(text) for text in self.rpc("spo_receipts", list(keys))]

    def receipts(
        self, bindings: Sequence[Binding], jobs: Sequence[VllmJob], outputs: Sequence[Any]
    ) -> list[tuple[SteeringReceipt, ...]]:
        """What the workers confirm for each request; SteeringError when they do not."""
        steered = [binding.key for binding in bindings if binding.lanes]
        ranks = self.figures(steered) if steered else []
        place = {key: i for i, key in enumerate(steered)}
        receipts: list[tuple[SteeringReceipt, ...]] = []
        for binding, job, output in zip(bindings, jobs, outputs, strict=True):
            if not binding.lanes:
                receipts.append(())
                continue
            seen = self.builder.seen(job, output)
            figures = [rank[place[binding.key]] for rank in ranks]
            receipts.append(self.desk.receipts(binding, figures, seen))
        return receipts

    def rpc(self, method: str, *args: Any) -> list[Any]:
        """Call a worker method on every rank, between two engine steps."""
        with self._turns:
            try:
                return list(self.llm.collective_rpc(method, args=args))
            except (ArtifactError, SteeringError):
                raise
            except Exception as error:
                raise SteeringError(
                    f"worker call {method} failed: {error}. If the method is unknown, the plugin "
                    "did not load: check that VLLM_PLUGINS is unset or names spo_steering"
                ) from error
