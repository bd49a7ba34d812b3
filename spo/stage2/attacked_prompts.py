"""The attacker in the loop of Stage II: some training prompts come with attacked pictures.

Pictures are made once, before the first step, on training prompts and training targets only, blind
or (an `adaptive` attack) through the vector of `learn.start`. They are kept under a digest in the
run's folder, so a resumed run trains on the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spo.actors.picture_tasks import AttackJob, pictures_of
from spo.artifact import SteeringArtifact
from spo.config import RunConfig
from spo.corpus.base import harmful_share, target_sentences
from spo.errors import ConfigError
from spo.progress import Reporter
from spo.records import Prompt, PromptKind
from spo.resolve import TESTBED, ResolvedModel

_FOLDER = "attack-training"
_OTHER_TARGETS = 4099
"""Added to the seed: the evaluation's attacks aim at other sentences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Material:
    """What attacks in the loop are made from."""

    requests: list[Prompt]
    """Prompts that a picture is to work on."""
    starts: list[Path]
    """Clean pictures."""
    targets: tuple[str, ...]


def with_attacked(
    prompts: Sequence[Prompt],
    config: RunConfig,
    start: SteeringArtifact,
    model: ResolvedModel,
    reporter: Reporter,
) -> list[Prompt]:
    """The training prompts, a share of the harmful ones with an attacked picture.

    Ray must be connected when `data.attacks` has any. Prompts are chosen by a hash of their ids.

    Raises:
        ConfigError: there is no clean picture or no target sentence to attack with.
        StageError: an attack failed or took too long.
    """
    if not config.data.attacks or not config.data.attacked_fraction:
        return list(prompts)
    material = _material(prompts, config)
    jobs = _jobs(config, material, start, model)
    reporter.stage(f"Attack {len(material.starts)} training picture(s) for Stage II")
    made = pictures_of(jobs, reporter.note, reporter.step)
    pictures = [made[job.name]["attacked"] for job in jobs]
    chosen = harmful_share(prompts, config.data.attacked_fraction, f"attacked/{config.seed}")
    places = {prompt.prompt_id: place for place, prompt in enumerate(chosen)}

    def attacked(prompt: Prompt) -> Prompt:
        place = places.get(prompt.prompt_id)
        if place is None:
            return prompt
        picture = pictures[place % len(pictures)]
        if config.data.train != TESTBED:
            return replace(prompt, image=picture)
        request = material.requests[place // len(pictures) % len(material.requests)]
        return replace(request, prompt_id=f"{prompt.prompt_id}-attacked", image=picture)

    return [attacked(prompt) for prompt in prompts]


def _material(prompts: Sequence[Prompt], config: RunConfig) -> _Material:
    count = config.data.attacked_pictures
    if config.data.train == TESTBED:
        from spo.testbed import data

        scenes = data.draw_scenes(config.cache, "train", count, config.seed + _OTHER_TARGETS)
        starts = [path for _, path in scenes]
        return _Material(
            requests=data.picture_requests("train", image=starts[0]),
            starts=starts,
            targets=tuple(data.attack_targets(16, config.seed + _OTHER_TARGETS)),
        )
    pictures = dict.fromkeys(p.image for p in prompts if p.image is not None)
    file = config.data.attack_targets_file
    if not pictures or file is None:
        raise ConfigError(
            "data.attacks needs training prompts with pictures to start from, and "
            "data.attack_targets_file (one harmful sentence a line, others than the evaluation's); "
            f"got {len(pictures)} pictures and {file}"
        )
    harm = [prompt for prompt in prompts if prompt.kind is PromptKind.HARM]
    return _Material(
        requests=harm[:16],
        starts=[Path(path) for path in list(pictures)[:count]],
        targets=target_sentences(file),
    )


def _jobs(
    config: RunConfig, material: _Material, start: SteeringArtifact, model: ResolvedModel
) -> list[AttackJob]:
    start_name = config.learn.start
    return [
        AttackJob(
            name=f"{attack.name}-{number}--{start_name if attack.adaptive else 'none'}",
            model=attack.made_on or model.path,
            revision=None if attack.made_on else model.revision,
            picture=picture,
            folder=config.run_dir / _FOLDER,
            prompts=material.requests,
            targets=material.targets,
            config=attack,
            place=config.attack_place,
            seed=config.seed + _OTHER_TARGETS + number,
            vector=start.vector.to_bytes() if attack.adaptive else b"",
            steering=start.spec(start_name) if attack.adaptive else None,
        )
        for attack in config.data.attacks
        for number, picture in enumerate(material.starts)
    ]
