"""Starting and stopping vLLM, with or without steering."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spo.engines.vllm.plugin.install import check_entry_point
from spo.engines.vllm.plugin.wire import CONFIG_KEY, PluginConfig, op_version
from spo.errors import EngineError
from spo.records import Operator

_GIB = 1 << 30
_BINDING = "VLLM_CPU_OMP_THREADS_BIND"


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
    body: str = "kernel"
    """Form of the operator: "kernel" (an idle step is free) or "traced" (fused by Inductor)."""
    max_dose: float = 8.0
    """Largest dose relative to the hidden norm that a request may ask for."""
    max_model_len: int = 2048
    max_num_seqs: int = 64
    kv_cache_gib: float | None = None
    """Cache memory; None lets vLLM choose from `gpu_memory_utilization`."""
    gpu_memory_utilization: float | None = None
    tensor_parallel_size: int = 1
    enforce_eager: bool | None = None
    """No compilation; None: so on a CPU, where it starts a minute sooner and is 15 % slower."""
    in_process: bool | None = None
    """Run the engine core in this process; None: so on a CPU without tensor parallelism, where it
    starts 40 seconds sooner."""
    seed: int = 0
    engine_options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `vllm.LLM`, e.g. {"load_format": "dummy"}."""


def plugin_config(settings: VllmSettings) -> PluginConfig:
    """What these settings compile into the engine."""
    rows = settings.capture_rows
    if rows is None:
        rows = 64 if on_cpu() else 0
    return PluginConfig(
        slots=settings.slots,
        lanes=settings.lanes,
        operators=settings.operators,
        capture_rows=rows,
        body=settings.body,
        version=op_version(),
    )


def engine_arguments(settings: VllmSettings, config: PluginConfig | None) -> dict[str, Any]:
    """vLLM's engine arguments; with `config` its workers can steer, without it is plain vLLM."""
    options: dict[str, Any] = {
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enforce_eager": on_cpu() if settings.enforce_eager is None else settings.enforce_eager,
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
    options |= settings.engine_options
    if options["tensor_parallel_size"] > 1:
        # Not Ray's executor, which vLLM takes inside a placement group: the cards of this process.
        options.setdefault("distributed_executor_backend", "mp")
    return options


def start_llm(
    model: str, revision: str | None, settings: VllmSettings, config: PluginConfig | None
) -> Any:
    """A `vllm.LLM`.

    Raises:
        EngineError: vLLM does not start; the cause is in its log above.
    """
    if config is not None:
        check_entry_point()
    options = engine_arguments(settings, config)
    ranks = options["tensor_parallel_size"]
    inside = settings.in_process
    if inside is None:
        inside = on_cpu() and ranks == 1
    if inside:
        options["distributed_executor_backend"] = "uni"
    from vllm import LLM

    with _start_errors(model), _environment(inside=inside, ranks=ranks):
        return LLM(model, revision=revision, **options)


def start_async_llm(
    model: str, revision: str | None, settings: VllmSettings, config: PluginConfig
) -> Any:
    """A `vllm.v1.engine.async_llm.AsyncLLM`, its core in a process of its own.

    Raises:
        EngineError: vLLM does not start; the cause is in its log above.
    """
    check_entry_point()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    # With the cache of rendered pictures on, requests must reach the core in the order in which
    # they were rendered (`VllmSession._enter`); tasks of an event loop cannot promise that.
    options = {"mm_processor_cache_gb": 0, **engine_arguments(settings, config)}
    ranks = options["tensor_parallel_size"]
    with _start_errors(model), _environment(inside=False, ranks=ranks):
        arguments = AsyncEngineArgs(model=model, revision=revision, **options)
        return AsyncLLM.from_engine_args(arguments)


@contextmanager
def _start_errors(model: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        raise EngineError(
            f"vLLM cannot start {model!r}: {error}. Its own log above names the cause"
        ) from error


def stop_llm(llm: Any) -> None:
    """End a `vllm.LLM`, so that this process can start another one."""
    core = llm.llm_engine.engine_core
    core.shutdown()
    if type(core).__name__ == "InprocClient":
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


@contextmanager
def _environment(*, inside: bool, ranks: int) -> Iterator[None]:
    """What vLLM and the processes that it starts read from the environment.

    Args:
        inside: its core works in this process.
        ranks: processes that hold a part of the model.
    """
    wanted = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0" if inside else "1"}
    if on_cpu() and ranks > _memory_nodes() and _BINDING not in os.environ:
        wanted[_BINDING] = "nobind"
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _memory_nodes() -> int:
    """NUMA nodes of this machine; vLLM binds each rank to one of its own, or refuses to start."""
    return max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))))


def on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())
