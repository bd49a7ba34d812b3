"""Extraction through vLLM's capture op writes what the exact backend writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spo.config import ExtractConfig
from spo.records import Positions, Prompt, PromptFormat, PromptKind, Side
from spo.stage1.activations import ContrastRow, decode_half, row_to_json
from spo.stage1.extract import ActivationExtractor

pytestmark = pytest.mark.vllm


def rows(folder: Path) -> list[ContrastRow]:
    Image.new("RGB", (32, 32), (200, 30, 60)).save(folder / "red.png")
    (folder / "broken.png").write_bytes(b"no picture")
    asked = (
        ("text", None, Positions.TEXT),
        ("last", None, Positions.LAST_PROMPT),
        ("image", "red.png", Positions.IMAGE),
        ("after", "red.png", Positions.LAST_PROMPT),
        ("broken", "broken.png", Positions.LAST_PROMPT),
    )
    return [
        ContrastRow(
            source="s",
            side=Side.HARM,
            prompt=Prompt(
                prompt_id=name,
                text="some words to read",
                kind=PromptKind.HARM,
                format=PromptFormat.PLAIN,
                image=str(folder / image) if image else None,
            ),
            positions=positions,
        )
        for name, image, positions in asked
    ]


def test_both_backends_write_the_same(tiny_llava: Path, tmp_path: Path) -> None:
    batch = {"row": np.array([row_to_json(row) for row in rows(tmp_path)])}
    written = {}
    for backend in ("hf", "vllm"):
        config = ExtractConfig(
            backend=backend,
            dtype="float32",
            batch_size=4,
            max_model_len=256,
            memory_gib=0.1,
            layers=(0, 2),
        )
        written[backend] = ActivationExtractor(str(tiny_llava), None, config)(batch)
    hf, vllm = written["hf"], written["vllm"]
    assert [bool(reason) for reason in vllm["reason"]] == [False] * 4 + [True]
    assert [bool(reason) for reason in hf["reason"]] == [False] * 4 + [True]
    assert vllm["tokens"] == hf["tokens"]
    width = json.loads(hf["model"][0])["hidden_size"]
    for exact, read in zip(hf["mean"][:4], vllm["mean"][:4], strict=True):
        a, b = (decode_half(x, "float16").reshape(2, width) for x in (exact, read))
        np.testing.assert_allclose(b, a, rtol=2e-2, atol=5e-3)
