"""Configuration of Stage I: sources of contrasts, extraction, estimation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from spo import plugins
from spo.config.base import Fraction, Positive, Slice
from spo.config.datasets import DatasetConfig
from spo.config.place import EnginePlace
from spo.records import Positions


class _Source(Slice):
    """What every source has."""

    name: str = ""
    """Name in tables; "" takes the kind. Two sources of one kind need names."""
    rows: Positive = 300
    """Rows on each side."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight in the combination, before it is multiplied by the measured reliability."""
    positions: Positions | None = None
    """Tokens to pool over; None takes the kind's own."""

    @property
    def label(self) -> str:
        """Name of the source."""
        return self.name or str(getattr(self, "kind", ""))


class _TwoSides(_Source):
    harm: DatasetConfig | None = None
    """Harmful side; None takes the embedded testbed for both sides."""
    safe: DatasetConfig | None = None

    @model_validator(mode="after")
    def _both_or_none(self) -> _TwoSides:
        if (self.harm is None) != (self.safe is None):
            raise ValueError("give both 'harm' and 'safe', or neither (the embedded testbed)")
        return self


class InstructionSource(_TwoSides):
    """Harmful against harmless instructions, at the last prompt token."""

    kind: Literal["instruction"] = "instruction"


class ContinuationSource(_TwoSides):
    """Toxic against clean text, mean of all text tokens."""

    kind: Literal["continuation"] = "continuation"


class TypographicSource(_TwoSides):
    """Harmful words in the picture against harmless ones, at the last prompt token.

    A data set's own pictures are used where it has some; else its text is drawn into a picture.
    """

    kind: Literal["typographic"] = "typographic"
    rows: Positive = 100
    request: str = "Follow the instruction in the picture."
    """The user's text beside a drawn picture."""
    picture_size: Positive = 336
    """Side of a drawn picture in pixels."""


class _Attacked(_Source):
    """Sources that first make white-box PGD pictures of the model under defence."""

    rows: Positive = 64
    pictures: Positive = 4
    """Adversarial pictures; rows are pairs of a picture and a prompt."""
    images: DatasetConfig | None = None
    """Clean pictures to start from (format `captions`); None draws scenes of the testbed."""
    prompts: DatasetConfig | None = None
    """Harmful prompts the pictures are made for; None takes the testbed's."""
    targets: Path | None = None
    """Harmful sentences, one a line, whose likelihood is raised; None takes the testbed's."""
    epsilon_255: Annotated[float, Field(gt=0, le=255)] = 32.0
    """L-infinity bound in units of 1/255."""
    steps: Positive = 40
    step_size_255: Annotated[float, Field(gt=0)] = 4.0
    targets_per_step: Positive = 8
    timeout_s: Positive = 3600


class AdversarialSource(_Attacked):
    """The attacked picture against its benign twin, beside the same prompt."""

    kind: Literal["adversarial"] = "adversarial"


class AttributionSource(_Attacked):
    """ASTRA (arXiv 2411.16721): the attacked picture against itself without its worst patches."""

    kind: Literal["attribution"] = "attribution"
    ablations: Positive = 96
    """Random masks of each picture."""
    patches: Positive = 7
    """Patches on a side: the picture is cut into patches x patches."""
    top_k: Positive = 15
    """Patches masked at most; only those that raise the harmful answer's likelihood count."""
    keep_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of patches that a random mask keeps."""
    penalty: Annotated[float, Field(ge=0)] = 0.01
    """L1 penalty of the sparse linear surrogate, on standardised masks and scores."""
    answer: str = "Sure, "
    """The answer whose likelihood is attributed."""


class FileSource(_Source):
    """Your own pairs."""

    kind: Literal["file"] = "file"
    path: Path
    """JSONL with fields id, text, side ("harm" or "safe"), and optionally image."""

    @property
    def label(self) -> str:
        """Name of the source: the file's, if it has no other."""
        return self.name or self.path.stem


SourceConfig = Annotated[
    InstructionSource
    | ContinuationSource
    | TypographicSource
    | AdversarialSource
    | AttributionSource
    | FileSource,
    Field(discriminator="kind"),
]


class ExtractConfig(EnginePlace):
    """Activation extraction with Ray Data; each worker holds a copy of the model."""

    sources: tuple[SourceConfig, ...] = (
        ContinuationSource(),
        InstructionSource(),
        TypographicSource(),
    )
    calibration_rows: Positive = 64
    """Benign generations behind the calibration activation h0 and the mean norms."""
    calibration: Path | None = None
    """Prompts (JSONL of `spo.records.Prompt`) whose benign ones are generated from for it. None
    takes the safe side of your own contrasts, or else the benign prompts of `data.train`; a run on
    the testbed alone takes the testbed's."""
    layers: tuple[int, ...] | None = None
    """Decoder blocks to read; None reads all. Computation stops after the highest."""
    backend: Literal["hf", "vllm"] = "hf"
    """`hf` is exact and stops early; `vllm` reads through the engine's capture op."""
    workers: Positive = 1
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Computation type."""
    storage: Literal["float16", "bfloat16"] = "float16"
    """Type on disk; a row that does not fit float16 is set aside with the reason."""
    batch_size: Positive = 32
    compile: bool = True
    """`hf` on a GPU: compile the decoder blocks. Half a minute at the start, then faster."""
    rows_per_block: Positive = 128
    """Rows of one written file: what a killed worker loses at most."""
    stall_timeout_s: Positive = 1800
    """Without any finished block for this long, the extraction fails."""
    max_model_len: Positive = 2048
    """`vllm`: longest row in tokens."""


class EstimateConfig(Slice):
    """Stage I: from activations to a vector."""

    method: Annotated[str, AfterValidator(plugins.checked(plugins.ESTIMATORS))] = "mean_difference"
    """A built-in estimator (`spo.algorithms.estimators`) or one that another package adds."""
    layers: tuple[int, ...] | None = None
    """Steered blocks; None chooses the `num_layers` with the best held-out separability."""
    num_layers: Positive = 5
    depth_window: tuple[Fraction, Fraction] = (0.25, 0.75)
    """Share of the model's depth in which layers are chosen automatically."""
    holdout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.3
    passes: Positive = 12
    """`pca`, `linear_probe`: sweeps over the data."""
    shrinkage: Annotated[float, Field(gt=0)] = 0.1
    """`linear_probe`: ridge penalty relative to the mean variance of a hidden unit."""
