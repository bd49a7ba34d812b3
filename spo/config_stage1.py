"""Configuration of Stage I: sources of contrasts, extraction, estimation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from spo.config_base import Fraction, Positive, Slice


class SourceConfig(Slice):
    """One contrast of Stage I."""

    kind: Literal["continuation", "instruction", "typographic", "file"]
    """`continuation`: toxic against clean text; `instruction`: harmful against harmless openings;
    `typographic`: the words in the picture against a plain picture; `file`: your own pairs."""
    rows: Positive = 300
    """Rows on each side."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    path: Path | None = None
    """JSONL with fields id, text, side ("harm" or "safe"), and optionally image; for `file`."""

    @model_validator(mode="after")
    def _path_fits_kind(self) -> SourceConfig:
        if (self.kind == "file") != (self.path is not None):
            raise ValueError("'path' goes with kind 'file' and with no other kind")
        return self


class ExtractConfig(Slice):
    """Activation extraction with Ray Data."""

    sources: tuple[SourceConfig, ...] = (
        SourceConfig(kind="continuation"),
        SourceConfig(kind="instruction"),
        SourceConfig(kind="typographic", rows=100),
    )
    calibration_rows: Positive = 64
    """Benign generations behind the calibration activation h0 and the mean norms."""
    layers: tuple[int, ...] | None = None
    """Decoder blocks to read; None reads all."""
    workers: Positive = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPU share of each worker; 0 runs on the CPU."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    batch_size: Positive = 32


class EstimateConfig(Slice):
    """Stage I: from activations to a vector."""

    method: Literal["mean_difference"] = "mean_difference"
    layers: tuple[int, ...] | None = None
    """Steered blocks; None chooses the `num_layers` with the best held-out separability."""
    num_layers: Positive = 5
    depth_window: tuple[Fraction, Fraction] = (0.25, 0.75)
    """Share of the model's depth in which layers are chosen automatically."""
    holdout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.3
