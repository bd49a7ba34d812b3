"""Two CUDA graphs for each batch size on vLLM's V2 runner: one steered, one plain vLLM's own.

vLLM keeps such twins for LoRA: a graph is chosen by batch size and by the number of active
adapters. Without LoRA that number is always 0, so steering takes it: 0 is captured while
`op.SWITCH` is off, when the operator launches nothing, and 1 while it is on. A step without a
steered request replays the first and pays nothing.
"""

from __future__ import annotations

from typing import Any

from spo.engines.vllm.plugin.op import Switch
from spo.errors import SteeringError


def can_twin(runner: Any, vllm_config: Any) -> bool:
    """Whether the number of adapters is free to take, on every rank alike."""
    return (
        hasattr(runner, "lora_capture_cases")
        and runner.lora_config is None
        and vllm_config.parallel_config.data_parallel_size == 1
    )


def twin_graphs(runner: Any, switch: Switch, layers: int) -> None:
    """Make the runner capture both graphs, and choose by `switch`.

    Args:
        runner: vLLM's V2 model runner, before its KV cache is initialised.
        switch: says what to capture and what to replay.
        layers: calls of the steering operator that a steered graph must contain.
    """
    runner.lora_capture_cases = [0, 1]
    initialize = runner.initialize_kv_cache

    def initialize_kv_cache(*args: Any, **kwargs: Any) -> Any:
        result = initialize(*args, **kwargs)
        if runner.cudagraph_manager is not None:
            twin_manager(runner.cudagraph_manager, switch, layers)
        return result

    runner.initialize_kv_cache = initialize_kv_cache


def twin_manager(manager: Any, switch: Switch, layers: int) -> None:
    """The same for one `ModelCudaGraphManager`."""
    capture, dispatch = manager.capture, manager.dispatch

    def capture_both(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("lora_capture_hook") is not None:
            raise SteeringError("steering and LoRA both want vLLM's graph twins; disable LoRA")
        before = CaptureWatch(switch, layers)
        try:
            result = capture(*args, **{**kwargs, "lora_capture_hook": before})
            before.check()
        finally:
            switch.on = False
        return result

    def dispatch_by_switch(*args: Any, **kwargs: Any) -> Any:
        return dispatch(*args, **{**kwargs, "num_active_loras": int(switch.on)})

    manager.capture, manager.dispatch = capture_both, dispatch_by_switch


class CaptureWatch:
    """vLLM calls this before it captures a graph; it turns the switch, and checks the one before.

    Raises:
        SteeringError: a graph that should steer was captured without the operator's kernels.
    """

    def __init__(self, switch: Switch, layers: int) -> None:
        self._switch = switch
        self._layers = layers
        self._launches: int | None = None

    def __call__(self, num_active_loras: int, num_reqs: int, num_tokens: int) -> None:
        self.check()
        self._switch.on = bool(num_active_loras)
        self._launches = self._switch.launches

    def check(self) -> None:
        """Look at what was captured since the last call."""
        if self._launches is None:
            return
        launched = self._switch.launches - self._launches
        least, most = (self._layers, None) if self._switch.on else (0, 0)
        if launched < least or (most is not None and launched > most):
            raise SteeringError(
                f"a CUDA graph was captured with {launched} steering kernels, expected "
                f"{'at least ' if most is None else ''}{least}; use vllm==0.32.* or start the "
                "engine with body='traced'"
            )


def count_graphs(runner: Any) -> dict[str, int]:
    """Captured graphs by mode: "FULL", "FULL steered", "PIECEWISE", "PIECEWISE steered"."""
    manager = getattr(runner, "cudagraph_manager", None)
    counts: dict[str, int] = {}
    if manager is None or not getattr(manager, "_graphs_captured", False):
        return counts
    for mode, descriptors in manager._capture_descs.items():
        for descriptor in descriptors:
            name = mode.name + (" steered" if descriptor.num_active_loras else "")
            if mode.name != "FULL" or descriptor in manager.graphs:
                counts[name] = counts.get(name, 0) + 1
    return counts
