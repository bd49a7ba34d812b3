"""Entry point `vllm.general_plugins`: hooks the worker wrapper, cheaply and only once.

Importing this module loads neither torch nor vLLM. `register` patches two methods, which run vLLM's
own and then look for `additional_config["spo_steering"]`; without it nothing else happens.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Sequence
from typing import Any

from spo.engines.vllm.plugin.wire import CONFIG_KEY, PluginConfig, op_version
from spo.errors import EngineError, SteeringError

_ENTRY_POINT = "spo_steering"

_MARK = "_spo_steering_registered"


def register() -> None:
    """Make vLLM's workers able to steer. May be called any number of times, in every process."""
    from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase

    if getattr(WorkerWrapperBase, _MARK, False):
        return
    init_device = WorkerWrapperBase.init_device

    @functools.wraps(init_device)
    def init_device_then_prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = init_device(self, *args, **kwargs)
        wire = (self.vllm_config.additional_config or {}).get(CONFIG_KEY)
        if wire is not None:
            _steer_after_load(self.worker, self.vllm_config, PluginConfig.from_wire(wire))
        return result

    WorkerWrapperBase.init_device = init_device_then_prepare
    _salt_compile_cache()
    for method in (spo_publish, spo_receipts, spo_captures, spo_describe):
        setattr(WorkerBase, method.__name__, method)
    setattr(WorkerWrapperBase, _MARK, True)


def _salt_compile_cache() -> None:
    """Put into vLLM's compile-cache key that this code was really there.

    `additional_config` alone is part of the key even in a process in which the plugin did not load
    (not installed, VLLM_PLUGINS): that process would store unsteered graphs under the steered key.
    """
    from vllm.config.vllm import VllmConfig

    compute_hash = VllmConfig.compute_hash

    @functools.wraps(compute_hash)
    def compute_salted_hash(self: Any, *args: Any, **kwargs: Any) -> str:
        base = str(compute_hash(self, *args, **kwargs))
        if CONFIG_KEY not in (self.additional_config or {}):
            return base
        return hashlib.sha256(f"{base} {op_version()}".encode()).hexdigest()[: len(base)]

    VllmConfig.compute_hash = compute_salted_hash


def check_entry_point() -> None:
    """Raise EngineError, before anything heavy, where vLLM would not find the plugin."""
    group = importlib.metadata.entry_points(group="vllm.general_plugins")
    if not any(f"{entry.value}" == f"{__name__}:{register.__name__}" for entry in group):
        raise EngineError(
            "vLLM would not load the steering plugin: no installed package declares the entry "
            f"point {_ENTRY_POINT!r} of group 'vllm.general_plugins' (found "
            f"{sorted(entry.name for entry in group)}); install this one, e.g. `uv pip install -e "
            ".`: a source folder on PYTHONPATH is not enough"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and _ENTRY_POINT not in allowed.split(","):
        raise EngineError(
            f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading the steering plugin; unset it or "
            f"add {_ENTRY_POINT!r}"
        )


def _steer_after_load(worker: Any, vllm_config: Any, config: PluginConfig) -> None:
    """Install the tables between loading the weights and the profiling run."""
    runner = worker.model_runner
    load_model = runner.load_model

    @functools.wraps(load_model)
    def load_then_install(*args: Any, **kwargs: Any) -> Any:
        from spo.engines.vllm.plugin.worker import WorkerSteering

        result = load_model(*args, **kwargs)
        worker.spo_steering = WorkerSteering(runner, vllm_config, config)
        return result

    runner.load_model = load_then_install


def _steering(worker: Any) -> Any:
    steering = getattr(worker, "spo_steering", None)
    if steering is None:
        raise SteeringError(
            "this vLLM worker has no steering: start the engine with "
            f"additional_config={{{CONFIG_KEY!r}: ...}} (VllmEngine does)"
        )
    return steering


def spo_publish(self: Any, slot: int, data: bytes) -> str:
    """RPC: write a vector (bytes of `SteeringVector.to_bytes`) into a slot; returns its hash."""
    return str(_steering(self).publish(slot, bytes(data)))


def spo_receipts(self: Any, keys: Sequence[str], keep: bool = False) -> str:
    """RPC: JSON list of what was applied to each request; `keep` only looks."""
    return json.dumps(_steering(self).router.receipts(list(keys), keep))


def spo_captures(self: Any, rows: Sequence[int]) -> bytes:
    """RPC: pooled sums of capture rows, then cleared; see `WorkerSteering.take_captures`."""
    return bytes(_steering(self).take_captures(list(rows)))


def spo_describe(self: Any) -> str:
    """RPC: JSON with what is installed: layers, hidden size, runner, compiled-in configuration."""
    return json.dumps(_steering(self).describe())
