"""The extraction folder: half precision, reading back, refusing what is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from spo.errors import DataError
from spo.records import Positions, Prompt, PromptFormat, PromptKind, Side
from spo.stage1.activations import (
    CALIBRATION,
    ContrastRow,
    decode_half,
    encode_half,
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


def finished_folder(folder: Path, storage: str = "float16") -> Path:
    """An extraction of two rows a side, two calibration rows, and one that was quarantined."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "row_id": f"{source}-{side}-{i}",
            "source": source,
            "side": side,
            "mean": encode_half(rng.normal(size=(LAYERS, HIDDEN)).astype(np.float32), storage)[0],
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
    file = folder / "activations" / "0.parquet"
    pq.write_table(pa.Table.from_pylist([*rows, bad]), file)
    manifest = {
        "digest": "d",
        "layers": list(range(LAYERS)),
        "data_sha256": "x",
        "storage": storage,
        "sources": ["s"],
        "model": MODEL,
        "files": {file.name: file.stat().st_size},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_rows_survive_json() -> None:
    assert row_from_json(row_to_json(row("a"))) == row("a")


def test_half_precision_rounds_as_torch_does() -> None:
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32) * 300
    for storage in ("float16", "bfloat16"):
        content, reason = encode_half(values, storage)
        assert reason == ""
        assert len(content) == 2000
        expected = torch.from_numpy(values).to(getattr(torch, storage)).float().numpy()
        np.testing.assert_array_equal(decode_half(content, storage), expected)
    loud = np.array([1e6], dtype=np.float32)
    assert encode_half(loud, "float16") == (
        b"",
        "activations do not fit float16; set extract.storage=bfloat16",
    )
    assert encode_half(loud, "bfloat16")[1] == ""
    assert "not finite" in encode_half(np.array([np.nan], dtype=np.float32), "bfloat16")[1]


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_finished_folder_is_read_back(tmp_path: Path, storage: str) -> None:
    found = load_activations(finished_folder(tmp_path / "a", storage), {"s": 0.5})
    (contrast,) = found.contrasts
    assert contrast.weight == 0.5
    blocks = list(contrast.blocks())
    assert next(iter(contrast.blocks())).ids == blocks[0].ids  # readable again and again
    (block,) = blocks
    assert block.values.shape == (4, LAYERS, HIDDEN)
    assert dict(zip(block.ids, block.harm.tolist(), strict=True)) == {
        "s-harm-0": True,
        "s-harm-1": True,
        "s-safe-0": False,
        "s-safe-1": False,
    }
    assert found.mean_norms.tolist() == [2.0] * LAYERS
    assert [(q.row_id, q.reason) for q in found.quarantined] == [("bad", "picture is damaged")]


def test_unfinished_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished extraction"):
        load_activations(tmp_path, {})
    folder = finished_folder(tmp_path / "a")
    file = folder / "activations" / "0.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    with pytest.raises(DataError, match="damaged or cut short"):
        load_activations(folder, {})
    file.write_bytes(whole[:200] + bytes(60) + whole[260:])
    with pytest.raises(DataError, match="damaged or cut short"):
        list(load_activations(folder, {}).contrasts[0].blocks())
    file.unlink()
    with pytest.raises(DataError, match="is missing"):
        load_activations(folder, {})
