"""`SteeringArtifact`: a vector with how to use it and where it came from, as a folder.

`vector.safetensors` holds the tensors and `manifest.json` the rest. Loading refuses a wrong hash
and a model other than the one the vector was made for; no code runs when one is loaded. llama.cpp's
format is in `spo.gguf`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from spo.errors import ArtifactError
from spo.files import unwritable, write_atomic
from spo.records import Operator, Positions, SteeringSpec
from spo.vector import SITE, SteeringVector

FORMAT = "spo-steering-artifact/1"
LAYER_CONVENTION = "output of decoder block l, zero-based; Hugging Face hidden_states[l + 1]"
VECTOR_FILE = "vector.safetensors"
MANIFEST_FILE = "manifest.json"


RELEASED = "release:"
"""Begins the name of an artifact that ships with the package, such as `release:guarded/spo`."""
_RELEASES = Path(__file__).parent / "releases"


def located(artifact: Path | str) -> Path:
    """The folder of an artifact: the path itself, or where a released one lies in the package.

    Raises:
        ArtifactError: no artifact of that name was released.
    """
    name = str(artifact)
    if not name.startswith(RELEASED):
        return Path(artifact)
    folder = _RELEASES / name.removeprefix(RELEASED)
    if not (folder / MANIFEST_FILE).is_file() or _RELEASES not in folder.resolve().parents:
        known = sorted(
            RELEASED + path.parent.relative_to(_RELEASES).as_posix()
            for path in _RELEASES.rglob(MANIFEST_FILE)
        )
        raise ArtifactError(f"no artifact {name!r} was released; there are {known}")
    return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringArtifact:
    """A releasable steering vector."""

    vector: SteeringVector
    operator: Operator
    coefficient: float
    """Coefficient that the evaluation used."""
    positions: Positions
    method: str
    """How it was made, e.g. "mean_difference" or "rloo from mean_difference"."""
    data_sha256: str = ""
    """Hash of the prompts and activations that it was made from."""
    config_digest: str = ""
    """Digest of the resolved configuration of the run."""
    parent: str = ""
    """Content hash of the vector that this one was refined from."""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """Measured figures that ship with it, from `jobs.evaluate`."""

    def spec(self, name: str, version: int = 0) -> SteeringSpec:
        """How the vector is applied, published under that name and version."""
        return SteeringSpec(
            vector=name,
            version=version,
            coefficient=self.coefficient,
            operator=self.operator,
            positions=self.positions,
        )

    def save(self, folder: Path | str) -> Path:
        """Write the folder; an interrupted save leaves no half-written artifact behind."""
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(folder, error) from error
        manifest = {
            "format": FORMAT,
            "sha256": self.vector.sha256,
            "model_id": self.vector.model_id,
            "model_revision": self.vector.model_revision,
            "site": SITE,
            "layer_convention": LAYER_CONVENTION,
            "layers": list(self.vector.layers),
            "hidden_size": self.vector.hidden_size,
            "operator": self.operator.value,
            "coefficient": self.coefficient,
            "positions": self.positions.value,
            "method": self.method,
            "mean_norms": self.vector.mean_norms.tolist(),
            "direction_norms": self.vector.norms.tolist(),
            "data_sha256": self.data_sha256,
            "config_digest": self.config_digest,
            "parent": self.parent,
            "evaluation": dict(self.evaluation),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_atomic(folder / VECTOR_FILE, self.vector.to_bytes())
        write_atomic(folder / MANIFEST_FILE, json.dumps(manifest, indent=2).encode())
        return folder

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        about = f"{self.method}, for {self.vector.model_id}, {self.vector.sha256[:12]}"
        how = f"{self.operator.value} x {self.coefficient:g} at {self.positions.value}"
        rows = "".join(
            f"<tr><td>{layer}</td><td>{dose:.3f}</td></tr>"
            for layer, dose in zip(self.vector.layers, self.vector.doses.tolist(), strict=True)
        )
        return (
            f"<table><caption>{escape(about)}<br>{escape(how)}</caption>"
            f"<tr><th>layer</th><th>norm / mean hidden norm</th></tr>{rows}</table>"
        )

    @classmethod
    def load(
        cls, folder: Path, *, model_id: str | None, model_revision: str = ""
    ) -> SteeringArtifact:
        """Read and verify an artifact.

        Args:
            folder: folder that `save` wrote, or the name of a released one (`RELEASED`).
            model_id: the model it is to steer; None only to inspect it.
            model_revision: revision of that model; "" does not check it.

        Raises:
            ArtifactError: a file is missing or damaged, the hash is wrong, or the model differs.
        """
        folder = located(folder)
        for name in (VECTOR_FILE, MANIFEST_FILE):
            if not (folder / name).is_file():
                raise ArtifactError(
                    f"{folder} has no {name}; expected a folder made by jobs.export"
                )
        vector = SteeringVector.from_bytes((folder / VECTOR_FILE).read_bytes())
        try:
            manifest = json.loads((folder / MANIFEST_FILE).read_text())
            artifact = cls(
                vector=vector,
                operator=Operator(manifest["operator"]),
                coefficient=float(manifest["coefficient"]),
                positions=Positions(manifest["positions"]),
                method=manifest["method"],
                data_sha256=manifest["data_sha256"],
                config_digest=manifest["config_digest"],
                parent=manifest["parent"],
                evaluation=manifest["evaluation"],
            )
            stated = manifest["sha256"]
        except (KeyError, ValueError, TypeError) as error:
            raise ArtifactError(
                f"{folder / MANIFEST_FILE}: expected a {FORMAT} manifest, got {error!r}; "
                "export the artifact again"
            ) from error
        if stated != vector.sha256:
            raise ArtifactError(
                f"{folder}: the manifest is for vector {stated[:12]}, the file holds "
                f"{vector.sha256[:12]}; the two come from different exports"
            )
        _check_model(vector, model_id, model_revision)
        return artifact


def _check_model(vector: SteeringVector, model_id: str | None, model_revision: str) -> None:
    if model_id is not None and model_id != vector.model_id:
        raise ArtifactError(
            f"the artifact steers model {vector.model_id!r}, not {model_id!r}; "
            "make one for this model with jobs.pipeline"
        )
    if model_revision and vector.model_revision and model_revision != vector.model_revision:
        raise ArtifactError(
            f"the artifact was made on revision {vector.model_revision!r} of {vector.model_id!r}, "
            f"this is {model_revision!r}; load that revision or make the vector again"
        )
