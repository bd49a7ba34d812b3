"""Where a model runs: one slice for every stage; importable without torch and Ray.

A stage's own slice *is* one of these, so its keys are `engine.num_gpus`, `learn.dtype` and so on.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from spo.config.base import Labels, Positive, Slice

Dtype = Literal["auto", "bfloat16", "float16", "float32"]


class PlaceConfig(Slice):
    """Where a process of Ray runs."""

    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPU share of each process in Ray; 0 runs on the CPU."""
    labels: Labels = Field(default_factory=dict)

    @property
    def gpus(self) -> float:
        """Cards that one process holds, or its share of one; 0 on the CPU."""
        return self.num_gpus

    @property
    def device(self) -> str:
        """Kind of torch device."""
        return "cuda" if self.gpus else "cpu"

    def ray_options(self) -> dict[str, Any]:
        """Options of a Ray actor or task of one process, its CPUs aside."""
        return {"num_gpus": self.gpus, "label_selector": dict(self.labels)}


class ModelPlace(PlaceConfig):
    """Where a copy of the model runs, and in which numbers it computes.

    A copy on several cards lies on one node, whole cards only. In vLLM they are ranks of tensor
    parallelism; in Transformers each holds a run of decoder blocks (`spo.engines.hf.spread`).
    """

    dtype: Dtype = "auto"
    tensor_parallel_size: Positive = 1
    """Cards of one copy of the model; above 1 `num_gpus` must say the same, or for vLLM 0: ranks on
    a CPU."""

    @model_validator(mode="after")
    def _card_for_each_rank(self) -> ModelPlace:
        ranks = self.tensor_parallel_size
        if ranks == 1 or self.gpus == ranks or (self.gpus == 0 and self._ranks_on_cpu):
            return self
        raise ValueError(
            f"tensor_parallel_size={ranks} takes {ranks} whole cards for each process, got "
            f"{self.gpus:g}: set {self._gpu_setting.format(ranks=ranks)}, or "
            "tensor_parallel_size=1"
        )

    @property
    def _ranks_on_cpu(self) -> bool:
        """Whether several ranks make sense on a CPU."""
        return False

    @property
    def _gpu_setting(self) -> str:
        return "num_gpus={ranks}"

    @property
    def torch_devices(self) -> tuple[str, ...]:
        """Devices of a copy in Transformers, in a process that sees its own cards alone."""
        ranks = self.tensor_parallel_size
        return tuple(f"cuda:{rank}" for rank in range(ranks)) if ranks > 1 else (self.device,)

    @property
    def torch_dtype(self) -> str:
        """Name of the type that Transformers computes in."""
        return "float32" if self.dtype == "auto" else self.dtype


class EnginePlace(ModelPlace):
    """The same of a model that vLLM may hold."""

    backend: str
    max_model_len: Positive = 2048
    memory_gib: Annotated[float, Field(gt=0)] = 2.0
    """Cache memory of vLLM on a CPU; on a GPU it takes a share of the card's."""

    @property
    def _ranks_on_cpu(self) -> bool:
        return self.backend != "hf"

    def engine_arguments(self) -> dict[str, Any]:
        """Fields of `spo.engines.vllm.launch.VllmSettings` that follow from the place."""
        return {
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "kv_cache_gib": None if self.gpus else self.memory_gib,
            "tensor_parallel_size": self.tensor_parallel_size,
        }


class AttackPlace(Slice):
    """Where picture attacks run, those of the loop and those of the evaluation.

    What is None is as for the learner, which needs gradients too.
    """

    num_gpus: Annotated[float, Field(ge=0)] | None = None
    """GPU share of each attack; 0 runs on the CPU."""
    labels: Labels = Field(default_factory=dict)
    """None of the learner's: without them an attack runs on any node."""
    dtype: Literal["bfloat16", "float32"] | None = None
    tensor_parallel_size: Positive | None = None
    """Cards of one copy of the model; None with a `num_gpus` of its own: 1."""

    def beside(self, learner: ModelPlace) -> ModelPlace:
        """The place, filled up from the learner's; ValueError when that does not go together."""
        own = self.num_gpus is not None
        return ModelPlace(
            num_gpus=learner.gpus if self.num_gpus is None else self.num_gpus,
            labels=self.labels,
            dtype=self.dtype or learner.dtype,
            tensor_parallel_size=self.tensor_parallel_size
            or (1 if own else learner.tensor_parallel_size),
        )
