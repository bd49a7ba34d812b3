"""Opens the engine that a configuration names. Heavy libraries load only when they are chosen."""

from __future__ import annotations

from collections.abc import Sequence

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

        return HfEngine(
            model,
            revision=revision,
            dtype=config.torch_dtype,
            device=config.torch_devices,
            batch_size=config.max_num_seqs,
        )
    from spo.engines.vllm.engine import VllmEngine

    return VllmEngine(
        model,
        revision=revision,
        **config.engine_arguments(),
        in_process=config.in_process,
        slots=config.slots,
        capture_rows=capture_rows,
        engine_options={"load_format": "dummy"} if is_shape(model) else {},
        seed=seed,
    )


def open_learner_engine(
    model: str, revision: str | None, config: LearnConfig, devices: Sequence[str] = ()
) -> DifferentiableEngine:
    """Load a model for learning, on the devices that the configuration names.

    Args:
        model: local folder or hub id, or "fake".
        revision: hub revision.
        config: learner settings.
        devices: this process's own cards, where it sees those of others too.
    """
    if model == "fake":
        from spo.engines.fake import FakeEngine

        return FakeEngine()
    from spo.engines.hf.engine import HfEngine

    return HfEngine(
        model,
        revision=revision,
        dtype=config.torch_dtype,
        device=devices or config.torch_devices,
        compiled_scores=config.compile,
    )
