"""Rows of the evaluation matrix: `attacked_sets` turns prompt sets into attacked ones.

Pictures of an attack are made once a run and kept with their curves in `attack/NAME.json`; the same
configuration finds them again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from spo.actors.picture_tasks import AttackJob, pictures_of
from spo.attacks.drawing import draw_text
from spo.attacks.templates import template_prompts
from spo.attacks.typographic import typographic_prompts
from spo.config import AttackConfig, RunConfig
from spo.corpus.base import PICTURE_SIZE, EvaluationInputs
from spo.evaluation.defences import UNDEFENDED, Defence
from spo.evaluation.results import with_picture
from spo.files import write_atomic
from spo.progress import Reporter
from spo.records import Prompt, PromptSet
from spo.resolve import ResolvedModel

_Curves = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]
"""(attack, defence) to the curves and pictures of the attack's independent runs."""


def attacked_sets(
    config: RunConfig,
    inputs: EvaluationInputs,
    defences: Sequence[Defence],
    model: ResolvedModel,
    reporter: Reporter,
) -> list[PromptSet]:
    """One more prompt set for each attack, and success curves of the picture attacks."""
    sets = {part.condition: part for part in inputs.sets}
    made: list[PromptSet] = []
    pictures = _pictures(config, inputs, defences, model, reporter)
    for attack in config.evaluate.attacks:
        if attack.kind == "template":
            base = sets["plain"]
            prompts = tuple(template_prompts(base.prompts))
            made.append(replace(base, condition=attack.name, prompts=prompts))
        elif attack.kind == "typographic":
            base = sets["plain"]
            drawn = typographic_prompts(
                base.prompts,
                lambda words: draw_text(words, inputs.picture_size or PICTURE_SIZE),
                config.run_dir / "attack" / "typographic",
            )
            made.append(replace(base, condition=attack.name, prompts=tuple(drawn)))
        elif inputs.attacked is not None:
            made.append(_with_pictures(sets[inputs.attacked], attack, defences, pictures))
            if attack.target == "corpus":
                made += _curve_sets(config, sets[inputs.attacked], attack, pictures)
    return made


def _with_pictures(
    base: PromptSet,
    attack: AttackConfig,
    defences: Sequence[Defence],
    pictures: _Curves,
) -> PromptSet:
    def shown(defence: str) -> tuple[Prompt, ...]:
        return tuple(
            replace(
                prompt,
                prompt_id=with_picture(prompt.prompt_id, number),
                image=curve.get("pictures", {}).get(prompt.prompt_id, curve["attacked"]),
            )
            for number, curve in enumerate(pictures[attack.name, defence])
            for prompt in base.prompts
        )

    adaptive = {d.name: shown(d.name) for d in defences if (attack.name, d.name) in pictures}
    return replace(
        base,
        condition=f"{base.condition} {attack.name}",
        prompts=shown(UNDEFENDED.name),
        by_defence={name: part for name, part in adaptive.items() if name != UNDEFENDED.name},
    )


def _curve_sets(
    config: RunConfig,
    base: PromptSet,
    attack: AttackConfig,
    pictures: _Curves,
) -> list[PromptSet]:
    """The attacked set at every checkpoint of the first picture, on fewer prompts; for the attacked
    defence only."""
    few = base.prompts[: config.evaluate.curve_prompts]
    return [
        replace(
            base,
            condition=f"curve {attack.name} {defence} {look['step']}",
            prompts=tuple(replace(prompt, image=look["image"]) for prompt in few),
            only=defence,
        )
        for (name, defence), (curve, *_) in pictures.items()
        if name == attack.name == curve["attack"] and few
        for look in curve["checkpoints"]
    ]


def _pictures(
    config: RunConfig,
    inputs: EvaluationInputs,
    defences: Sequence[Defence],
    model: ResolvedModel,
    reporter: Reporter,
) -> _Curves:
    """The pictures and curves of all attacks, made where they are not there yet."""
    if inputs.attacked is None or not inputs.attack_starts:
        return {}
    jobs: dict[tuple[str, str], list[AttackJob]] = {}
    for attack in config.evaluate.attacks:
        if attack.kind == "pgd":
            for defence in defences if attack.adaptive else [UNDEFENDED]:
                jobs[attack.name, defence.name] = [
                    _job(config, inputs, attack, defence, model, number)
                    for number in range(attack.pictures)
                ]
    every = [job for several in jobs.values() for job in several]
    made = pictures_of(every, reporter.note, reporter.step)
    found = {key: [made[job.name] for job in several] for key, several in jobs.items()}
    if found:
        firsts = [several[0] for several in found.values()]
        widest = max(firsts, key=lambda c: (c["defence"] == "none", c["epsilon_255"]))
        each = {(c["attack"], c["defence"]): c for c in firsts}
        index = {**widest, "curves": list(each.values())}
        write_atomic(config.run_dir / "attack.json", json.dumps(index).encode())
    return found


def _job(
    config: RunConfig,
    inputs: EvaluationInputs,
    attack: AttackConfig,
    defence: Defence,
    model: ResolvedModel,
    number: int,
) -> AttackJob:
    if defence is UNDEFENDED:  # without a defence the adaptive attack is the blind one
        attack = attack.model_copy(update={"adaptive": False})
    each = attack.target == "prompt"
    attacked = next(part for part in inputs.sets if part.condition == inputs.attacked)
    prompts = attacked.prompts if each else inputs.attack_prompts
    targets = inputs.attack_targets
    if each:
        targets = tuple(targets[i % len(targets)] for i in range(len(prompts)))
    return AttackJob(
        name=f"{attack.name}--{defence.name}{f'@{number}' if number else ''}",
        model=attack.made_on or model.path,
        revision=None if attack.made_on else model.revision,
        picture=inputs.attack_starts[number % len(inputs.attack_starts)],
        folder=config.run_dir / "attack",
        prompts=defence.asked(prompts),
        targets=targets,
        config=attack,
        place=config.attack_place,
        seed=config.seed + number,
        vector=defence.vector,
        steering=defence.spec,
    )
