"""`SteeringVector`, and the conventions of the whole project, written once.

* **Layer** `l` is the output of decoder block `l`, zero-based: Hugging Face `hidden_states[l + 1]`,
  and in vLLM `hidden_states + residual` after block `l` (site `resid_post`).
* **Sign**: a direction points towards *harm*; operators subtract, so a positive coefficient removes
  harm.
* **Units**: directions are in activation units. An estimator gives layer `l` the norm
  `weight_l * mean_norms[l]`, so with `add` a coefficient is a dose relative to the mean norm.
* **Mean hidden norm** leaves out the first token of every sequence: an attention sink, whose norm
  is hundreds of times the rest.
* Vectors are learned and stored in float32 and cast in one place, where an engine installs them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from spo.errors import ArtifactError

SITE = "resid_post"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SteeringVector:
    """One direction for each steered layer of one model. Immutable: operations return new ones.

    Raises:
        ArtifactError: shapes disagree, a value is not finite, or layers are not sorted and unique.
    """

    layers: tuple[int, ...]
    """Zero-based decoder blocks, ascending."""
    directions: Tensor
    """(layers, hidden) float32, activation units, pointing towards harm."""
    mean_norms: Tensor
    """(layers,) float32, mean norm of the residual stream at each layer, first token left out."""
    calibration: Tensor
    """(layers, hidden) float32, mean benign activation h0; zeros where none was measured."""
    model_id: str
    """Hub id or folder name of the model that the vector belongs to."""
    model_revision: str = ""
    """Commit of the hub, or content digest of a local model."""
    _sha256: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ArtifactError(
                f"layers must be ascending, unique and >= 0, got {self.layers}; "
                "name each decoder block once, counting from 0"
            )
        for name in ("directions", "mean_norms", "calibration"):
            # A copy: an optimiser changes its tensors in place, a published vector never changes.
            tensor = getattr(self, name).detach().to("cpu", torch.float32, copy=True).contiguous()
            if not torch.isfinite(tensor).all():
                raise ArtifactError(
                    f"{name} must be finite, got NaN or infinity; the file or the training run "
                    "that made it is damaged: take an earlier version"
                )
            object.__setattr__(self, name, tensor)
        count = len(self.layers)
        if self.directions.ndim != 2 or self.directions.shape[0] != count:
            raise ArtifactError(
                f"directions must be ({count}, hidden) for layers {self.layers}, "
                f"got {tuple(self.directions.shape)}"
            )
        if self.calibration.shape != self.directions.shape or self.mean_norms.shape != (count,):
            raise ArtifactError(
                f"calibration must be {tuple(self.directions.shape)} and mean_norms ({count},), "
                f"got {tuple(self.calibration.shape)} and {tuple(self.mean_norms.shape)}"
            )
        if not (self.mean_norms > 0).all():
            raise ArtifactError(
                f"mean_norms must be positive, got {self.mean_norms.tolist()}; doses are relative "
                "to them: measure them on the model with jobs.extract"
            )

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.directions.shape[1])

    @property
    def norms(self) -> Tensor:
        """(layers,) Euclidean norm of each direction."""
        return self.directions.norm(dim=-1)

    @property
    def doses(self) -> Tensor:
        """(layers,) norm of each direction relative to the mean hidden norm of its layer."""
        return self.norms / self.mean_norms

    @property
    def sha256(self) -> str:
        """Content hash over layers, model and tensors; independent of file format."""
        if not self._sha256:
            header = json.dumps([self.layers, self.model_id, self.model_revision, SITE])
            digest = hashlib.sha256(header.encode())
            for tensor in (self.directions, self.mean_norms, self.calibration):
                digest.update(tensor.numpy().tobytes())
            object.__setattr__(self, "_sha256", digest.hexdigest())
        return self._sha256

    def replace(self, **changes: object) -> SteeringVector:
        """A copy with other fields, validated again."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def select(self, layers: Sequence[int]) -> SteeringVector:
        """The same vector on fewer layers."""
        missing = sorted(set(layers) - set(self.layers))
        if missing:
            raise ArtifactError(f"layers {missing} are not in the vector; it has {self.layers}")
        rows = [self.layers.index(layer) for layer in sorted(layers)]
        return self.replace(
            layers=tuple(sorted(layers)),
            directions=self.directions[rows],
            mean_norms=self.mean_norms[rows],
            calibration=self.calibration[rows],
        )

    def check_fits(self, *, hidden_size: int, num_layers: int) -> None:
        """Raise ArtifactError unless the vector fits a model of this size."""
        if self.hidden_size != hidden_size:
            raise ArtifactError(
                f"the vector has hidden size {self.hidden_size} and the model {hidden_size}: it "
                f"was made for {self.model_id!r}; make one for this model with jobs.extract"
            )
        if self.layers[-1] >= num_layers:
            raise ArtifactError(
                f"layer {self.layers[-1]} is out of range: the model has decoder blocks "
                f"0..{num_layers - 1}"
            )

    def __mul__(self, factor: float) -> SteeringVector:
        return self.replace(directions=self.directions * factor)

    __rmul__ = __mul__

    def __neg__(self) -> SteeringVector:
        return self * -1.0

    def __add__(self, other: SteeringVector) -> SteeringVector:
        if self.layers != other.layers or self.hidden_size != other.hidden_size:
            raise ArtifactError(
                f"vectors to be added must share layers and hidden size, got {self.layers} x "
                f"{self.hidden_size} and {other.layers} x {other.hidden_size}; use select() first"
            )
        if self.model_id != other.model_id:
            raise ArtifactError(
                f"vectors to be added must steer one model, got {self.model_id!r} and "
                f"{other.model_id!r}"
            )
        return self.replace(directions=self.directions + other.directions)

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return self + -other

    def to_bytes(self) -> bytes:
        """Safetensors bytes, for files and for the wire (never pickle)."""
        tensors = {
            "directions": self.directions,
            "mean_norms": self.mean_norms,
            "calibration": self.calibration,
        }
        metadata = {
            "format": "spo-steering-vector/1",
            "site": SITE,
            "layers": json.dumps(list(self.layers)),
            "model_id": self.model_id,
            "model_revision": self.model_revision,
            "sha256": self.sha256,
        }
        return save_tensors(tensors, metadata=metadata)

    @classmethod
    def from_bytes(cls, data: bytes) -> SteeringVector:
        """Inverse of `to_bytes`; raises ArtifactError when the bytes or their hash are wrong."""
        try:
            length = int.from_bytes(data[:8], "little")
            metadata = json.loads(data[8 : 8 + length])["__metadata__"]
            tensors = load_tensors(data)
            stated = metadata["sha256"]
            vector = cls(
                layers=tuple(json.loads(metadata["layers"])),
                model_id=metadata["model_id"],
                model_revision=metadata["model_revision"],
                **tensors,
            )
        except ArtifactError:
            raise
        except Exception as error:
            raise ArtifactError(
                "expected a steering vector in safetensors form, got bytes that do not parse "
                f"({type(error).__name__}: {error}); the file is damaged or of another kind"
            ) from error
        if vector.sha256 != stated:
            raise ArtifactError(
                f"content hash is {vector.sha256[:12]} and the file says "
                f"{stated[:12]}: it was changed after it was written; take the original"
            )
        return vector
