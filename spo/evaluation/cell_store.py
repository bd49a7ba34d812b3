"""Finished cells of the matrix on disk: an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from spo.evaluation.defences import Defence
from spo.files import write_atomic
from spo.records import EvaluatedAnswer, Prompt, PromptSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Everything measured on one condition under one defence."""

    answers: tuple[EvaluatedAnswer, ...]
    reasons: Mapping[str, str]
    """Rows and measures left out, with why."""
    cost: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class CellStore:
    """A folder of finished cells, each named by a digest of everything that it depends on."""

    folder: Path
    identity: str
    """What all cells depend on: model, judges, scorers, seed."""

    def path(self, prompt_set: PromptSet, defence: Defence) -> Path:
        """File of one cell; other inputs, another file."""
        sampling = (prompt_set.samples, prompt_set.max_tokens, prompt_set.temperature)
        prompts = prompt_set.prompts_for(defence.name)
        parts = (
            *(self.identity, defence.sha256, repr(defence.spec), repr(sampling)),
            *(repr(prompts), repr(prompt_set.prompts), repr(sorted(prompt_set.references.items()))),
            *_picture_hashes(prompts),
        )
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        name = re.sub(r"[^\w.-]+", "_", f"{prompt_set.condition}--{defence.name}")
        return self.folder / f"{name}-{digest}.json"

    def load(self, path: Path) -> Cell | None:
        """A finished cell, or None where there is none or it cannot be read."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return Cell(
                answers=tuple(EvaluatedAnswer(**answer) for answer in content["answers"]),
                reasons=content["reasons"],
                cost=content["cost"],
            )
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def save(self, path: Path, cell: Cell) -> None:
        """Keep a finished cell, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(asdict(cell), allow_nan=False).encode())


def _picture_hashes(prompts: Sequence[Prompt]) -> list[str]:
    pictures = sorted({prompt.image for prompt in prompts if prompt.image})
    return [hashlib.sha256(Path(picture).read_bytes()).hexdigest() for picture in pictures]
