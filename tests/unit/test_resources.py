"""What a configuration names, and what happens to rows that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from spo.config import (
    DataConfig,
    EvaluateConfig,
    ExtractConfig,
    RewardConfig,
    RunConfig,
    SourceConfig,
)
from spo.errors import ConfigError, DataError
from spo.prompts import write_prompts
from spo.records import Positions, Prompt, PromptFormat, PromptKind, Side
from spo.resources import (
    alignment_arguments,
    contrast_rows,
    evaluation_inputs,
    source_weights,
    training_prompts,
)
from spo.stages.extract import CALIBRATION


def prompt_file(folder: Path) -> Path:
    Image.new("RGB", (8, 8)).save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    prompts = [
        Prompt(prompt_id="h", text="You", kind=PromptKind.HARM, format=PromptFormat.PLAIN),
        Prompt(prompt_id="ok", text="?", kind=PromptKind.BENIGN, image=str(folder / "whole.png")),
        Prompt(prompt_id="cut", text="?", kind=PromptKind.BENIGN, image=str(folder / "cut.png")),
    ]
    return write_prompts(prompts, folder / "prompts.jsonl")


def test_training_prompts_with_a_damaged_picture_are_quarantined(tmp_path: Path) -> None:
    config = DataConfig(train=str(prompt_file(tmp_path)))
    prompts, bad = training_prompts(config, tmp_path, seed=0)
    assert [prompt.prompt_id for prompt in prompts] == ["h", "ok"]
    assert [row.row_id for row in bad] == ["cut"]
    assert "cut.png' cannot be decoded" in bad[0].reason


def test_testbed_prompts_are_the_same_for_the_same_seed_and_disjoint_from_heldout(
    tmp_path: Path,
) -> None:
    config = DataConfig(harm_prompts=40, benign_prompts=10)
    first, _ = training_prompts(config, tmp_path, seed=3)
    again, _ = training_prompts(config, tmp_path, seed=3)
    assert first == again
    assert sum(p.kind is PromptKind.HARM for p in first) == 40
    assert sum(p.image is not None for p in first if p.kind is PromptKind.HARM) == 20
    run = RunConfig(cache_dir=tmp_path, evaluate=EvaluateConfig(harm_prompts=40, scenes=6))
    inputs = evaluation_inputs(run)
    held = {p.text for s in inputs.sets if s.condition == "plain" for p in s.prompts}
    assert not held & {p.text for p in first}
    assert [s.condition for s in inputs.sets] == ["plain", "image", "caption", "question"]
    assert not {p.image for s in inputs.sets for p in s.prompts if p.image} & {
        p.image for p in first
    }


def test_contrast_rows_of_every_kind(tmp_path: Path) -> None:
    own = tmp_path / "mine.jsonl"
    own.write_text(
        '{"id": "a", "text": "bad", "side": "harm"}\n{"id": "b", "text": "good", "side": "safe"}\n'
        '{"id": "c", "text": 3, "side": "safe"}\n'
    )
    sources = (
        SourceConfig(kind="continuation", rows=3),
        SourceConfig(kind="typographic", rows=2, weight=0.5),
        SourceConfig(kind="file", path=own),
    )
    run = RunConfig(cache_dir=tmp_path, extract=ExtractConfig(sources=sources, calibration_rows=4))
    rows, bad = contrast_rows(run)
    count = {
        name: sum(r.source == name for r in rows)
        for name in ("continuation", "typographic", "mine", CALIBRATION)
    }
    assert count == {"continuation": 6, "typographic": 4, "mine": 2, CALIBRATION: 4}
    assert [row.row_id for row in bad] == ["mine.jsonl:3"]
    assert source_weights(run) == {"continuation": 1.0, "typographic": 0.5, "mine": 1.0}
    pictures = [r for r in rows if r.source == "typographic"]
    assert all(r.prompt.image and r.positions is Positions.LAST_PROMPT for r in pictures)
    assert {r.side for r in pictures} == set(Side)


def test_own_evaluation_prompts_need_material_for_the_attack(tmp_path: Path) -> None:
    data = DataConfig(heldout=str(prompt_file(tmp_path)))
    with pytest.raises(ConfigError, match=r"evaluate\.attacks=\[\]"):
        evaluation_inputs(RunConfig(data=data))
    quiet = EvaluateConfig(attacks=())
    inputs = evaluation_inputs(RunConfig(data=data, evaluate=quiet))
    assert [s.condition for s in inputs.sets] == ["plain", "benign"]
    assert inputs.attack_start is None
    only_benign = tmp_path / "benign.jsonl"
    only_benign.write_text('{"prompt_id": "x", "text": "?", "kind": "benign"}')
    with pytest.raises(DataError, match="no prompt of kind 'harm'"):
        evaluation_inputs(RunConfig(data=DataConfig(heldout=str(only_benign)), evaluate=quiet))


def test_alignment_model_must_name_its_weights(tmp_path: Path) -> None:
    named = alignment_arguments(RewardConfig(alignment_model="ViT-B-32:laion2b"), tmp_path)
    assert named == {"model": "ViT-B-32", "pretrained": "laion2b"}
    with pytest.raises(ConfigError, match="MODEL:PRETRAINED"):
        alignment_arguments(RewardConfig(alignment_model="ViT-B-32"), tmp_path)
