"""The worker's side: finds the decoder layers, owns the tables, and feeds the router each step.

One `WorkerSteering` per vLLM worker, made right after the weights are loaded and before the
profiling run compiles the graph. Everything that cannot be served raises `SteeringError` here, at
start, rather than answering unsteered later.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spo.algorithms.positions import Span
from spo.engines.vllm.plugin.cpu_seeds import make_rewindable, mark_generators
from spo.engines.vllm.plugin.graphs import can_twin, count_graphs, twin_graphs
from spo.engines.vllm.plugin.op import SWITCH, LayerTables, Selection, after_layer
from spo.engines.vllm.plugin.routing import Router, StepPlan
from spo.engines.vllm.plugin.wire import PluginConfig, op_version
from spo.errors import SteeringError
from spo.vector import SteeringVector


def check_supported(vllm_config: Any) -> None:
    """Raise SteeringError for set-ups in which steering would be wrong or absent."""
    parallel = vllm_config.parallel_config
    passes = vllm_config.compilation_config.pass_config
    refusals = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "dual-batch overlap (ubatching)": parallel.use_ubatching,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "decode context parallelism": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "sequence parallelism": bool(getattr(passes, "enable_sp", False)),
        "speculative decoding": vllm_config.speculative_config is not None,
        "an encoder-decoder model": bool(vllm_config.model_config.is_encoder_decoder),
        "sleep mode": bool(vllm_config.model_config.enable_sleep_mode),
        "fast prefill over shared KV": bool(vllm_config.cache_config.kv_sharing_fast_prefill),
    }
    refused = [name for name, present in refusals.items() if present]
    if refused:
        raise SteeringError(
            f"steering does not work with {', '.join(refused)}; start the engine without, or "
            "without spo_steering"
        )


def find_layers(model: nn.Module, expected: int) -> list[nn.Module]:
    """The decoder layers in order: the one module list of `expected` children with attention.

    Raises:
        SteeringError: no list or several lists fit.
    """
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    found: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == expected:
            layers = list(module)
            if all(any(isinstance(m, AttentionLayerBase) for m in x.modules()) for x in layers):
                found[name] = layers
    if len(found) != 1:
        raise SteeringError(
            f"expected one list of {expected} decoder layers with attention in "
            f"{type(model).__name__}, found {sorted(found)}; this architecture is not supported"
        )
    return next(iter(found.values()))


class WorkerSteering:
    """Tables, router and hooks of one worker.

    Args:
        runner: vLLM's model runner (V1 or V2), weights loaded.
        vllm_config: the engine's configuration.
        config: what is compiled in.
    """

    def __init__(self, runner: Any, vllm_config: Any, config: PluginConfig) -> None:
        if config.version != op_version():
            raise SteeringError(
                f"the engine was asked for steering code {config.version!r} and this worker has "
                f"{op_version()!r}; install the same version of spo on every node"
            )
        check_supported(vllm_config)
        self.config = config
        text = vllm_config.model_config.hf_text_config
        self.layers = find_layers(runner.model, text.num_hidden_layers)
        self.hidden_size = int(text.hidden_size)
        self.device: torch.device = runner.device
        self.steps: Counter[str] = Counter()
        """Model steps by CUDA graph mode, steered ones apart; for reports."""
        tokens = _max_tokens(vllm_config)
        self.router = Router(lanes=config.lanes, max_tokens=tokens)
        count, rows = len(self.layers), config.slots + 1
        zeros = torch.zeros
        self.tables = LayerTables(
            directions=zeros(count, rows, self.hidden_size, device=self.device),
            calibration=zeros(
                (count, rows, self.hidden_size) if config.gated else (count, 1, 1),
                device=self.device,
            ),
            scales=zeros(count, rows, 2, device=self.device),
        )
        self.plan = zeros(tokens, 3, config.lanes, dtype=torch.int32, device=self.device)
        self.segments = zeros(tokens, dtype=torch.int32, device=self.device)
        pool_rows = config.capture_rows + 1 if config.capture_rows else 0
        self.pool = zeros(count, pool_rows, self.hidden_size + 1, device=self.device)
        for number, layer in enumerate(self.layers):
            self._attach(number, layer)
        self._runner = runner
        self.twins = _follow(runner, self, vllm_config)

    def _attach(self, number: int, layer: Any) -> None:
        layer.spo_gated = self.config.gated
        layer.spo_capture = bool(self.config.capture_rows)
        layer.spo_traced = self.config.body == "traced"
        # Buffers, so that the compiler lifts them to graph inputs instead of baking them in.
        for name, tensor in (
            ("spo_directions", self.tables.directions[number]),
            ("spo_calibration", self.tables.calibration[number]),
            ("spo_scales", self.tables.scales[number]),
            ("spo_plan", self.plan),
            ("spo_segments", self.segments),
            ("spo_pool", self.pool[number]),
        ):
            layer.register_buffer(name, tensor, persistent=False)
        layer.register_forward_hook(after_layer)

    def publish(self, slot: int, data: bytes) -> str:
        """Write a vector into a slot; returns the hash of what was parsed from the bytes."""
        if not 1 <= slot <= self.config.slots:
            raise SteeringError(f"slot must lie in 1..{self.config.slots}, got {slot}")
        vector = SteeringVector.from_bytes(data)
        vector.check_fits(hidden_size=self.hidden_size, num_layers=len(self.layers))
        self.router.slot_hashes.pop(slot, None)
        self.tables.write(slot, vector)
        self.router.slot_hashes[slot] = vector.sha256
        return vector.sha256

    def admit(self, request: Any) -> None:
        """Register vLLM's NewRequestData."""
        params = request.sampling_params
        if params is None or not params.extra_args or request.prompt_token_ids is None:
            return
        spans = [span for feature in request.mm_features for span in image_runs(feature)]
        self.router.admit(request.req_id, params.extra_args, len(request.prompt_token_ids), spans)

    def step(
        self,
        request_ids: Sequence[str],
        computed: np.ndarray[Any, Any],
        starts: np.ndarray[Any, Any],
    ) -> None:
        """Bring the device buffers up to date for one step."""
        plan = self.router.step(request_ids, computed, starts)
        if plan is not None:
            self._copy(plan)
        if self.device.type == "cpu":
            SWITCH.selection = Selection.of(self.plan[: int(starts[len(request_ids)])])
        if self.router.live and not SWITCH.on:
            raise SteeringError(
                "a step with steered tokens was about to run without steering; nothing was "
                "generated. Use vllm==0.32.* or start the engine with body='traced'"
            )

    def expect(self, request_ids: Iterable[str]) -> None:
        """Turn steering on for a step that has a steered or captured request, else off."""
        SWITCH.on = self.router.concerns(request_ids)

    def describe(self) -> dict[str, Any]:
        """What is installed, as plain JSON types."""
        return {
            "layers": len(self.layers),
            "hidden_size": self.hidden_size,
            "layer_class": type(self.layers[0]).__name__,
            "runner": f"{type(self._runner).__module__}.{type(self._runner).__name__}",
            "device": str(self.device),
            "config": self.config.to_wire(),
            "twin_graphs": self.twins,
            "graphs": count_graphs(self._runner),
            "steps": dict(self.steps),
        }

    def _copy(self, plan: StepPlan) -> None:
        _to_device(plan.plan, self.plan[: plan.tokens])
        if self.config.capture_rows:
            _to_device(plan.segments, self.segments[: plan.tokens])

    def take_captures(self, rows: Sequence[int]) -> bytes:
        """(rows, layers, hidden + 1) float32 sums over the pooled tokens, then zeroed.

        The last column is the sum of hidden norms.
        """
        index = torch.tensor(list(rows), device=self.device)
        sums = self.pool[:, index].transpose(0, 1).contiguous().cpu()
        self.pool.zero_()
        return sums.numpy().tobytes()


def image_runs(feature: Any) -> list[Span]:
    """Spans of one picture's embedded tokens, from vLLM's MultiModalFeatureSpec."""
    place = feature.mm_position
    if place.is_embed is None:
        return [(int(place.offset), int(place.length))]
    mask = np.concatenate([[False], np.asarray(place.is_embed, dtype=bool), [False]])
    edges = np.flatnonzero(mask[1:] != mask[:-1])
    return [
        (int(place.offset + start), int(end - start))
        for start, end in zip(edges[::2], edges[1::2], strict=True)
    ]


def _max_tokens(vllm_config: Any) -> int:
    sizes = vllm_config.compilation_config.cudagraph_capture_sizes or [0]
    return int(max(vllm_config.scheduler_config.max_num_batched_tokens, *sizes, 1))


def _to_device(source: np.ndarray[Any, Any], target: Tensor) -> None:
    tensor = torch.from_numpy(source)
    if target.device.type == "cpu":
        target.copy_(tensor)
    else:
        # A fresh pinned copy: the router reuses its arrays before the device has read them.
        target.copy_(torch.empty_like(tensor, pin_memory=True).copy_(tensor), non_blocking=True)


def _follow(runner: Any, steering: WorkerSteering, vllm_config: Any) -> bool:
    """Call `steering` from the runner's own steps; raises when the seams are not as known.

    Returns:
        Whether idle steps have CUDA graphs of their own.
    """
    if hasattr(runner, "prepare_inputs") and hasattr(runner, "add_requests"):
        _follow_v2(runner, steering)
        twins = steering.config.body == "kernel" and can_twin(runner, vllm_config)
        if twins:
            twin_graphs(runner, SWITCH, len(steering.layers))
        else:
            _always_on(steering)
        return twins
    if hasattr(runner, "_prepare_inputs") and hasattr(runner, "_update_states"):
        _follow_v1(runner, steering)
        if steering.device.type != "cpu":
            _always_on(steering)
        return False
    raise SteeringError(
        f"{type(runner).__name__} is neither vLLM's V1 nor V2 model runner as of 0.32; "
        "use vllm==0.32.*"
    )


def _always_on(steering: WorkerSteering) -> None:
    """One graph for all steps: the operator looks at every token's row instead."""
    SWITCH.on = True

    def keep_on(request_ids: Iterable[str]) -> None:
        SWITCH.on = True

    steering.expect = keep_on  # type: ignore[method-assign]


def _check_seam(method: Callable[..., Any], first: str) -> None:
    names = list(inspect.signature(method).parameters)
    if not names or names[0] != first:
        raise SteeringError(
            f"{method.__qualname__} takes {names}, expected {first!r} first; use vllm==0.32.*"
        )


def _follow_v1(runner: Any, steering: WorkerSteering) -> None:
    update, prepare = runner._update_states, runner._prepare_inputs
    _check_seam(update, "scheduler_output")
    _check_seam(prepare, "scheduler_output")
    on_cpu = steering.device.type == "cpu"

    def update_states(scheduler_output: Any) -> Any:
        steering.router.finish(scheduler_output.finished_req_ids)
        for request in scheduler_output.scheduled_new_reqs:
            steering.admit(request)
        result = update(scheduler_output)
        if on_cpu:
            for request in scheduler_output.scheduled_new_reqs:
                make_rewindable(runner, request.req_id)
        return result

    def prepare_inputs(scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        result = prepare(scheduler_output, num_scheduled_tokens)
        batch = runner.input_batch
        steering.expect(batch.req_ids)
        if not steering.router.quiet:
            starts = np.concatenate([[0], np.cumsum(num_scheduled_tokens)])
            steering.step(batch.req_ids, batch.num_computed_tokens_cpu[: batch.num_reqs], starts)
        if on_cpu and batch.generators:
            computed = batch.num_computed_tokens_cpu[: batch.num_reqs] + num_scheduled_tokens
            if (computed < batch.num_prompt_tokens[: batch.num_reqs]).any():
                mark_generators(runner)
        return result

    runner._update_states = update_states
    runner._prepare_inputs = prepare_inputs


def _follow_v2(runner: Any, steering: WorkerSteering) -> None:
    add, finish, prepare = runner.add_requests, runner.finish_requests, runner.prepare_inputs
    gather = runner.gather_batch_req_state
    for method in (add, finish, prepare, gather):
        _check_seam(method, "scheduler_output")

    def add_requests(scheduler_output: Any) -> None:
        add(scheduler_output)
        for request in scheduler_output.scheduled_new_reqs:
            steering.admit(request)

    def finish_requests(scheduler_output: Any) -> None:
        finish(scheduler_output)
        steering.router.finish(scheduler_output.finished_req_ids)

    def gather_batch_req_state(scheduler_output: Any, dummy_run: bool) -> Any:
        # The first thing of a step that knows its requests, just before the graph is chosen.
        steering.expect(() if dummy_run else scheduler_output.num_scheduled_tokens)
        return gather(scheduler_output, dummy_run)

    def prepare_inputs(scheduler_output: Any, state: Any, description: Any, loras: int) -> Any:
        batch = prepare(scheduler_output, state, description, loras)
        mode = description.cg_mode.name
        if steering.twins and mode != "NONE" and bool(description.num_active_loras) != SWITCH.on:
            raise SteeringError(
                f"vLLM chose a graph ({description}) that does not match steering="
                f"{SWITCH.on}; nothing was generated. Use vllm==0.32.*"
            )
        steering.steps[mode + (" steered" if SWITCH.on else "")] += 1
        if not steering.router.quiet:
            steering.step(batch.req_ids, batch.num_computed_tokens_np, batch.query_start_loc_np)
        return batch

    runner.add_requests = add_requests
    runner.finish_requests = finish_requests
    runner.gather_batch_req_state = gather_batch_req_state
    runner.prepare_inputs = prepare_inputs
