"""Adversarial pictures as Ray tasks: each needs its own differentiable copy of the model.

`pictures_of` runs the attacks of an evaluation or of the loop; `picture_pairs` makes the pictures
of a Stage I source, PGD and ASTRA's masked twins, each kept under the digest of what it depends
on, so sources share pictures and an interrupted run makes only the missing ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError

from spo.config import (
    AdversarialSource,
    AttributionSource,
    ExtractConfig,
    PgdConfig,
)
from spo.config.place import ModelPlace
from spo.engines.identity import folder_revision
from spo.errors import StageError
from spo.files import write_atomic
from spo.records import Prompt, SteeringSpec
from spo.resolve import ResolvedModel

if TYPE_CHECKING:
    from spo.attacks.pgd import PgdResult


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackJob:
    """Everything that one attack needs. Plain values."""

    name: str
    """Names the files, e.g. "adaptive-pgd-16--spo"."""
    attack: str
    """Name of the attack."""
    defence: str
    """Name of what it is made through; "none" for the unsteered model."""
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
    config: PgdConfig
    place: ModelPlace
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
        plain = (self.config.model_dump_json(), self.place.dtype, self.seed, vector)
        asked = (repr(self.steering), repr(self.prompts), repr(self.targets))
        content = (model, self.picture.read_bytes(), *plain, *asked)
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """With what the attacks of a run are made, and where their pictures are kept."""

    model: ResolvedModel
    """The model under defence."""
    place: ModelPlace
    """Where they run."""
    run_dir: Path
    seed: int
    """The run's."""
    start: str = "stage1"
    """In the loop: name of the artifact that adaptive attacks go through."""


def attack_picture(job: AttackJob) -> dict[str, Any]:
    """Run the attack; writes the pictures and returns curves and paths. A plain function."""
    from spo.attacks.pgd import prompt_pgd, universal_pgd
    from spo.engines.hf.engine import HfEngine
    from spo.engines.processing import load_image
    from spo.vector import SteeringVector

    engine = HfEngine(
        job.model,
        revision=job.revision,
        dtype=job.place.torch_dtype,
        device=job.place.torch_devices,
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
        "losses": _mean_curve([row["losses"] for row in rows]),
        "checkpoints": [],
        "restart_losses": [],
        "pairs": sum(row["pairs"] for row in rows),
        "wall_s": sum(row["wall_s"] for row in rows),
        "epsilon_255": job.config.epsilon_255,
        "clean": rows[0]["clean"],
        "attacked": rows[0]["attacked"],
        "pictures": {prompt_id: row["attacked"] for prompt_id, row in each.items()},
    }


def _mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """Mean loss of each step, over those pictures that were still in work."""
    steps = range(max(map(len, curves)))
    running = [[curve[step] for curve in curves if step < len(curve)] for step in steps]
    return [sum(losses) / len(losses) for losses in running]


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
        "pairs": result.pairs,
        "wall_s": result.wall_s,
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
        content = {**curve, "digest": digests[job.name], **_origin(job)}
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
    return {**content, **_origin(job)}


def _origin(job: AttackJob) -> dict[str, str]:
    return {"attack": job.attack, "defence": job.defence}


def run_attacks(
    jobs: Sequence[AttackJob], done: Callable[[AttackJob, dict[str, Any]], None]
) -> None:
    """`attack_picture` of every job on the cluster; `done` is called as each one ends.

    Raises:
        StageError: one took longer than its `timeout_s`, or failed.
    """
    if not jobs:
        return
    task = ray.remote(attack_picture)
    waiting = {task.options(num_cpus=1, **job.place.ray_options()).remote(job): job for job in jobs}
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


AttackedSource = AdversarialSource | AttributionSource


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureJob:
    """Everything one worker needs. Plain values."""

    model: str
    revision: str | None
    source: AttackedSource
    extract: ExtractConfig
    """Device and computation type."""
    starts: Sequence[tuple[int, Path]]
    """Number and clean picture."""
    folder: Path
    prompts: Sequence[Prompt]
    targets: Sequence[str]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PicturePair:
    """A harmful picture and its harmless twin."""

    harm: str
    safe: str


def make_pictures(job: PictureJob) -> list[dict[str, Any]]:
    """Attack (and attribute) the pictures of one worker; finished ones are kept."""
    from spo.attacks.pgd import universal_pgd
    from spo.engines.hf.engine import HfEngine
    from spo.engines.processing import load_image

    engine: HfEngine | None = None
    facts = []
    for number, start in job.starts:
        paths = {name: job.folder / f"{name}-{number:03d}.png" for name in ("clean", "attacked")}
        record = job.folder / f"pgd-{number:03d}.json"
        if not record.is_file():
            engine = engine or _engine(job)
            result = universal_pgd(
                engine,
                load_image(str(start)),
                prompts=job.prompts,
                targets=job.targets,
                config=PgdConfig(
                    epsilon_255=job.source.epsilon_255,
                    steps=job.source.steps,
                    step_size_255=job.source.step_size_255,
                    targets=job.source.targets_per_step,
                ),
                seed=job.seed + number,
            )
            result.clean.save(paths["clean"], format="PNG")
            result.save(paths["attacked"])
            found = {"clean_loss": result.clean_loss, "attacked_loss": result.attacked_loss}
            write_atomic(record, json.dumps(found).encode())
        facts.append(json.loads(record.read_text()))
        if isinstance(job.source, AttributionSource):
            mark = job.folder / f"{_mask_name(job.source)}-{number:03d}.json"
            if not mark.is_file():
                engine = engine or _engine(job)
                _attribute(engine, job, job.source, paths["attacked"], mark)
            facts[-1] |= json.loads(mark.read_text())
    return facts


def _attribute(
    engine: Any, job: PictureJob, source: AttributionSource, picture: Path, mark: Path
) -> None:
    from spo.attacks.attribution import attribute

    found = attribute(engine, picture, prompts=job.prompts[:3], config=source, seed=job.seed)
    found.masked.save(mark.with_suffix(".png"), format="PNG")
    content = {
        "weights": found.weights.tolist(),
        "chosen": list(found.chosen),
        "score": found.score,
        "masked_score": found.masked_score,
    }
    write_atomic(mark, json.dumps(content).encode())


def _mask_name(source: AttributionSource) -> str:
    """Masks depend on more settings than the attacked pictures that they share."""
    text = json.dumps(
        [
            source.ablations,
            source.patches,
            source.top_k,
            source.keep_share,
            source.penalty,
            source.answer,
        ]
    )
    return f"masked-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _engine(job: PictureJob) -> Any:
    from spo.engines.hf.engine import HfEngine

    return HfEngine(
        job.model,
        revision=job.revision,
        dtype=job.extract.torch_dtype,
        device=job.extract.torch_devices,
        batch_size=job.extract.batch_size,
    )


def picture_pairs(
    job: PictureJob, progress: Callable[[int, int, str], None]
) -> tuple[list[PicturePair], list[dict[str, Any]]]:
    """Make all pictures of a source on the cluster.

    Returns:
        One pair for each start, and the facts of each (losses; attribution).

    Raises:
        StageError: not done within `source.timeout_s`.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    workers = min(job.extract.workers, len(job.starts))
    task = ray.remote(make_pictures).options(num_cpus=1, **job.extract.ray_options())
    parts = [list(job.starts[worker::workers]) for worker in range(workers)]
    waiting = [task.remote(replace(job, starts=part)) for part in parts]
    done: list[Any] = []
    left = float(job.source.timeout_s)
    while waiting and left > 0:
        ready, waiting = ray.wait(waiting, timeout=min(left, 10.0))
        left -= 0.0 if ready else 10.0
        done += ready
        made = len(list(job.folder.glob("pgd-*.json")))
        progress(min(made, len(job.starts)), len(job.starts), f"pictures of {job.source.label!r}")
    if waiting:
        for reference in waiting:
            ray.cancel(reference, force=True)
        raise StageError(
            f"waited {job.source.timeout_s} s for the pictures of source {job.source.label!r}; "
            "finished ones are kept: run again, or lower its steps or pictures"
        )
    facts = [fact for answer in ray.get(done) for fact in answer]
    harm = [job.folder / f"attacked-{number:03d}.png" for number, _ in job.starts]
    twin = "clean" if isinstance(job.source, AdversarialSource) else _mask_name(job.source)
    safe = [job.folder / f"{twin}-{number:03d}.png" for number, _ in job.starts]
    pairs = [PicturePair(harm=str(h), safe=str(s)) for h, s in zip(harm, safe, strict=True)]
    return pairs, facts
