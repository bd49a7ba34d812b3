"""The parts of extraction that need no cluster: rows, reading back, refusing what is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spo.config import ExtractConfig
from spo.errors import DataError
from spo.records import Positions, Prompt, PromptFormat, PromptKind, Side
from spo.stages.extract import (
    CALIBRATION,
    ContrastRow,
    extract,
    load_activations,
    row_from_json,
    row_to_json,
)

LAYERS, HIDDEN = 3, 4
MODEL = {"model_id": "m", "model_revision": "r", "hidden_size": HIDDEN, "num_layers": LAYERS}


def row(prompt_id: str, side: Side = Side.HARM) -> ContrastRow:
    prompt = Prompt(
        prompt_id=prompt_id, text="words", kind=PromptKind.HARM, format=PromptFormat.PLAIN
    )
    return ContrastRow(source="s", side=side, prompt=prompt, positions=Positions.TEXT)


def finished_folder(folder: Path) -> Path:
    """An extraction of two rows a side, one calibration row, and one that was quarantined."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "row_id": f"{source}-{side}-{i}",
            "source": source,
            "side": side,
            "mean": rng.normal(size=(LAYERS, HIDDEN)).astype(np.float16).tobytes(),
            "norm": np.full(LAYERS, 2.0, dtype=np.float32).tobytes(),
            "tokens": 5,
            "reason": "",
            "model": json.dumps(MODEL),
        }
        for source, side in (("s", "harm"), ("s", "safe"), (CALIBRATION, "safe"))
        for i in range(2)
    ]
    bad = {**rows[0], "row_id": "bad", "mean": b"", "norm": b"", "reason": "picture is damaged"}
    (folder / "activations").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([*rows, bad]), folder / "activations" / "0.parquet")
    manifest = {"digest": "d", "layers": list(range(LAYERS)), "data_sha256": "x"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_rows_survive_json() -> None:
    assert row_from_json(row_to_json(row("a"))) == row("a")


def test_finished_folder_is_read_back(tmp_path: Path) -> None:
    found = load_activations(finished_folder(tmp_path / "a"), {"s": 0.5})
    (contrast,) = found.contrasts
    assert contrast.weight == 0.5
    assert contrast.harm.shape == contrast.safe.shape == (2, LAYERS, HIDDEN)
    assert contrast.harm_ids == ["s-harm-0", "s-harm-1"]
    assert found.mean_norms.tolist() == [2.0] * LAYERS
    assert [(q.row_id, q.reason) for q in found.quarantined] == [("bad", "picture is damaged")]


def test_unfinished_and_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished extraction"):
        load_activations(tmp_path, {})
    folder = finished_folder(tmp_path / "a")
    file = folder / "activations" / "0.parquet"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(DataError, match="damaged or cut short"):
        load_activations(folder, {})


def run_extract(rows: list[ContrastRow], folder: Path, digest: str) -> Path:
    return extract(rows, folder, model="m", revision=None, config=ExtractConfig(), digest=digest)


def test_a_folder_of_another_configuration_is_refused_and_a_finished_one_kept(
    tmp_path: Path,
) -> None:
    folder = finished_folder(tmp_path / "a")
    assert run_extract([row("a")], folder, "d") == folder
    with pytest.raises(DataError, match="configuration d, this run is other"):
        run_extract([row("a")], folder, "other")


def test_repeated_ids_and_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"repeated ids: \['a'\]"):
        run_extract([row("a"), row("a", Side.SAFE)], tmp_path / "x", "d")
    with pytest.raises(DataError, match="got 0 rows"):
        run_extract([], tmp_path / "x", "d")
