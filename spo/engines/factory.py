"""Opens the engine that a configuration names. Heavy libraries load only when they are chosen."""

from __future__ import annotations

from spo.config import EngineConfig, LearnConfig
from spo.engines.base import Engine
from spo.engines.forward import DifferentiableEngine
from spo.engines.identity import is_shape


def open_engine(
    model: str,
    revision: str | None,
    config: EngineConfig,
    *,
    seed: int = 0,
    capture_rows: int | None = None,
) -> Engine:
    """Load a model into the configured backend.

    Args:
        model: local folder or hub id; ignored by the fake backend.
        revision: hub revision.
        config: engine settings.
        seed: seed of the engine's own random numbers.
        capture_rows: `vllm`: sequences whose activations it reads at once; None: some on a CPU,
            and on a GPU no capture in the graph.
    """
    if config.backend == "fake":
        from spo.engines.fake import FakeEngine

        return FakeEngine()
    if config.backend == "hf":
        from spo.engines.hf.engine import HfEngine

        dtype = "float32" if config.dtype == "auto" else config.dtype
        device = "cuda" if config.num_gpus else "cpu"
        return HfEngine(
            model, revision=revision, dtype=dtype, device=device, batch_size=config.max_num_seqs
        )
    from spo.engines.vllm.engine import VllmEngine

    return VllmEngine(
        model,
        revision=revision,
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        kv_cache_gib=None if config.num_gpus else config.memory_gib,
        gpu_memory_utilization=config.gpu_memory_utilization,
        in_process=config.in_process,
        slots=config.slots,
        capture_rows=capture_rows,
        engine_options={"load_format": "dummy"} if is_shape(model) else {},
        seed=seed,
    )


def open_learner_engine(
    model: str, revision: str | None, config: LearnConfig
) -> DifferentiableEngine:
    """Load a model for learning, on the device that the configuration names.

    Args:
        model: local folder or hub id, or "fake".
        revision: hub revision.
        config: learner settings.
    """
    if model == "fake":
        from spo.engines.fake import FakeEngine

        return FakeEngine()
    from spo.engines.hf.engine import HfEngine

    return HfEngine(
        model,
        revision=revision,
        dtype=config.dtype,
        device="cuda" if config.use_gpu else "cpu",
        compiled_scores=config.compile,
    )
