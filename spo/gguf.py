"""llama.cpp control vectors (GGUF), read and written; no code runs when one is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from spo.errors import ArtifactError
from spo.files import unwritable
from spo.vector import SteeringVector


def export_gguf(vector: SteeringVector, path: Path, *, model_hint: str) -> Path:
    """Write a llama.cpp control vector.

    llama.cpp *adds* `direction.N` to the output of zero-based block N and has no tensor for block
    0, so directions are negated (a positive `--control-vector-scaled` then removes harm, as here).

    Args:
        vector: vector to write; only its directions have a place in the format.
        path: file to write.
        model_hint: architecture as llama.cpp names it, e.g. "llama".
    """
    if vector.layers[0] == 0:
        raise ArtifactError(
            "llama.cpp control vectors start at block 1 and the vector steers block 0; "
            "leave it out with select()"
        )
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", model_hint)
    writer.add_uint32("controlvector.layer_count", len(vector.layers))
    for layer, direction in zip(vector.layers, vector.directions, strict=True):
        writer.add_tensor(f"direction.{layer}", (-direction).numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:
        raise unwritable(path, error) from error
    return path


def import_gguf(
    path: Path, *, mean_norms: Mapping[int, float], model_id: str, model_revision: str = ""
) -> SteeringVector:
    """Read a llama.cpp control vector; inverse of `export_gguf`.

    Args:
        path: GGUF file with `direction.N` tensors.
        mean_norms: mean hidden norm of each block, which the format does not hold.
        model_id: model that it steers.
        model_revision: its revision.
    """
    try:
        tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    except (ValueError, OSError, IndexError) as error:
        raise ArtifactError(f"{path}: expected a GGUF control vector, got {error}") from error
    directions: dict[int, Tensor] = {}
    for name, data in tensors.items():
        prefix, _, number = name.partition(".")
        if prefix != "direction" or not number.isdigit():
            raise ArtifactError(f"{path}: expected tensors named direction.N, got {name!r}")
        directions[int(number)] = -torch.from_numpy(data.astype(np.float32))
    missing = sorted(set(directions) - set(mean_norms))
    if not directions or missing:
        raise ArtifactError(
            f"{path}: need direction tensors and the mean hidden norm of each of their blocks; "
            f"got {len(directions)} tensors, no norm for blocks {missing}"
        )
    layers = tuple(sorted(directions))
    stacked = torch.stack([directions[layer] for layer in layers])
    return SteeringVector(
        layers=layers,
        directions=stacked,
        mean_norms=torch.tensor([float(mean_norms[layer]) for layer in layers]),
        calibration=torch.zeros_like(stacked),
        model_id=model_id,
        model_revision=model_revision,
    )
