"""Activation extraction with Ray Data: contrast rows in, pooled activations in Parquet out.

The plan is read -> map in model actors -> write, every row keeps its id, and pictures travel as
paths. A row that cannot be used is written too, with its reason, so nothing vanishes. The manifest
is written last: a folder without one is unfinished, and one whose digest differs is refused.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from spo.algorithms.estimators import Contrast
from spo.artifact import write_atomic
from spo.config import ExtractConfig
from spo.engines.base import CaptureRequest
from spo.errors import DataError, StageError
from spo.records import (
    GenerateRequest,
    Positions,
    Prompt,
    PromptFormat,
    PromptKind,
    QuarantinedRow,
    Sampling,
    Side,
    Split,
)

CALIBRATION = "calibration"
_MANIFEST = "manifest.json"
_CALIBRATION_TOKENS = 24


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
    """(layers,) mean over benign generations of the median hidden norm."""
    num_layers: int
    model_id: str
    model_revision: str
    data_sha256: str
    quarantined: tuple[QuarantinedRow, ...]


class ActivationExtractor:
    """Ray Data actor: holds the model, maps batches of rows to pooled activations."""

    def __init__(self, model: str, revision: str | None, config: ExtractConfig) -> None:
        from spo.engines.hf import HfEngine

        self._engine = HfEngine(
            model,
            revision=revision,
            dtype=config.dtype,
            device="cuda" if config.num_gpus else "cpu",
            batch_size=config.batch_size,
        )
        self._layers = config.layers or tuple(range(self._engine.info.num_layers))

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        rows = [row_from_json(text) for text in batch["row"]]
        captured: dict[str, tuple[bytes, bytes, int, str]] = {}
        usable: list[ContrastRow] = []
        for row in rows:
            try:
                if len(self._engine.prompts.prompt_tokens(row.prompt)) < 2:
                    raise DataError("one token only, and the first is never pooled: too short")
                usable.append(row)
            except DataError as error:
                captured[row.prompt.prompt_id] = (b"", b"", 0, str(error))
        for capture in self._engine.capture(self._requests(usable)) if usable else ():
            mean = capture.mean.astype(np.float16)
            reason = "" if np.isfinite(mean).all() else "activations do not fit float16"
            captured[capture.request_id] = (
                mean.tobytes(),
                capture.norm.tobytes(),
                capture.tokens,
                reason,
            )
        info = self._engine.info
        picked = [captured[row.prompt.prompt_id] for row in rows]
        return {
            "row_id": [row.prompt.prompt_id for row in rows],
            "source": [row.source for row in rows],
            "side": [row.side.value for row in rows],
            "mean": [item[0] for item in picked],
            "norm": [item[1] for item in picked],
            "tokens": [item[2] for item in picked],
            "reason": [item[3] for item in picked],
            "model": [json.dumps(asdict(info))] * len(rows),
        }

    def _requests(self, rows: Sequence[ContrastRow]) -> list[CaptureRequest]:
        generations = {
            rollout.request_id: rollout.token_ids
            for rollout in self._engine.generate(
                [
                    GenerateRequest(
                        request_id=row.prompt.prompt_id,
                        prompt=row.prompt,
                        sampling=Sampling(max_tokens=_CALIBRATION_TOKENS, seed=0),
                    )
                    for row in rows
                    if row.source == CALIBRATION
                ]
            )
        }
        return [
            CaptureRequest(
                request_id=row.prompt.prompt_id,
                prompt=row.prompt,
                layers=self._layers,
                positions=row.positions,
                token_ids=generations.get(row.prompt.prompt_id, ()),
            )
            for row in rows
        ]


def extract(
    rows: Sequence[ContrastRow],
    folder: Path,
    *,
    model: str,
    revision: str | None,
    config: ExtractConfig,
    digest: str,
    store: str | None = None,
) -> Path:
    """Write the activations of all rows to `folder`; a finished folder of the same digest is kept.

    Args:
        rows: what to read.
        folder: the driver's folder; manifest and input go there.
        model: local folder or hub id.
        revision: hub revision.
        config: workers and batches.
        digest: what the result depends on.
        store: folder or URL that every worker can write, for the Parquet; None takes `folder`.

    Raises:
        DataError: two rows share an id, there are none, or the folder is of another configuration.
        StageError: Ray Data failed, or rows are missing afterwards.
    """
    import ray

    _check_rows(rows)
    manifest_path = folder / _MANIFEST
    if manifest_path.is_file():
        found = json.loads(manifest_path.read_text())["digest"]
        if found == digest:
            return folder
        raise DataError(
            f"{folder} holds activations of configuration {found}, this run is {digest}; "
            "choose another run name or delete the folder"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    data = _data_place(folder, store)
    _empty(data)
    source = f"{store or folder}/input"
    _empty(source)
    texts = [row_to_json(row) for row in rows]
    pq.write_table(pa.table({"row": texts}), f"{source}/rows.parquet")
    dataset = ray.data.read_parquet(source).repartition(
        target_num_rows_per_block=config.batch_size * 4
    )
    mapped = dataset.map_batches(
        ActivationExtractor,
        fn_constructor_kwargs={"model": model, "revision": revision, "config": config},
        batch_size=config.batch_size,
        compute=ray.data.ActorPoolStrategy(size=config.workers),
        num_cpus=1,
        num_gpus=config.num_gpus or None,
        label_selector=config.labels,
    )
    try:
        mapped.write_parquet(data)
    except ray.exceptions.RayError as error:
        raise StageError(f"extraction failed: {error}") from error
    _finish(folder, data, rows, config, digest)
    return folder


def load_activations(
    folder: Path, weights: Mapping[str, float], store: str | None = None
) -> Activations:
    """Read a finished extraction.

    Args:
        folder: folder that `extract` finished.
        weights: weight of each source; sources without one count 1.
        store: as in `extract`.

    Raises:
        DataError: the folder is unfinished, or a Parquet file is damaged.
    """
    manifest_path = folder / _MANIFEST
    if not manifest_path.is_file():
        raise DataError(f"{folder} holds no finished extraction; run jobs.extract first")
    manifest = json.loads(manifest_path.read_text())
    try:
        table = pq.read_table(_data_place(folder, store))
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"{folder / 'activations'} cannot be read ({error}); a file is damaged or cut short: "
            "delete the folder and run jobs.extract again"
        ) from error
    rows = table.sort_by("row_id").to_pylist()
    model = json.loads(rows[0]["model"])
    layers = tuple(manifest["layers"])
    shape = (len(layers), model["hidden_size"])
    usable = [row for row in rows if not row["reason"]]
    calibration = [row for row in usable if row["source"] == CALIBRATION]
    if not calibration:
        raise DataError("no calibration row could be used; see the quarantined rows' reasons")
    norms = np.stack([np.frombuffer(row["norm"], dtype=np.float32) for row in calibration])
    sources = sorted({row["source"] for row in usable} - {CALIBRATION})
    return Activations(
        contrasts=tuple(
            _contrast(source, usable, shape, weights.get(source, 1.0)) for source in sources
        ),
        layers=layers,
        calibration=_means(calibration, shape).mean(axis=0),
        mean_norms=norms.mean(axis=0),
        num_layers=model["num_layers"],
        model_id=model["model_id"],
        model_revision=model["model_revision"],
        data_sha256=manifest["data_sha256"],
        quarantined=tuple(
            QuarantinedRow(row_id=row["row_id"], reason=row["reason"])
            for row in rows
            if row["reason"]
        ),
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


def _check_rows(rows: Sequence[ContrastRow]) -> None:
    repeated = [i for i, n in Counter(r.prompt.prompt_id for r in rows).items() if n > 1]
    if repeated or not rows:
        raise DataError(
            f"extraction needs rows with unique ids, got {len(rows)} rows, repeated ids: "
            f"{repeated[:5]}; rename them in the source file"
        )


def _data_place(folder: Path, store: str | None) -> str:
    return f"{store or folder}/activations"


def _empty(place: str) -> None:
    """Remove the Parquet of an extraction that did not finish."""
    system, path = fs.FileSystem.from_uri(place)
    system.create_dir(path, recursive=True)
    system.delete_dir_contents(path)


def _finish(
    folder: Path, data: str, rows: Sequence[ContrastRow], config: ExtractConfig, digest: str
) -> None:
    """Count what was written and seal the folder with its manifest."""
    table = pq.read_table(data, columns=["row_id", "reason", "model"])
    written = Counter(table["row_id"].to_pylist())
    wanted = {row.prompt.prompt_id for row in rows}
    if set(written) != wanted or max(written.values()) > 1:
        raise StageError(
            f"extraction wrote {sum(written.values())} rows for {len(wanted)} ids; run it again"
        )
    reasons = table["reason"].to_pylist()
    if all(reasons):
        raise DataError(f"no row could be used; first reason: {reasons[0]}")
    model = json.loads(table["model"][0].as_py())
    manifest = {
        "digest": digest,
        "rows": len(rows),
        "quarantined": sum(bool(reason) for reason in reasons),
        "layers": list(config.layers or range(model["num_layers"])),
        "data_sha256": digest_of_rows(rows),
        "model": model,
    }
    write_atomic(folder / _MANIFEST, json.dumps(manifest, indent=2).encode())


def _contrast(
    source: str, rows: Sequence[Mapping[str, Any]], shape: tuple[int, int], weight: float
) -> Contrast:
    sides = {
        side: [row for row in rows if row["source"] == source and row["side"] == side.value]
        for side in Side
    }
    return Contrast(
        source=source,
        weight=weight,
        harm=_means(sides[Side.HARM], shape),
        safe=_means(sides[Side.SAFE], shape),
        harm_ids=[row["row_id"] for row in sides[Side.HARM]],
        safe_ids=[row["row_id"] for row in sides[Side.SAFE]],
    )


def _means(rows: Sequence[Mapping[str, Any]], shape: tuple[int, int]) -> NDArray[np.float32]:
    if not rows:
        return np.zeros((0, *shape), dtype=np.float32)
    flat = [np.frombuffer(row["mean"], dtype=np.float16).reshape(shape) for row in rows]
    return np.stack(flat).astype(np.float32)
