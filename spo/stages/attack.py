"""The white-box picture attack as a Ray task: it needs its own differentiable copy of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from spo.config import AttackConfig, LearnConfig
from spo.errors import StageError
from spo.records import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackJob:
    """Everything that one attack needs. Plain values."""

    model: str
    revision: str | None
    picture: Path
    """Clean picture to start from."""
    output: Path
    """Where the attacked picture is written (PNG)."""
    prompts: Sequence[Prompt]
    """Prompts of the training split that the picture is to work on."""
    targets: Sequence[str]
    config: AttackConfig
    learn: LearnConfig
    """Device and computation type."""
    seed: int


def attack_picture(job: AttackJob) -> dict[str, Any]:
    """Run the attack; writes the picture and returns its loss curve. A plain function."""
    from spo.attacks.pgd import universal_pgd
    from spo.engines.hf import HfEngine
    from spo.engines.processing import load_image

    engine = HfEngine(
        job.model,
        revision=job.revision,
        dtype=job.learn.dtype,
        device="cuda" if job.learn.use_gpu else "cpu",
    )
    result = universal_pgd(
        engine,
        load_image(str(job.picture)),
        prompts=job.prompts,
        targets=job.targets,
        config=job.config,
        plan=None,
        seed=job.seed,
    )
    job.output.parent.mkdir(parents=True, exist_ok=True)
    result.save(job.output)
    return {
        "losses": list(result.losses),
        "clean_loss": result.clean_loss,
        "attacked_loss": result.attacked_loss,
        "epsilon_255": job.config.epsilon_255,
        "clean": str(job.picture),
        "attacked": str(job.output),
    }


def run_attack(job: AttackJob, *, timeout_s: float) -> dict[str, Any]:
    """`attack_picture` on the cluster."""
    share = {"num_cpus": 0.1, "num_gpus": job.learn.num_gpus if job.learn.use_gpu else 0}
    reference = ray.remote(attack_picture).options(**share).remote(job)
    try:
        curve: dict[str, Any] = ray.get(reference, timeout=timeout_s)
    except GetTimeoutError as error:
        ray.cancel(reference, force=True)
        raise StageError(
            f"waited {timeout_s:.0f} s for the picture attack of {job.config.steps} steps; lower "
            "evaluate.attack.steps or raise evaluate.attack.timeout_s"
        ) from error
    return curve
