"""The attacker in the loop of Stage II: some training prompts come with attacked pictures.

Pictures are made once, before the first step, on training prompts and training targets only, blind
or (an `adaptive` attack) through the vector of `learn.start`. They are kept under a digest in the
run's folder, so a resumed run trains on the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from spo.actors.picture_tasks import AttackJob, Workshop, pictures_of
from spo.artifact import SteeringArtifact
from spo.attacks.objectives import wanted
from spo.config import DataConfig, PgdConfig
from spo.corpus.base import AttackMaterial, Corpus, harmful_share
from spo.progress import Reporter
from spo.records import Prompt

_FOLDER = "attack-training"
_OTHER_TARGETS = 4099
"""Added to the seed: the evaluation's attacks aim at other sentences."""


def with_attacked(
    prompts: Sequence[Prompt],
    data: DataConfig,
    *,
    corpus: Corpus,
    start: SteeringArtifact,
    workshop: Workshop,
    reporter: Reporter,
) -> list[Prompt]:
    """The training prompts, a share of the harmful ones with an attacked picture.

    Ray must be connected when `data.attacks` has any. Prompts are chosen by a hash of their ids.

    Args:
        prompts: the training prompts.
        data: attacks, and the share of the prompts.
        corpus: gives what the attacks are made from.
        start: the vector that adaptive attacks go through.
        workshop: with what they are made.
        reporter: told how far it is.

    Raises:
        ConfigError: there is no clean picture or no target sentence to attack with.
        StageError: an attack failed or took too long.
    """
    if not data.attacks or not data.attacked_fraction:
        return list(prompts)
    material = corpus.loop_attack(prompts, workshop.seed + _OTHER_TARGETS)
    jobs = _jobs(data.attacks, material, start, workshop)
    reporter.stage(f"Attack {len(material.starts)} training picture(s) for Stage II")
    made = pictures_of(jobs, reporter.note, reporter.step)
    pictures = [made[job.name]["attacked"] for job in jobs]
    chosen = harmful_share(prompts, data.attacked_fraction, f"attacked/{workshop.seed}")
    places = {prompt.prompt_id: place for place, prompt in enumerate(chosen)}

    def attacked(prompt: Prompt) -> Prompt:
        place = places.get(prompt.prompt_id)
        if place is None:
            return prompt
        picture = pictures[place % len(pictures)]
        if not material.asks_requests:
            return replace(prompt, image=picture)
        request = material.requests[place // len(pictures) % len(material.requests)]
        return replace(request, prompt_id=f"{prompt.prompt_id}-attacked", image=picture)

    return [attacked(prompt) for prompt in prompts]


def _jobs(
    attacks: Sequence[PgdConfig],
    material: AttackMaterial,
    start: SteeringArtifact,
    workshop: Workshop,
) -> list[AttackJob]:
    start_name, model = workshop.start, workshop.model
    return [
        AttackJob(
            name=f"{attack.name}-{number}--{start_name if attack.adaptive else 'none'}",
            attack=attack.name,
            defence=start_name if attack.adaptive else "none",
            model=attack.made_on or model.path,
            revision=None if attack.made_on else model.revision,
            picture=picture,
            folder=workshop.run_dir / _FOLDER,
            prompts=material.requests,
            targets=wanted(attack.objective, material.targets),
            config=attack,
            place=workshop.place,
            seed=workshop.seed + _OTHER_TARGETS + number,
            vector=start.vector.to_bytes() if attack.adaptive else b"",
            steering=start.spec(start_name) if attack.adaptive else None,
        )
        for attack in attacks
        for number, picture in enumerate(material.starts)
    ]
