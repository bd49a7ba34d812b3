"""Activation extraction with Ray Data: contrast rows in, pooled activations in Parquet out.

The plan is read -> repartition -> map in model actors -> write, with Ray Data's checkpoint of row
ids: each written file commits its ids, in two phases. Blocks are small, so a killed run loses at
most the blocks in work, and the same command goes on. Before it does, files and checkpoint are
reconciled: a data file that cannot be read gives its ids back, so every id ends up there exactly
once. A row that cannot be used is written too, with its reason. The manifest is written last.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from spo.config import ExtractConfig
from spo.engines.base import Capture, Engine
from spo.errors import DataError, SpoError, StageError
from spo.files import write_atomic
from spo.stage1.activations import (
    CALIBRATION,
    DATA,
    MANIFEST,
    ContrastRow,
    digest_of_rows,
    encode_half,
    row_from_json,
    row_to_json,
)
from spo.stage1.reading import capture_requests

_STARTED = "extraction.json"
_COLUMNS = ("row_id", "source", "side", "mean", "norm", "tokens", "reason", "model")


class ActivationExtractor:
    """Ray Data actor: holds the model, maps blocks of rows to pooled activations."""

    def __init__(self, model: str, revision: str | None, config: ExtractConfig) -> None:
        self._config = config
        self._engine = _open_engine(model, revision, config)
        info = self._engine.info
        self._model = json.dumps(asdict(info))
        self._layers = config.layers or tuple(range(info.num_layers))
        outside = [layer for layer in self._layers if not 0 <= layer < info.num_layers]
        if outside:
            raise StageError(
                f"extract.layers asks for blocks {outside}, the model has 0..{info.num_layers - 1}"
            )

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        rows = [row_from_json(text) for text in batch["row"]]
        captured = self._captured(rows)
        out: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        for row in rows:
            capture = captured[row.prompt.prompt_id]
            mean, norm, tokens = b"", b"", 0
            if isinstance(capture, Capture):
                mean, reason = encode_half(capture.mean, self._config.storage)
                norm, tokens = capture.norm.tobytes(), capture.tokens
            else:
                reason = capture
            values = (row.prompt.prompt_id, row.source, row.side.value, mean, norm, tokens, reason)
            for name, value in zip(_COLUMNS, (*values, self._model), strict=True):
                out[name].append(value)
        return out

    def _captured(self, rows: Sequence[ContrastRow]) -> dict[str, Capture | str]:
        """A capture, or the reason why there is none, for every row id."""
        try:
            return self._capture(rows)
        except DataError:
            pass  # some row is bad: look at each by itself
        found: dict[str, Capture | str] = {}
        good: list[ContrastRow] = []
        for row in rows:
            try:
                if len(self._engine.prompts.prompt_tokens(row.prompt)) < 2:
                    raise DataError("one token only, and the first is never pooled: too short")
                good.append(row)
            except DataError as error:
                found[row.prompt.prompt_id] = str(error)
        try:
            return found | (self._capture(good) if good else {})
        except DataError:
            pass  # too long, or nothing to pool over: known only to the engine
        for row in good:
            try:
                found |= self._capture([row])
            except DataError as error:
                found[row.prompt.prompt_id] = str(error)
        return found

    def _capture(self, rows: Sequence[ContrastRow]) -> dict[str, Capture | str]:
        requests = capture_requests(self._engine, rows, self._layers)
        return {capture.request_id: capture for capture in self._engine.capture(requests)}


def _open_engine(model: str, revision: str | None, config: ExtractConfig) -> Any:
    if config.backend == "vllm":
        from spo.engines.vllm.engine import VllmEngine

        return VllmEngine(
            model,
            revision=revision,
            capture_rows=config.batch_size,
            max_num_seqs=config.batch_size,
            **config.engine_arguments(),
        )
    from spo.engines.hf.engine import HfEngine

    engine: Engine = HfEngine(
        model,
        revision=revision,
        dtype=config.torch_dtype,
        device=config.torch_devices,
        batch_size=config.batch_size,
        compiled_capture=config.compile,
    )
    return engine


def extract(
    rows: Sequence[ContrastRow],
    folder: Path,
    *,
    model: str,
    revision: str | None,
    config: ExtractConfig,
    digest: str,
) -> Path:
    """Write the activations of all rows to `folder`.

    A finished folder of the same digest is kept; an unfinished or damaged one is completed.

    Raises:
        DataError: two rows share an id, there are none, or the folder is of another configuration.
        StageError: Ray Data failed, or rows are missing afterwards.
    """
    _check_rows(rows)
    _check_digest(folder, digest)
    if _is_whole(folder):
        return folder
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / DATA).mkdir(parents=True, exist_ok=True)
    state = {"digest": digest, "rows": len(rows)}
    write_atomic(folder / _STARTED, json.dumps(state).encode())
    _reconcile(folder)
    _write_input(rows, folder)
    if _committed_rows(folder) < len(rows):
        _run(folder, model, revision, config)
    _finish(folder, rows, config, digest)
    return folder


def _run(folder: Path, model: str, revision: str | None, config: ExtractConfig) -> None:
    import ray

    hf_on_gpu = config.backend == "hf" and config.gpus > 0
    with _checkpointing(folder / "checkpoint", config):
        dataset = ray.data.read_parquet(str(folder / "input"), columns=["row_id", "row"])
        mapped = dataset.repartition(target_num_rows_per_block=config.rows_per_block).map_batches(
            ActivationExtractor,
            fn_constructor_kwargs={"model": model, "revision": revision, "config": config},
            batch_size=config.rows_per_block,
            compute=ray.data.ActorPoolStrategy(
                size=config.workers,
                # On a GPU one block is decoded while the model works on another.
                max_concurrent_calls_per_actor=2 if hf_on_gpu else None,
                enable_true_multi_threading=hf_on_gpu or None,
            ),
            num_cpus=1,
            **(config.ray_options() | {"num_gpus": config.gpus or None}),
        )
        try:
            mapped.write_parquet(str(folder / DATA))
        except (ray.exceptions.RayError, OSError) as error:
            raise StageError(f"extraction failed: {_cause(error)}") from error


@contextmanager
def _checkpointing(path: Path, config: ExtractConfig) -> Iterator[None]:
    """Ray Data's checkpoint, for the run inside only."""
    import ray.data
    from ray.data.checkpoint import CheckpointConfig

    context = ray.data.DataContext.get_current()
    before = (context.checkpoint_config, context.execution_no_progress_timeout_s)
    context.checkpoint_config = CheckpointConfig(
        id_column="row_id", checkpoint_path=str(path), delete_checkpoint_on_success=False
    )
    context.execution_no_progress_timeout_s = config.stall_timeout_s
    try:
        yield
    finally:
        context.checkpoint_config, context.execution_no_progress_timeout_s = before


def _reconcile(folder: Path) -> None:
    """Make files and checkpoint agree: each committed id has a readable file, and the reverse."""
    (folder / "checkpoint").mkdir(exist_ok=True)
    committed = [p for p in (folder / "checkpoint").iterdir() if _is_committed(p)]
    data = {path: _readable(path) for path in (folder / DATA).iterdir()}
    for path, readable in data.items():
        # Ray names data files after their checkpoint file. Pending ones it cleans up itself.
        owned = any(path.name.startswith(mark.stem) for mark in committed)
        if not readable or not owned:
            path.unlink()
    left = [path.name for path in (folder / DATA).iterdir()]
    for mark in committed:
        if not _readable(mark) or not any(name.startswith(mark.stem) for name in left):
            for name in left:
                if name.startswith(mark.stem):
                    (folder / DATA / name).unlink()
            mark.unlink()


def _committed_rows(folder: Path) -> int:
    """Ids in the checkpoint; all of them when only the manifest was missing."""
    marks = [p for p in (folder / "checkpoint").iterdir() if _is_committed(p)]
    return sum(pq.read_metadata(mark).num_rows for mark in marks)


def _is_committed(path: Path) -> bool:
    return path.suffix == ".parquet" and not path.name.endswith(".pending.parquet")


def _readable(path: Path) -> bool:
    """Whether the whole of a Parquet file can be read."""
    try:
        with pq.ParquetFile(path) as file:
            for _ in file.iter_batches(columns=["row_id"]):
                pass
    except (OSError, pa.ArrowInvalid):
        return False
    return True


def _write_input(rows: Sequence[ContrastRow], folder: Path) -> None:
    """All rows, those of similar length beside each other, the longest first."""
    shutil.rmtree(folder / "input", ignore_errors=True)
    (folder / "input").mkdir()
    ordered = sorted(
        rows,
        key=lambda r: (r.source == CALIBRATION, r.prompt.image is not None, len(r.prompt.text)),
        reverse=True,
    )
    table = pa.table(
        {
            "row_id": [row.prompt.prompt_id for row in ordered],
            "row": [row_to_json(row) for row in ordered],
        }
    )
    pq.write_table(table, folder / "input" / "rows.parquet")


def _check_rows(rows: Sequence[ContrastRow]) -> None:
    repeated = [i for i, n in Counter(r.prompt.prompt_id for r in rows).items() if n > 1]
    if repeated or not rows:
        raise DataError(
            f"extraction needs rows with unique ids, got {len(rows)} rows, repeated ids: "
            f"{repeated[:5]}; rename them in the source file"
        )


def _check_digest(folder: Path, digest: str) -> None:
    for name in (MANIFEST, _STARTED):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text())["digest"]
            if found != digest:
                raise DataError(
                    f"{folder} holds activations of configuration {found}, this run is {digest}; "
                    "choose another run name or delete the folder"
                )


def _is_whole(folder: Path) -> bool:
    """Finished, and every file still has its size."""
    if not (folder / MANIFEST).is_file():
        return False
    files = json.loads((folder / MANIFEST).read_text())["files"]
    paths = {folder / DATA / name: size for name, size in files.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def _finish(folder: Path, rows: Sequence[ContrastRow], config: ExtractConfig, digest: str) -> None:
    """Count what was written and seal the folder with its manifest."""
    files = sorted((folder / DATA).glob("*.parquet"))
    columns = ["row_id", "reason", "model"]
    table = pa.concat_tables(pq.read_table(path, columns=columns) for path in files)
    written = Counter(table["row_id"].to_pylist())
    wanted = {row.prompt.prompt_id for row in rows}
    if set(written) != wanted or max(written.values()) > 1:
        raise StageError(
            f"extraction wrote {sum(written.values())} rows for {len(wanted)} ids; run it again"
        )
    if not any(_is_committed(path) for path in (folder / "checkpoint").iterdir()):
        raise StageError("Ray Data kept no checkpoint of this extraction; it could not be resumed")
    reasons = table["reason"].to_pylist()
    if all(reasons):
        raise DataError(f"no row could be used; first reason: {reasons[0]}")
    model = json.loads(table["model"][0].as_py())
    manifest = {
        "digest": digest,
        "rows": len(rows),
        "quarantined": sum(bool(reason) for reason in reasons),
        "sources": sorted({row.source for row in rows} - {CALIBRATION}),
        "layers": list(config.layers or range(model["num_layers"])),
        "storage": config.storage,
        "data_sha256": digest_of_rows(rows),
        "model": model,
        "files": {path.name: path.stat().st_size for path in files},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=2).encode())
    shutil.rmtree(folder / "input", ignore_errors=True)


def _cause(error: BaseException) -> str:
    """What a person needs of an error that crossed Ray."""
    text = str(error)
    if "No space left on device" in text:
        return (
            "the disk is full (No space left on device); make room and run the same command: it "
            "goes on where it stopped"
        )
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, SpoError):
            return str(seen)
        seen = getattr(seen, "cause", None) or seen.__cause__
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
