"""Prompt files: good rows are read, bad rows are kept aside with a reason that helps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from spo.datasets.prompts import read_contrast, read_prompts, write_prompts
from spo.errors import DataError
from spo.records import Prompt, PromptFormat, PromptKind, Side


def write(path: Path, rows: list[object]) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines))
    return path


def test_round_trip(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    prompts = [
        Prompt(prompt_id="1", text="You are", kind=PromptKind.HARM, format=PromptFormat.PLAIN),
        Prompt(prompt_id="2", text="What?", kind=PromptKind.BENIGN, image=str(tmp_path / "a.png")),
    ]
    read, bad = read_prompts(write_prompts(prompts, tmp_path / "prompts.jsonl"))
    assert read == prompts
    assert bad == []


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{broken", "not JSON"),
        ([1], "expected a JSON object"),
        ({"prompt_id": "x", "text": "t"}, r"missing \['kind'\]"),
        ({"prompt_id": "x", "text": "t", "kind": "harm", "colour": 1}, r"unknown \['colour'\]"),
        ({"prompt_id": "x", "text": "t", "kind": "nasty"}, "must be one of"),
        ({"prompt_id": "x", "text": " ", "kind": "harm"}, "'text' is empty"),
        ({"prompt_id": "x", "text": 7, "kind": "harm"}, "'text' must be a string, got int"),
        (
            {"prompt_id": "x", "text": "t", "kind": "benign", "reference": ["a"]},
            "'reference' must be a string, got list",
        ),
        ({"prompt_id": "x", "text": "t", "kind": "harm", "image": "none.png"}, "does not exist"),
        ({"prompt_id": "good", "text": "t", "kind": "harm"}, "occurs twice"),
    ],
)
def test_a_bad_row_is_quarantined_with_its_line_and_reason(
    tmp_path: Path, row: object, reason: str
) -> None:
    good = {"prompt_id": "good", "text": "t", "kind": "harm"}
    prompts, bad = read_prompts(write(tmp_path / "p.jsonl", [good, row]))
    assert [prompt.prompt_id for prompt in prompts] == ["good"]
    assert len(bad) == 1
    assert bad[0].row_id == "p.jsonl:2"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(bad[0].reason)


def test_an_empty_or_unreadable_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no usable prompt"):
        read_prompts(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(DataError, match="cannot read"):
        read_prompts(tmp_path / "absent.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8 JSONL"):
        read_prompts(tmp_path / "binary.jsonl")


def test_contrast_needs_both_sides(tmp_path: Path) -> None:
    harm = {"id": "a", "text": "bad words", "side": "harm"}
    safe = {"id": "b", "text": "good words", "side": "safe"}
    rows, bad = read_contrast(write(tmp_path / "c.jsonl", [harm, safe, {"id": "c", "text": "?"}]))
    assert [(side, prompt.prompt_id) for side, prompt in rows] == [
        (Side.HARM, "a"),
        (Side.SAFE, "b"),
    ]
    assert rows[0][1].format is PromptFormat.PLAIN
    assert "'side' must be one of" in bad[0].reason
    with pytest.raises(DataError, match="no usable row of side 'safe'"):
        read_contrast(write(tmp_path / "d.jsonl", [harm]))
