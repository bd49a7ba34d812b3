"""Adversarial pictures for Stage I, made on the cluster: PGD, and ASTRA's masked twins.

Every picture is kept under the digest of what it depends on, so sources share pictures and an
interrupted run makes only the missing ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from spo.artifact import write_atomic
from spo.config import AdversarialSource, AttackConfig, AttributionSource, ExtractConfig
from spo.errors import StageError
from spo.records import Prompt

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
                config=AttackConfig(
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
        dtype=job.extract.dtype,
        device="cuda" if job.extract.num_gpus else "cpu",
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
    share = {"num_cpus": 1, "num_gpus": job.extract.num_gpus}
    task = ray.remote(make_pictures).options(**share)
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
