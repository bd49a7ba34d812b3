"""What a configuration names, and what happens to rows that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from spo.config import DataConfig, EvaluateConfig, RunConfig
from spo.corpus.base import EvaluationInputs
from spo.datasets.prompts import write_prompts
from spo.errors import ConfigError, DataError
from spo.records import Prompt, PromptFormat, PromptKind, QuarantinedRow
from spo.resolve import open_corpus


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


def training_prompts(
    data: DataConfig, cache: Path, seed: int = 0
) -> tuple[list[Prompt], list[QuarantinedRow]]:
    run = RunConfig(data=data, cache_dir=cache, seed=seed)
    return open_corpus(run.corpus).training_prompts()


def evaluation_inputs(run: RunConfig) -> EvaluationInputs:
    return open_corpus(run.corpus).evaluation_inputs()


def test_training_prompts_with_a_damaged_picture_are_quarantined(tmp_path: Path) -> None:
    prompts, bad = training_prompts(DataConfig(train=str(prompt_file(tmp_path))), tmp_path)
    assert [prompt.prompt_id for prompt in prompts] == ["h", "ok"]
    assert [row.row_id for row in bad] == ["cut"]
    assert "cut.png' cannot be decoded" in bad[0].reason


def test_a_share_of_the_harmful_prompts_is_asked_through_drawn_words(tmp_path: Path) -> None:
    openings = [
        Prompt(prompt_id=f"{kind}{i}", text=f"You are {i}", kind=kind, format=PromptFormat.PLAIN)
        for kind in PromptKind
        for i in range(100)
    ]
    file = str(write_prompts(openings, tmp_path / "prompts.jsonl"))
    plain, _ = training_prompts(DataConfig(train=file), tmp_path)
    config = DataConfig(train=file, typographic_fraction=0.3, picture_size=64)
    mixed, _ = training_prompts(config, tmp_path)
    assert mixed == training_prompts(config, tmp_path)[0]
    assert [p.prompt_id for p in mixed] == [p.prompt_id for p in plain]
    drawn = [p for p in mixed if p.image]
    assert {p.kind for p in drawn} == {PromptKind.HARM}
    assert 15 <= len(drawn) <= 45
    assert {Image.open(str(p.image)).size for p in drawn} == {(64, 64)}
    assert all("You are" not in p.text for p in drawn)
    rest = [(a, b) for a, b in zip(plain, mixed, strict=True) if not b.image]
    assert all(a == b for a, b in rest)


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
    names = ["plain", "image", "describe", "caption", "question", "twin", "text"]
    assert [s.condition for s in inputs.sets] == names
    attacked = next(s for s in inputs.sets if s.condition == inputs.attacked)
    assert not {p.text for p in attacked.prompts} & {p.text for p in inputs.attack_prompts}
    (texts,) = [s for s in inputs.sets if s.condition == "text"]
    assert texts.references.keys() == {p.prompt_id for p in texts.prompts}
    assert not {p.image for s in inputs.sets for p in s.prompts if p.image} & {
        p.image for p in first
    }


def test_own_evaluation_prompts_need_material_for_the_attack(tmp_path: Path) -> None:
    data = DataConfig(heldout=str(prompt_file(tmp_path)))
    with pytest.raises(ConfigError, match=r"evaluate\.attacks=\[\]"):
        evaluation_inputs(RunConfig(data=data))
    quiet = EvaluateConfig(attacks=())
    inputs = evaluation_inputs(RunConfig(data=data, evaluate=quiet))
    assert [s.condition for s in inputs.sets] == ["plain", "benign"]
    assert inputs.attack_starts == ()
    only_benign = tmp_path / "benign.jsonl"
    only_benign.write_text('{"prompt_id": "x", "text": "?", "kind": "benign"}')
    with pytest.raises(DataError, match="no prompt of kind 'harm'"):
        evaluation_inputs(RunConfig(data=DataConfig(heldout=str(only_benign)), evaluate=quiet))
