"""Rows to read activations of, and the folder in which an extraction keeps them.

A folder holds `activations/*.parquet` (one row for each id: pooled means in half precision, norms,
or the reason why there is none), and `manifest.json`, which is written last and lists every file
with its size. Reading streams: memory does not grow with the number of rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from spo.algorithms.combination import Estimate
from spo.algorithms.estimators import Block, Contrast
from spo.errors import DataError
from spo.records import (
    Positions,
    Prompt,
    PromptFormat,
    PromptKind,
    QuarantinedRow,
    Side,
    Split,
)
from spo.vector import SteeringVector

CALIBRATION = "calibration"
"""Source name of the benign generations behind h0 and the mean norms."""
MANIFEST = "manifest.json"
DATA = "activations"
_BLOCK_ROWS = 32
_SAME_FILE = "delete the folder and run jobs.extract again, or run it again to mend it"


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastRow:
    """One row to read activations of."""

    source: str
    """Name of the contrast, or `CALIBRATION` for benign generations."""
    side: Side
    prompt: Prompt
    positions: Positions


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Activations:
    """What an extraction folder holds."""

    contrasts: tuple[Contrast, ...]
    layers: tuple[int, ...]
    calibration: NDArray[np.float32]
    """(layers, hidden) mean benign generated activation h0."""
    mean_norms: NDArray[np.float32]
    """(layers,) mean over benign generations of the hidden norm (median over each one's tokens)."""
    num_layers: int
    model_id: str
    model_revision: str
    data_sha256: str
    quarantined: tuple[QuarantinedRow, ...]


def encode_half(values: NDArray[np.float32], storage: str) -> tuple[bytes, str]:
    """(bytes in half precision, "" or the reason why the values do not fit).

    Args:
        values: float32 of any shape.
        storage: "float16", or "bfloat16" (round to nearest even), which never overflows.
    """
    if not np.isfinite(values).all():
        return b"", "activations are not finite; extract in float32 or bfloat16"
    if storage == "float16":
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            return b"", "activations do not fit float16; set extract.storage=bfloat16"
        return half.tobytes(), ""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype(np.uint16).tobytes(), ""


def decode_half(content: bytes, storage: str) -> NDArray[np.float32]:
    """Inverse of `encode_half`, flat."""
    if storage == "float16":
        return np.frombuffer(content, dtype=np.float16).astype(np.float32)
    bits = np.frombuffer(content, dtype=np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32)


def load_activations(folder: Path, weights: Mapping[str, float]) -> Activations:
    """Open a finished extraction.

    Args:
        folder: folder that `extract` finished.
        weights: weight of each source; sources without one count 1.

    Raises:
        DataError: the folder is unfinished, a file is missing, damaged or cut short, or no
            calibration row could be used.
    """
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder} holds no finished extraction; run jobs.extract first")
    manifest = json.loads((folder / MANIFEST).read_text())
    files = _checked_files(folder, manifest)
    model, layers = manifest["model"], tuple(manifest["layers"])
    store = _Store(files, (len(layers), model["hidden_size"]), manifest["storage"])
    calibration, norms = store.calibration()
    return Activations(
        contrasts=tuple(
            Contrast(
                source=source,
                weight=weights.get(source, 1.0),
                blocks=lambda source=source: store.blocks(source),  # type: ignore[misc]
            )
            for source in manifest["sources"]
        ),
        layers=layers,
        calibration=calibration,
        mean_norms=norms,
        num_layers=model["num_layers"],
        model_id=model["model_id"],
        model_revision=model["model_revision"],
        data_sha256=manifest["data_sha256"],
        quarantined=store.quarantined(),
    )


class _Store:
    """The Parquet files of one extraction, read in blocks."""

    def __init__(self, files: Sequence[Path], shape: tuple[int, int], storage: str) -> None:
        self._files = files
        self._shape = shape
        self._storage = storage

    def blocks(self, source: str) -> Iterator[Block]:
        """Usable rows of a source in file order."""
        for rows in self._rows(["row_id", "source", "side", "mean", "reason"]):
            kept = [row for row in rows if row["source"] == source and not row["reason"]]
            if kept:
                flat = np.stack([decode_half(row["mean"], self._storage) for row in kept])
                yield Block(
                    ids=[row["row_id"] for row in kept],
                    harm=np.array([row["side"] == Side.HARM.value for row in kept]),
                    values=flat.reshape(len(kept), *self._shape),
                )

    def calibration(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """h0 (layers, hidden) and mean norms (layers,)."""
        total = np.zeros(self._shape)
        norms = np.zeros(self._shape[0])
        count = 0
        for rows in self._rows(["source", "mean", "norm", "reason"]):
            for row in rows:
                if row["source"] == CALIBRATION and not row["reason"]:
                    total += decode_half(row["mean"], self._storage).reshape(self._shape)
                    norms += np.frombuffer(row["norm"], dtype=np.float32)
                    count += 1
        if not count:
            raise DataError("no calibration row could be used; see the quarantined rows' reasons")
        return (total / count).astype(np.float32), (norms / count).astype(np.float32)

    def quarantined(self) -> tuple[QuarantinedRow, ...]:
        """Rows that could not be used."""
        bad = [
            QuarantinedRow(row_id=row["row_id"], reason=row["reason"])
            for rows in self._rows(["row_id", "reason"])
            for row in rows
            if row["reason"]
        ]
        return tuple(sorted(bad, key=lambda row: row.row_id))

    def _rows(self, columns: list[str]) -> Iterator[list[dict[str, Any]]]:
        for path in self._files:
            try:
                with pq.ParquetFile(path, pre_buffer=False) as file:
                    for batch in file.iter_batches(batch_size=_BLOCK_ROWS, columns=columns):
                        yield batch.to_pylist()
            except (OSError, pa.ArrowInvalid) as error:
                raise DataError(
                    f"{path} cannot be read ({error}); the file is damaged or cut short: "
                    f"{_SAME_FILE}"
                ) from error


def _checked_files(folder: Path, manifest: Mapping[str, Any]) -> list[Path]:
    files = []
    for name, size in sorted(manifest["files"].items()):
        path = folder / DATA / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise DataError(
                f"{path} should have {size} bytes, "
                f"{'is missing' if found is None else f'has {found}: it is damaged or cut short'}; "
                f"{_SAME_FILE}"
            )
        files.append(path)
    return files


def steering_vector(found: Activations, result: Estimate) -> SteeringVector:
    """Unit directions times layer weight times mean hidden norm: a coefficient is a dose."""
    rows = list(result.chosen)
    norms = torch.from_numpy(found.mean_norms[rows])
    scale = torch.from_numpy(result.weights[rows]) * norms
    return SteeringVector(
        layers=tuple(found.layers[row] for row in rows),
        directions=torch.from_numpy(result.units[rows]) * scale.unsqueeze(1),
        mean_norms=norms,
        calibration=torch.from_numpy(found.calibration[rows]),
        model_id=found.model_id,
        model_revision=found.model_revision,
    )


def digest_of_rows(rows: Sequence[ContrastRow]) -> str:
    """Content hash of all rows, whatever their order."""
    return hashlib.sha256("\n".join(sorted(map(row_to_json, rows))).encode()).hexdigest()


def row_to_json(row: ContrastRow) -> str:
    """One row as JSON text."""
    return json.dumps(asdict(row))


def row_from_json(text: str) -> ContrastRow:
    """Inverse of `row_to_json`."""
    content = json.loads(text)
    prompt = content["prompt"]
    for name, kind in (("kind", PromptKind), ("format", PromptFormat), ("split", Split)):
        prompt[name] = kind(prompt[name])
    return ContrastRow(
        source=content["source"],
        side=Side(content["side"]),
        prompt=Prompt(**prompt),
        positions=Positions(content["positions"]),
    )
