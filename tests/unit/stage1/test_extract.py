"""The parts of extraction that need no cluster: what is refused, kept, mended and quarantined."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spo.config import ExtractConfig
from spo.errors import DataError, StageError
from spo.records import Positions, Prompt, PromptFormat, PromptKind, Side
from spo.stage1.activations import CALIBRATION, ContrastRow, decode_half, row_to_json
from spo.stage1.extract import ActivationExtractor, _cause, _reconcile, extract


def row(prompt_id: str, side: Side = Side.HARM, source: str = "s", **more: object) -> ContrastRow:
    values = {"text": "words of the row", "format": PromptFormat.PLAIN, **more}
    prompt = Prompt(prompt_id=prompt_id, kind=PromptKind.HARM, **values)  # type: ignore[arg-type]
    generated = source == CALIBRATION
    positions = Positions.GENERATED if generated else Positions.TEXT
    return ContrastRow(source=source, side=side, prompt=prompt, positions=positions)


def run_extract(rows: list[ContrastRow], folder: Path, digest: str) -> Path:
    return extract(rows, folder, model="m", revision=None, config=ExtractConfig(), digest=digest)


def test_a_folder_of_another_configuration_is_refused_and_a_finished_one_kept(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "a"
    (folder / "activations").mkdir(parents=True)
    (folder / "extraction.json").write_text(json.dumps({"digest": "d"}))
    with pytest.raises(DataError, match="configuration d, this run is other"):
        run_extract([row("a")], folder, "other")
    (folder / "manifest.json").write_text(json.dumps({"digest": "d", "files": {}}))
    assert run_extract([row("a")], folder, "d") == folder


def test_repeated_ids_and_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"repeated ids: \['a'\]"):
        run_extract([row("a"), row("a", Side.SAFE)], tmp_path / "x", "d")
    with pytest.raises(DataError, match="got 0 rows"):
        run_extract([], tmp_path / "x", "d")
    assert not (tmp_path / "x").exists()


def test_files_and_checkpoint_are_reconciled(tmp_path: Path) -> None:
    """Whatever a crash left behind: afterwards each committed id has exactly one readable file."""
    data, marks = tmp_path / "activations", tmp_path / "checkpoint"
    data.mkdir()
    marks.mkdir()

    def write(folder: Path, name: str) -> Path:
        pq.write_table(pa.table({"row_id": [name]}), folder / name)
        return folder / name

    for name in ("good", "cut", "lost", "badmark"):
        write(marks, f"{name}.parquet")
        write(data, f"{name}-000.parquet")
    (data / "lost-000.parquet").unlink()
    for path in (data / "cut-000.parquet", marks / "badmark.parquet"):
        path.write_bytes(path.read_bytes()[:-10])
    write(data, "uncommitted-000.parquet")
    write(marks, "uncommitted.pending.parquet")
    _reconcile(tmp_path)
    assert [p.name for p in data.iterdir()] == ["good-000.parquet"]
    assert sorted(p.name for p in marks.iterdir()) == [
        "good.parquet",
        "uncommitted.pending.parquet",  # Ray's own to clean
    ]


def test_errors_that_crossed_ray_keep_their_words() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "the disk is full" in _cause(full)
    assert "goes on where it stopped" in _cause(full)
    outer = RuntimeError("Traceback ...\n  many lines\n")
    outer.__cause__ = StageError("extract.layers asks for blocks [9], the model has 0..3")
    assert _cause(outer) == "extract.layers asks for blocks [9], the model has 0..3"
    assert _cause(RuntimeError("Traceback ...\nValueError: odd\n")) == "ValueError: odd"


@pytest.fixture(scope="module")
def extractor(tiny_llava: Path) -> ActivationExtractor:
    config = ExtractConfig(dtype="float32", batch_size=4, storage="bfloat16", layers=(0, 2))
    return ActivationExtractor(str(tiny_llava), None, config)


def test_bad_rows_are_set_aside_and_the_good_ones_unchanged(
    extractor: ActivationExtractor, tmp_path: Path
) -> None:
    frames = [Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in (0, 90, 180)]
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "corrupt.png").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (12_500, 8_000)).save(tmp_path / "huge.png")  # 100 megapixels
    bad = {
        "animated.gif": "animation of 3 frames",
        "corrupt.png": "cannot be decoded",
        "huge.png": "has more than the 50000000 pixels",
        "gone.png": "does not exist",
    }
    good = [row("a"), row("b", image=str(tmp_path / "good.png")), row("c", source=CALIBRATION)]
    rows = [
        *good,
        *(row(name, image=str(tmp_path / name)) for name in bad),
        row("empty", text=""),
        row("placeholder", text="look: <image>"),
    ]
    out = extractor({"row": np.array([row_to_json(r) for r in rows])})
    assert out["row_id"] == [r.prompt.prompt_id for r in rows]
    reasons = dict(zip(out["row_id"], out["reason"], strict=True))
    for name, reason in bad.items():
        assert reason in reasons[name]
    assert "too short" in reasons["empty"] or "no tokens" in reasons["empty"]
    assert "placeholder" in reasons["placeholder"]
    alone = extractor({"row": np.array([row_to_json(r) for r in good])})
    for i in range(len(good)):
        assert reasons[good[i].prompt.prompt_id] == ""
        mixed, clean = (decode_half(o["mean"][i], "bfloat16") for o in (out, alone))
        assert mixed.size == 2 * json.loads(out["model"][i])["hidden_size"]
        np.testing.assert_allclose(mixed, clean, rtol=2e-2, atol=1e-3)
