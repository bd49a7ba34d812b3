"""The attacker in the loop of Stage II: what is refused, what is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spo.artifact import SteeringArtifact
from spo.attack_loop import with_attacked
from spo.config import AttackConfig, DataConfig, RunConfig
from spo.errors import ConfigError
from spo.progress import Silent
from spo.records import Operator, Positions, Prompt, PromptKind
from spo.resources import ResolvedModel
from spo.sweep.settings import load_sweep
from spo.vector import SteeringVector

PROMPTS = [Prompt(prompt_id=f"p{i}", text="You", kind=PromptKind.HARM) for i in range(8)]
MODEL = ResolvedModel(path="model", revision=None)


def artifact() -> SteeringArtifact:
    vector = SteeringVector(
        layers=(1,),
        directions=torch.ones(1, 4),
        mean_norms=torch.ones(1),
        calibration=torch.zeros(1, 4),
        model_id="model",
        model_revision=None,
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


@pytest.mark.parametrize(
    "data",
    [
        DataConfig(train="own.jsonl"),
        DataConfig(train="own.jsonl", attacks=(AttackConfig(),), attacked_fraction=0.0),
    ],
)
def test_without_an_attack_the_prompts_stay_as_they_are(data: DataConfig) -> None:
    assert with_attacked(PROMPTS, RunConfig(data=data), artifact(), MODEL, Silent()) == PROMPTS


def test_an_attack_needs_pictures_and_targets_of_its_own() -> None:
    config = RunConfig(data=DataConfig(train="own.jsonl", attacks=(AttackConfig(),)))
    with pytest.raises(ConfigError, match=r"got 0 pictures and None"):
        with_attacked(PROMPTS, config, artifact(), MODEL, Silent())


def test_only_picture_attacks_go_into_the_loop() -> None:
    with pytest.raises(ValueError, match="typographic_fraction"):
        DataConfig(attacks=(AttackConfig(kind="typographic"),))


def test_a_sweep_refuses_a_base_that_attacks(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("data: {attacks: [{kind: pgd}]}\n")
    file = tmp_path / "sweep.yaml"
    file.write_text("base: base.yaml\nspace: {learn.learning_rate: {choices: [0.1]}}\n")
    with pytest.raises(ConfigError, match=r"set data.attacks=\[\]"):
        load_sweep(file)
