"""Picture attacks as Ray tasks: each needs its own differentiable copy of the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError

from spo.artifact import write_atomic
from spo.config import AttackConfig, LearnConfig
from spo.engines.identity import folder_revision
from spo.errors import StageError
from spo.records import Prompt, SteeringSpec

if TYPE_CHECKING:
    from spo.attacks.pgd import PgdResult


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackJob:
    """Everything that one attack needs. Plain values."""

    name: str
    """Names the files, e.g. "image--adaptive-pgd-16--spo"."""
    model: str
    """Model that the picture is made on."""
    revision: str | None
    picture: Path
    """Clean picture to start from."""
    folder: Path
    """Where pictures are written (PNG)."""
    prompts: Sequence[Prompt]
    """`corpus`: training prompts that one picture is to work on; `prompt`: the prompts that each
    get a picture."""
    targets: Sequence[str]
    """`corpus`: harmful sentences; `prompt`: one for each prompt."""
    config: AttackConfig
    learn: LearnConfig
    """Device and computation type."""
    seed: int
    vector: bytes = b""
    """Serialised vector of the defence that an adaptive attack goes through."""
    steering: SteeringSpec | None = None
    """How that vector is applied."""

    @property
    def digest(self) -> str:
        """Names everything that the pictures depend on, the model's files included."""
        from spo.vector import SteeringVector

        local = Path(self.model).is_dir()
        model = folder_revision(self.model) if local else (self.model, self.revision)
        # Of the content: the same vector is written in another order each time.
        vector = SteeringVector.from_bytes(self.vector).sha256 if self.vector else ""
        plain = (self.config.model_dump_json(), self.learn.dtype, self.seed, vector)
        asked = (repr(self.steering), repr(self.prompts), repr(self.targets))
        content = (model, self.picture.read_bytes(), *plain, *asked)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def attack_picture(job: AttackJob) -> dict[str, Any]:
    """Run the attack; writes the pictures and returns curves and paths. A plain function."""
    from spo.attacks.pgd import prompt_pgd, universal_pgd
    from spo.engines.hf.engine import HfEngine
    from spo.engines.processing import load_image
    from spo.vector import SteeringVector

    engine = HfEngine(
        job.model,
        revision=job.revision,
        dtype=job.learn.dtype,
        device="cuda" if job.learn.use_gpu else "cpu",
    )
    plan = None
    if job.steering is not None:
        vector = SteeringVector.from_bytes(job.vector)
        engine.publish(job.steering.vector, vector, job.steering.version)
        opened = engine.plan(job.steering)
        plan = replace(opened, straight_through=True) if opened else None
    image = load_image(str(job.picture))
    options: dict[str, Any] = {"config": job.config, "plan": plan, "seed": job.seed}
    job.folder.mkdir(parents=True, exist_ok=True)
    if job.config.target == "corpus":
        result = universal_pgd(engine, image, prompts=job.prompts, targets=job.targets, **options)
        return _written(job, job.name, result)
    pairs = list(zip(job.prompts, job.targets, strict=True))
    results = prompt_pgd(engine, image, pairs=pairs, **options)
    each = {
        prompt.prompt_id: _written(job, f"{job.name}--{prompt.prompt_id}", result)
        for prompt, result in zip(job.prompts, results, strict=True)
    }
    rows = list(each.values())
    return {
        **{
            key: sum(row[key] for row in rows) / len(rows)
            for key in ("clean_loss", "attacked_loss")
        },
        "losses": [
            sum(step) / len(step) for step in zip(*(r["losses"] for r in rows), strict=True)
        ],
        "checkpoints": [],
        "restart_losses": [],
        "epsilon_255": job.config.epsilon_255,
        "clean": rows[0]["clean"],
        "attacked": rows[0]["attacked"],
        "pictures": {prompt_id: row["attacked"] for prompt_id, row in each.items()},
    }


def _written(job: AttackJob, name: str, result: PgdResult) -> dict[str, Any]:
    path = result.save(job.folder / f"{name}.png")
    checkpoints = []
    for look in result.checkpoints:
        place = job.folder / f"{name}--step-{look.step}.png"
        look.image.save(place, format="PNG")
        checkpoints.append({"step": look.step, "loss": look.loss, "image": str(place)})
    return {
        "losses": list(result.losses),
        "clean_loss": result.clean_loss,
        "attacked_loss": result.attacked_loss,
        "restart_losses": list(result.restart_losses),
        "checkpoints": checkpoints,
        "epsilon_255": job.config.epsilon_255,
        "clean": str(job.picture),
        "attacked": str(path),
    }


def pictures_of(
    jobs: Sequence[AttackJob],
    note: Callable[[str], None],
    step: Callable[[int, int, str], None],
) -> dict[str, dict[str, Any]]:
    """Curve and pictures of every job by its name; those that are there are kept.

    Args:
        jobs: attacks, those of one name alike.
        note: told what has to be made.
        step: told how far it is: done, total, what.

    Errors as in `run_attacks`.
    """
    found: dict[str, dict[str, Any]] = {}
    missing: dict[str, AttackJob] = {}
    digests = {job.name: job.digest for job in jobs}
    for job in jobs:
        kept = _kept(job, digests[job.name])
        if kept is None:
            missing[job.name] = job
        else:
            found[job.name] = kept
    if missing:
        note(f"{len(missing)} picture attacks: {', '.join(missing)}")

    def done(job: AttackJob, curve: dict[str, Any]) -> None:
        attack, _, defence = job.name.partition("--")
        content = {**curve, "digest": digests[job.name], "attack": attack, "defence": defence}
        content["budget"] = job.config.model_dump(mode="json")
        write_atomic(job.folder / f"{job.name}.json", json.dumps(content).encode())
        found[job.name] = content
        step(
            sum(name in found for name in missing),
            len(missing),
            f"{job.name}: loss {curve['clean_loss']:.2f} -> {curve['attacked_loss']:.2f}",
        )

    run_attacks(list(missing.values()), done)
    return found


def _kept(job: AttackJob, digest: str) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads((job.folder / f"{job.name}.json").read_text())
    except (OSError, ValueError):
        return None
    if content.get("digest") != digest or not Path(content["attacked"]).is_file():
        return None
    return content


def run_attacks(
    jobs: Sequence[AttackJob], done: Callable[[AttackJob, dict[str, Any]], None]
) -> None:
    """`attack_picture` of every job on the cluster; `done` is called as each one ends.

    Raises:
        StageError: one took longer than its `timeout_s`, or failed.
    """
    if not jobs:
        return
    shares = [
        {"num_cpus": 1, "num_gpus": job.learn.num_gpus if job.learn.use_gpu else 0} for job in jobs
    ]
    waiting = {
        ray.remote(attack_picture).options(**share).remote(job): job
        for job, share in zip(jobs, shares, strict=True)
    }
    limit = max(job.config.timeout_s for job in jobs)
    while waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=limit)
        if not ready:
            for reference in waiting:
                ray.cancel(reference, force=True)
            names = [job.name for job in waiting.values()]
            raise StageError(
                f"waited {limit:.0f} s for the next of the picture attacks {names}; lower their "
                "'steps' or raise their 'timeout_s' in evaluate.attacks"
            )
        job = waiting.pop(ready[0])
        try:
            done(job, ray.get(ready[0], timeout=60))
        except GetTimeoutError as error:
            raise StageError(f"the result of the attack {job.name} did not arrive") from error
