"""Rows of the evaluation matrix: `attacked_sets` turns prompt sets into attacked ones.

Pictures of an attack are made once a run and kept with their curves in `attack/NAME.json`; the same
configuration finds them again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from spo.actors.picture_tasks import AttackJob, Workshop, pictures_of
from spo.attacks.drawing import draw_text
from spo.attacks.objectives import wanted
from spo.attacks.prompts import Material, rewritten
from spo.config import AttackConfig, EvaluateConfig, PgdConfig
from spo.corpus.base import PICTURE_SIZE, EvaluationInputs
from spo.evaluation.defences import UNDEFENDED, Defence
from spo.files import write_atomic
from spo.progress import Reporter
from spo.records import Attacked, Prompt, PromptSet

_Curves = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]
"""(attack, defence) to the curves and pictures of the attack's independent runs."""


def attacked_sets(
    config: EvaluateConfig,
    inputs: EvaluationInputs,
    defences: Sequence[Defence],
    workshop: Workshop,
    reporter: Reporter,
) -> list[PromptSet]:
    """One more prompt set for each attack, and success curves of the picture attacks."""
    sets = {part.condition: part for part in inputs.sets}
    made: list[PromptSet] = []
    by_gradients = [attack for attack in config.attacks if isinstance(attack, PgdConfig)]
    pictures = _pictures(by_gradients, inputs, defences, workshop, reporter)
    for attack in config.attacks:
        if not isinstance(attack, PgdConfig):
            base = sets["plain"]
            material = Material(
                attack=attack,
                draw=lambda words: draw_text(words, inputs.picture_size or PICTURE_SIZE),
                folder=workshop.run_dir / "attack" / attack.name,
            )
            prompts = tuple(rewritten(base.prompts, material))
            how = _attacked(base, attack)
            made.append(replace(base, condition=attack.name, prompts=prompts, attack=how))
        elif inputs.attacked is not None:
            made.append(_with_pictures(sets[inputs.attacked], attack, defences, pictures))
            if attack.target == "corpus":
                few = sets[inputs.attacked].prompts[: config.curve_prompts]
                made += _curve_sets(replace(sets[inputs.attacked], prompts=few), attack, pictures)
    return made


def _attacked(base: PromptSet, attack: AttackConfig, step: int | None = None) -> Attacked:
    return Attacked(
        attack=attack.name,
        kind=attack.kind,
        base=base.condition,
        blind=_blind(attack).name if isinstance(attack, PgdConfig) and attack.adaptive else "",
        step=step,
    )


def _blind(attack: PgdConfig) -> PgdConfig:
    """The same attack, made on the unsteered model."""
    return attack.model_copy(update={"adaptive": False})


def _with_pictures(
    base: PromptSet,
    attack: PgdConfig,
    defences: Sequence[Defence],
    pictures: _Curves,
) -> PromptSet:
    def shown(defence: str) -> tuple[Prompt, ...]:
        return tuple(
            replace(
                prompt,
                prompt_id=_with_picture(prompt.prompt_id, number),
                image=curve.get("pictures", {}).get(prompt.prompt_id, curve["attacked"]),
            )
            for number, curve in enumerate(pictures[attack.name, defence])
            for prompt in base.prompts
        )

    several = range(1, len(pictures[attack.name, UNDEFENDED.name]))
    adaptive = {d.name: shown(d.name) for d in defences if (attack.name, d.name) in pictures}
    return replace(
        base,
        condition=f"{base.condition} {attack.name}",
        prompts=shown(UNDEFENDED.name),
        by_defence={name: part for name, part in adaptive.items() if name != UNDEFENDED.name},
        attack=_attacked(base, attack),
        pictures_of={
            _with_picture(prompt.prompt_id, number): prompt.prompt_id
            for number in several
            for prompt in base.prompts
        },
    )


def _with_picture(prompt_id: str, number: int) -> str:
    """Id of a prompt that is shown picture `number`, from 0, of an attack."""
    return f"{prompt_id}@{number}" if number else prompt_id


def _curve_sets(base: PromptSet, attack: PgdConfig, pictures: _Curves) -> list[PromptSet]:
    """The set at every checkpoint of the first picture; for the attacked defence only."""
    return [
        replace(
            base,
            condition=f"curve {attack.name} {defence} {look['step']}",
            prompts=tuple(replace(prompt, image=look["image"]) for prompt in base.prompts),
            only=defence,
            attack=_attacked(base, attack, look["step"]),
        )
        for (name, defence), (curve, *_) in pictures.items()
        if name == attack.name == curve["attack"] and base.prompts
        for look in curve["checkpoints"]
    ]


def _pictures(
    attacks: Sequence[PgdConfig],
    inputs: EvaluationInputs,
    defences: Sequence[Defence],
    workshop: Workshop,
    reporter: Reporter,
) -> _Curves:
    """The pictures and curves of all attacks, made where they are not there yet."""
    if inputs.attacked is None or not inputs.attack_starts:
        return {}
    jobs: dict[tuple[str, str], list[AttackJob]] = {}
    for attack in attacks:
        for defence in defences if attack.adaptive else [UNDEFENDED]:
            jobs[attack.name, defence.name] = [
                _job(inputs, attack, defence, workshop, number) for number in range(attack.pictures)
            ]
    every = [job for several in jobs.values() for job in several]
    made = pictures_of(every, reporter.note, reporter.step)
    found = {key: [made[job.name] for job in several] for key, several in jobs.items()}
    if found:
        firsts = [several[0] for several in found.values()]
        widest = max(firsts, key=lambda c: (c["defence"] == "none", c["epsilon_255"]))
        each = {(c["attack"], c["defence"]): c for c in firsts}
        index = {**widest, "curves": list(each.values())}
        write_atomic(workshop.run_dir / "attack.json", json.dumps(index).encode())
    return found


def _job(
    inputs: EvaluationInputs,
    attack: PgdConfig,
    defence: Defence,
    workshop: Workshop,
    number: int,
) -> AttackJob:
    if defence is UNDEFENDED:  # without a defence the adaptive attack is the blind one
        attack = _blind(attack)
    each = attack.target == "prompt"
    attacked = next(part for part in inputs.sets if part.condition == inputs.attacked)
    prompts = attacked.prompts if each else inputs.attack_prompts
    targets = wanted(attack.objective, inputs.attack_targets)
    if each:
        targets = tuple(targets[i % len(targets)] for i in range(len(prompts)))
    return AttackJob(
        name=f"{attack.name}--{defence.name}{f'@{number}' if number else ''}",
        attack=attack.name,
        defence=defence.name,
        model=attack.made_on or workshop.model.path,
        revision=None if attack.made_on else workshop.model.revision,
        picture=inputs.attack_starts[number % len(inputs.attack_starts)],
        folder=workshop.run_dir / "attack",
        prompts=defence.asked(prompts),
        targets=targets,
        config=attack,
        place=workshop.place,
        seed=workshop.seed + number,
        vector=defence.vector,
        steering=defence.spec,
    )
