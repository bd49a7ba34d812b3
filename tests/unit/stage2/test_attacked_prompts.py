"""The attacker in the loop of Stage II: what is refused, what is left alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from spo.actors.picture_tasks import AttackJob, Workshop, attack_picture, pictures_of
from spo.artifact import SteeringArtifact
from spo.config import DataConfig, LearnConfig, PgdConfig, RunConfig
from spo.errors import ConfigError
from spo.progress import Silent
from spo.records import Operator, Positions, Prompt, PromptKind
from spo.resolve import ResolvedModel, open_corpus
from spo.stage2.attacked_prompts import with_attacked
from spo.sweep.settings import load_sweep
from spo.vector import SteeringVector
from tests.tiny_models import make_tiny_model

PROMPTS = [Prompt(prompt_id=f"p{i}", text="You", kind=PromptKind.HARM) for i in range(8)]
MODEL = ResolvedModel(path="model", revision=None)


def job(folder: Path, *, vector: bytes, targets: tuple[str, ...] = ("bad",)) -> AttackJob:
    """An adaptive attack on a model of one file."""
    model, picture = folder / "model", folder / "clean.png"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    Image.new("RGB", (4, 4), "red").save(picture)
    return AttackJob(
        name="adaptive-pgd-16-0--stage1",
        attack="adaptive-pgd-16",
        defence="stage1",
        model=str(model),
        revision=None,
        picture=picture,
        folder=folder / "attack-training",
        prompts=PROMPTS,
        targets=targets,
        config=PgdConfig(adaptive=True),
        place=LearnConfig(),
        seed=0,
        vector=vector,
        steering=artifact().spec("stage1"),
    )


def artifact() -> SteeringArtifact:
    vector = SteeringVector(
        layers=(1,),
        directions=torch.ones(1, 4),
        mean_norms=torch.ones(1),
        calibration=torch.zeros(1, 4),
        model_id="model",
        model_revision="r",
    )
    return SteeringArtifact(
        vector=vector,
        operator=Operator.ADD,
        coefficient=0.1,
        positions=Positions.ALL,
        method="test",
        config_digest="x",
        data_sha256="x",
    )


def in_the_loop(config: RunConfig) -> list[Prompt]:
    return with_attacked(
        PROMPTS,
        config.data,
        corpus=open_corpus(config.corpus),
        start=artifact(),
        workshop=Workshop(model=MODEL, place=config.learn, run_dir=config.run_dir, seed=0),
        reporter=Silent(),
    )


@pytest.mark.parametrize(
    "data",
    [
        DataConfig(train="own.jsonl"),
        DataConfig(train="own.jsonl", attacks=(PgdConfig(),), attacked_fraction=0.0),
    ],
)
def test_without_an_attack_the_prompts_stay_as_they_are(data: DataConfig) -> None:
    assert in_the_loop(RunConfig(data=data)) == PROMPTS


def test_an_attack_needs_pictures_and_targets_of_its_own() -> None:
    config = RunConfig(data=DataConfig(train="own.jsonl", attacks=(PgdConfig(),)))
    with pytest.raises(ConfigError, match=r"got 0 pictures and None"):
        in_the_loop(config)


def test_only_picture_attacks_go_into_the_loop() -> None:
    with pytest.raises(ValueError, match="typographic_fraction"):
        DataConfig.model_validate({"attacks": [{"kind": "typographic"}]})


def test_a_sweep_refuses_a_base_that_attacks(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("data: {attacks: [{kind: pgd}]}\n")
    file = tmp_path / "sweep.yaml"
    file.write_text("base: base.yaml\nspace: {learn.learning_rate: {choices: [0.1]}}\n")
    with pytest.raises(ConfigError, match=r"set data.attacks=\[\]"):
        load_sweep(file)


def test_pictures_are_found_again_by_what_they_depend_on(tmp_path: Path) -> None:
    vector = artifact().vector
    made = job(tmp_path, vector=vector.to_bytes())
    attacked = made.folder / f"{made.name}.png"
    made.folder.mkdir()
    attacked.touch()
    origin = {"attack": "adaptive-pgd-16", "defence": "stage1"}
    curve = {"digest": made.digest, "attacked": str(attacked), "clean_loss": 2.0, **origin}
    (made.folder / f"{made.name}.json").write_text(json.dumps(curve))

    notes: list[str] = []
    # A vector's bytes differ from one writing to the next; what counts is its content.
    for _ in range(8):
        again = job(tmp_path, vector=SteeringVector.from_bytes(vector.to_bytes()).to_bytes())
        assert pictures_of([again], notes.append, lambda *_: None) == {made.name: curve}
    assert notes == []

    turned = vector.replace(directions=-vector.directions)
    assert job(tmp_path, vector=turned.to_bytes()).digest != made.digest
    assert job(tmp_path, vector=vector.to_bytes(), targets=("worse",)).digest != made.digest


def test_pictures_that_end_early_have_one_mean_curve(tmp_path: Path) -> None:
    config = PgdConfig(
        target="prompt",
        objective="compliance",
        steps=20,
        epsilon_255=64,
        flat_steps=2,
        flat_gain=0.02,
    )
    asked = replace(
        job(tmp_path, vector=b"", targets=("Sure, here", "Yes. First,", "Of course", "Certainly")),
        model=str(make_tiny_model("llava", tmp_path / "tiny-llava")),
        prompts=PROMPTS[:4],
        config=config,
        steering=None,
        place=LearnConfig(dtype="float32"),
        name=config.name,
    )
    curve = attack_picture(asked)
    # Each picture has one pair, and 4 to 20 steps of its own.
    assert len(curve["losses"]) < curve["pairs"] < 4 * len(curve["losses"])
    assert curve["attacked_loss"] < curve["clean_loss"]
    assert curve["wall_s"] > 0
    assert sorted(curve["pictures"]) == [prompt.prompt_id for prompt in PROMPTS[:4]]
    assert Path(curve["pictures"]["p3"]).name == "pgd-compliance-each-64--p3.png"


def test_a_round_starts_from_another_artifact_than_it_writes() -> None:
    with pytest.raises(ValueError, match="'spo' would be written over"):
        LearnConfig(start="spo")
    with pytest.raises(ValueError, match="'stage1' would be written over"):
        LearnConfig(start="spo", artifact="stage1")
