"""Configuration of one public data set: which format, where it lies, and how it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from spo.config.base import Positive, Slice
from spo.records import PromptFormat, PromptKind

DatasetFormat = Literal[
    "real_toxicity_prompts",
    "advbench",
    "harmbench",
    "jailbreakbench",
    "jailbreakv",
    "strongreject",
    "xstest",
    "figstep",
    "mm_safetybench",
    "vlguard",
    "captions",
    "mmbench",
    "mmvet",
    "prompts",
    "table",
    "hub",
]

VARIANTS: Mapping[str, tuple[str, ...]] = {
    "real_toxicity_prompts": ("prompt", "full"),
    "figstep": ("typographic", "text"),
    "mm_safetybench": ("SD_TYPO", "SD", "TYPO", "text"),
}
"""Variants of a format, the default first."""

_MAPPED = ("table", "hub")


class DatasetConfig(Slice):
    """One data set on disk or on the hub."""

    format: DatasetFormat
    """`table` is a CSV, TSV, JSON, JSONL, Parquet or text file with `columns` of your own, `hub` a
    `datasets` id or a local folder in hub layout, `prompts` this project's own JSONL."""
    path: str
    """File; folder of JSON or Parquet files (`mm_safetybench`, `table`); id or folder (`hub`)."""
    images: Path | None = None
    """Folder of the pictures; None looks beside the file."""
    variant: str | None = None
    """`real_toxicity_prompts`: "prompt" (default) or "full" (with its continuation).
    `figstep`: "typographic" (default) or "text".
    `mm_safetybench`: "SD_TYPO" (default), "SD", "TYPO" or "text"."""
    select: PromptKind | None = None
    """Keep rows of this kind only."""
    kind: PromptKind | None = None
    """Kind of every row of `table`, `hub` and `jailbreakbench`, where the rows do not say it."""
    rows: Positive | None = None
    """At most this many rows of each kind, drawn with the run's seed; None takes all."""
    layout: PromptFormat | None = None
    """"chat" or "plain"; None takes the format's own."""
    columns: Mapping[str, str] = {}
    """For `table` and `hub`: our field (text, id, image, category, reference, label) to the name
    of the column, e.g. {text: question, label: is_safe}."""
    harm_labels: tuple[str, ...] = ()
    """Values of the label column that mean harm; all others are benign."""
    subset: str | None = None
    """`hub`: name of the data set's configuration."""
    split: str = "train"
    """`hub`: split."""
    revision: str | None = None
    """`hub`: revision."""
    skip_missing_images: bool = False
    """Leave out rows whose picture is not there, instead of refusing the data set."""

    @model_validator(mode="after")
    def _fits_the_format(self) -> DatasetConfig:
        allowed = VARIANTS.get(self.format, ())
        if self.variant is not None and self.variant not in allowed:
            raise ValueError(f"variant of {self.format!r} must be one of {list(allowed)}")
        mapped = self.format in _MAPPED
        if self.columns and not mapped:
            raise ValueError("'columns' goes with the formats table and hub only")
        if mapped and ("label" in self.columns) != bool(self.harm_labels):
            raise ValueError("columns.label and harm_labels go together")
        if mapped and not self.harm_labels and self.kind is None:
            raise ValueError("say the kind of the rows: kind=harm, kind=benign, or a label column")
        unknown = set(self.columns) - {"text", "id", "image", "category", "reference", "label"}
        if unknown:
            raise ValueError(f"columns has unknown fields {sorted(unknown)}")
        return self
