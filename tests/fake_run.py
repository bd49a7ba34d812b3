"""A run on the fake engine that needs no model: a Stage I artifact, prompts, tiny settings."""

from __future__ import annotations

from pathlib import Path

import torch

from spo.artifact import SteeringArtifact
from spo.datasets.prompts import write_prompts
from spo.records import Operator, Positions, Prompt, PromptFormat, PromptKind
from spo.vector import SteeringVector


def write_fake_run(run_dir: Path, prompts: Path) -> None:
    """Put a Stage I artifact for the fake model into a run folder, and write training prompts."""
    vector = SteeringVector(
        layers=(1,),
        directions=torch.full((1, 8), 0.1),
        mean_norms=torch.ones(1),
        calibration=torch.zeros(1, 8),
        model_id="fake",
    )
    SteeringArtifact(
        vector=vector,
        operator=Operator.ADD,
        coefficient=0.1,
        positions=Positions.ALL,
        method="made for a test",
    ).save(run_dir / "stage1")
    rows = [
        Prompt(
            prompt_id=f"{kind.value}-{i}",
            text=f"opening number {i}",
            kind=kind,
            format=PromptFormat.PLAIN,
        )
        for kind in PromptKind
        for i in range(8)
    ]
    write_prompts(rows, prompts)
