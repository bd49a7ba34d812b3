"""What a model is: its identity, its decoder blocks, and whether a vector belongs to it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from torch import nn

from spo.engines.base import EngineInfo
from spo.errors import EngineError, SteeringError
from spo.vector import SteeringVector


def find_blocks(decoder: nn.Module, text_config: Any) -> nn.ModuleList:
    """The decoder blocks: the one module list as long as the configuration says."""
    expected = text_config.num_hidden_layers
    found = [
        child
        for child in decoder.children()
        if isinstance(child, nn.ModuleList) and len(child) == expected
    ]
    if len(found) != 1:
        raise EngineError(
            f"expected one list of {expected} decoder blocks in {type(decoder).__name__}, found "
            f"{len(found)}; this architecture is not supported by the hf engine"
        )
    return found[0]


def check_belongs(vector: SteeringVector, info: EngineInfo) -> None:
    """Raise unless the vector was made for this model and fits it."""
    vector.check_fits(hidden_size=info.hidden_size, num_layers=info.num_layers)
    if vector.model_id != info.model_id:
        raise SteeringError(
            f"the vector steers model {vector.model_id!r} and the engine holds {info.model_id!r}; "
            "publish it to an engine of its own model"
        )
    made, held = vector.model_revision, info.model_revision
    if made and held and made != held:
        raise SteeringError(
            f"the vector was made on revision {made!r} of {info.model_id!r} and the engine holds "
            f"{held!r}; make the vector again on this revision"
        )


def model_identity(model: str) -> str:
    """Name that ties a vector to a model: the hub id, or the name of a local folder."""
    return Path(model).name if Path(model).is_dir() else model


def folder_revision(model: str) -> str:
    """Digest of a local model's configuration and weight index; "" for hub ids."""
    folder = Path(model)
    if not folder.is_dir():
        return ""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.json")):
        digest.update(path.name.encode() + path.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
    return digest.hexdigest()[:16]


def is_shape(model: str) -> bool:
    """Whether a model folder asks for random weights of its shape: it has a `BENCHMARK_SHAPE`."""
    return (Path(model) / "BENCHMARK_SHAPE").is_file()
