"""Evaluations written before attacks had fields: their conditions' names are read, here alone.

Such a name is "describe pgd-16", or "curve pgd-16 stage1 8" for a point of a strength curve; the
prompt of a further picture of an attack is "held-3@1".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from spo.records import Attacked, EvaluatedAnswer

_ATTACK = re.compile(
    r"(?P<adaptive>adaptive-|transfer-)?pgd(-compliance)?(-each)?-(unbounded|\d[\d.e+-]*)"
)
_PICTURE = re.compile(r"(?P<prompt>.+)@\d+")


def attacks_of_names(answers: Sequence[EvaluatedAnswer]) -> dict[str, Attacked]:
    """How the conditions of old answers were attacked."""
    pairs = dict.fromkeys((answer.condition, answer.defence) for answer in answers)
    found = {condition: _attacked(condition, defence) for condition, defence in pairs}
    return {condition: made for condition, made in found.items() if made is not None}


def with_picture_ids(answers: Sequence[EvaluatedAnswer]) -> list[EvaluatedAnswer]:
    """Old answers, those to another picture of the same prompt with the id that they share."""
    known = {(answer.condition, answer.prompt_id) for answer in answers}

    def shared(answer: EvaluatedAnswer) -> str:
        parts = _PICTURE.fullmatch(answer.prompt_id)
        prompt = parts["prompt"] if parts else ""
        return prompt if (answer.condition, prompt) in known else ""

    return [replace(answer, picture_of=shared(answer)) for answer in answers]


def _attacked(condition: str, defence: str) -> Attacked | None:
    if condition in ("typographic", "template"):
        return Attacked(attack=condition, kind=condition, base="plain")
    base, _, name = condition.rpartition(" ")
    step = None
    point = re.fullmatch(rf"curve (?P<attack>\S+) {re.escape(defence)} (?P<step>\d+)", condition)
    if point is not None:
        base, name, step = "", point["attack"], int(point["step"])
    parts = _ATTACK.fullmatch(name)
    if parts is None:
        return None
    blind = name.removeprefix("adaptive-") if parts["adaptive"] == "adaptive-" else ""
    return Attacked(attack=name, kind="pgd", base=base, blind=blind, step=step)
