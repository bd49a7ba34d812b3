"""Columns of the evaluation matrix: what defends the model, published and ready to be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spo.artifact import SteeringArtifact, located
from spo.config.evaluation import DefenceConfig
from spo.engines.base import Sampler
from spo.progress import Reporter
from spo.records import Prompt, PromptSet, SteeringSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Defence:
    """One column of the matrix, ready to be asked."""

    name: str
    spec: SteeringSpec | None = None
    """How its requests are steered; None leaves the model as it is."""
    sha256: str = ""
    """Content that its vector must have; "" without one."""
    vector: bytes = b""
    """The vector itself, for attacks that go through the defence."""
    reminder: str = ""
    """Words put before every request; "" for none."""

    def asked(self, prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
        """The prompts as this defence hands them to the model."""
        if not self.reminder:
            return tuple(prompts)
        return tuple(replace(p, text=f"{self.reminder}\n{p.text}") for p in prompts)


UNDEFENDED = Defence(name="none")


def open_defences(
    configs: Sequence[DefenceConfig], run_dir: Path, engine: Sampler, reporter: Reporter
) -> list[Defence]:
    """The unsteered model and every configured defence whose artifact is there, published."""
    found = [UNDEFENDED]
    for settings in configs:
        if settings.reminder is not None:
            found.append(Defence(name=settings.name, reminder=settings.reminder))
            continue
        folder = run_dir / located(settings.artifact or Path())
        if not folder.is_dir():
            reporter.note(f"defence {settings.name!r} left out: there is no {folder}")
            continue
        found.append(_published(settings, folder, engine))
    return found


def _published(settings: DefenceConfig, folder: Path, engine: Sampler) -> Defence:
    held = engine.info
    artifact = SteeringArtifact.load(
        folder, model_id=held.model_id, model_revision=held.model_revision
    )
    name = f"evaluated-{settings.name}"
    engine.publish(name, artifact.vector, 0)
    spec = SteeringSpec(
        vector=name,
        version=0,
        coefficient=settings.coefficient or artifact.coefficient,
        operator=settings.operator or artifact.operator,
        positions=artifact.positions,
    )
    return Defence(
        name=settings.name,
        spec=spec,
        vector=artifact.vector.to_bytes(),
        sha256=artifact.vector.sha256,
    )


def with_defences(prompt_set: PromptSet, defences: Sequence[Defence]) -> PromptSet:
    """The set with the prompts of defences that change them."""
    changed = {
        defence.name: defence.asked(prompt_set.prompts_for(defence.name))
        for defence in defences
        if defence.reminder
    }
    return replace(prompt_set, by_defence={**prompt_set.by_defence, **changed})
