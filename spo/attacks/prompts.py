"""Attacks that rewrite requests, text or picture, without looking at the model; all by name.

Adding one: a function of prompts and `Material` here, a line in `ATTACKS`, a test. Another package
adds an `Attack` by an entry point of group `spo.attacks`. The pixel attack, `pgd`, needs gradients
of the model and lies in `spo.attacks.pgd`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from spo import plugins
from spo.attacks.templates import template_prompts
from spo.attacks.typographic import typographic_prompts
from spo.records import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What an attack on requests may use."""

    draw: Callable[[str], Image.Image]
    """Renders words, with line breaks, as a picture of the size that the model takes."""
    folder: Path
    """Where pictures may be kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """How an attack makes its prompts.

    Example:
        Attack(rewrite=lambda prompts, material: template_prompts(prompts))
    """

    rewrite: Callable[[Sequence[Prompt], Material], Sequence[Prompt]] | None
    """Harmful requests -> the attacked ones, with prompt ids of their own or the same; None: it
    changes pixels by the model's gradients."""


def _template(prompts: Sequence[Prompt], material: Material) -> Sequence[Prompt]:
    del material
    return template_prompts(prompts)


def _typographic(prompts: Sequence[Prompt], material: Material) -> Sequence[Prompt]:
    return typographic_prompts(prompts, material.draw, material.folder)


ATTACKS: dict[str, Attack] = {
    "pgd": Attack(rewrite=None),
    "typographic": Attack(rewrite=_typographic),
    "template": Attack(rewrite=_template),
}


def attack_of(kind: str) -> Attack:
    """The attack of a kind, built in or added by another package."""
    found: Attack = plugins.find(plugins.ATTACKS, kind)
    return found
