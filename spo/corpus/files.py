"""The user's own files as a corpus: training prompts, evaluation sets, contrasts, calibration."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from spo.attacks.drawing import draw_text
from spo.config import (
    CorpusSettings,
    DatasetConfig,
    EvaluateConfig,
    FileSource,
    InstructionSource,
    PgdConfig,
    SourceConfig,
    TypographicSource,
)
from spo.corpus.base import (
    PICTURE_SIZE,
    AttackMaterial,
    Corpus,
    EvaluationInputs,
    Sides,
    TwoSided,
    benchmark_sets,
    greedy,
    sampled,
    target_sentences,
    with_drawn_words,
)
from spo.datasets import load_prompts
from spo.datasets.prompts import read_contrast, read_prompts
from spo.engines.processing import undecodable
from spo.errors import ConfigError, DataError
from spo.files import replaced
from spo.records import Prompt, PromptFormat, PromptKind, QuarantinedRow, Side


@dataclass(frozen=True, slots=True, kw_only=True)
class FileCorpus:
    """The user's own files; what they leave open comes from another corpus. A `Corpus`."""

    settings: CorpusSettings
    rest: Corpus
    """Asked for all that no file is named for."""
    train: Path | None
    """Training prompts (JSONL of `spo.records.Prompt`)."""
    heldout: Path | None
    """Evaluation prompts, of the same form."""

    def training_prompts(self) -> tuple[list[Prompt], list[QuarantinedRow]]:
        """The first rows of each kind whose pictures can be decoded; a share with drawn words."""
        if self.train is None:
            return self.rest.training_prompts()
        config, cache, seed = self.settings.data, self.settings.cache, self.settings.seed
        prompts, bad = read_prompts(self.train)
        prompts, damaged = _decodable(prompts)
        bad += damaged
        harm = [p for p in prompts if p.kind is PromptKind.HARM][: config.harm_prompts]
        benign = [p for p in prompts if p.kind is PromptKind.BENIGN][: config.benign_prompts]
        return with_drawn_words(harm + benign, config, cache, seed, PICTURE_SIZE), bad

    def contrast(self, source: TwoSided, seed: int) -> Sides:
        """A source that names no data set is the other corpus's."""
        return self.rest.contrast(source, seed)

    def calibration_prompts(self) -> tuple[list[Prompt], list[QuarantinedRow]]:
        """Benign prompts out of `extract.calibration`, the own contrasts, or the training prompts.

        Contrasts give theirs in turn, so that none stands for all; their unusable rows are reported
        where the contrast is read.
        """
        extract = self.settings.extract
        if extract.calibration is not None:
            found, bad = read_prompts(extract.calibration)
            found, damaged = _decodable(found)
            return self._benign(found, str(extract.calibration)), bad + damaged
        safe = []
        for number, source in enumerate(extract.sources):
            sides, _ = named_sides(source, self.settings.cache, self.settings.seed + number)
            safe.append([prompt for side, prompt in sides if side is Side.SAFE])
        turns = [p for turn in zip_longest(*safe) for p in turn if p is not None]
        if turns:
            safe_side = [replace(p, kind=PromptKind.BENIGN) for p in _decodable(turns)[0]]
            return self._benign(safe_side, "the safe side of extract.sources"), []
        if self.train is None:
            return self.rest.calibration_prompts()
        prompts, bad = self.training_prompts()
        return self._benign(prompts, f"data.train={self.train}"), bad

    def _benign(self, prompts: Sequence[Prompt], where: str) -> list[Prompt]:
        benign = [prompt for prompt in prompts if prompt.kind is PromptKind.BENIGN]
        if not benign:
            raise DataError(
                f"{where} has no usable prompt of kind 'benign' for the calibration activation and "
                f"the mean norms, got {len(prompts)} of kind 'harm'; set extract.calibration to a "
                "JSONL file of prompts with benign ones"
            )
        return [
            replace(prompt, prompt_id=f"calibration-{number:05d}")
            for number, prompt in enumerate(benign[: self.settings.extract.calibration_rows])
        ]

    def evaluation_inputs(self) -> EvaluationInputs:
        """Prompt sets, exact checks and the attack's material; all held out from training."""
        if self.heldout is None:
            return self.rest.evaluation_inputs()
        settings = self.settings.evaluate
        prompts, bad = read_prompts(self.heldout)
        harm = tuple(p for p in prompts if p.kind is PromptKind.HARM)[: settings.harm_prompts]
        benign = tuple(p for p in prompts if p.kind is PromptKind.BENIGN)[: settings.scenes]
        sets = [sampled("plain", harm, settings)]
        start, targets = _attack_material(settings)
        if start is not None:
            pictured = tuple(replace(prompt, image=str(start)) for prompt in harm)
            sets.append(sampled("image", pictured, settings))
        if benign:
            sets.append(greedy("benign", benign, settings.caption_tokens))
        benchmarks = benchmark_sets(self.settings)
        sets += [part for part, _ in benchmarks]
        if not harm:
            raise DataError(f"{self.heldout} has no prompt of kind 'harm' to evaluate on")
        training = [] if start is None else self.training_prompts()[0]
        return EvaluationInputs(
            sets=tuple(sets),
            checks={part.condition: check for part, check in benchmarks if check},
            attack_starts=() if start is None else (start,),
            attack_targets=targets,
            attack_prompts=tuple(_harmful(training)[:16]),
            attacked="image" if start is not None else None,
            quarantined=tuple(bad),
        )

    def attack_starts(self, count: int, seed: int) -> list[Path]:
        """A source that names no pictures takes the other corpus's."""
        return self.rest.attack_starts(count, seed)

    def attack_prompts(self, count: int, seed: int) -> list[Prompt]:
        """A source that names no prompts takes the other corpus's."""
        return self.rest.attack_prompts(count, seed)

    def attack_targets(self, count: int, seed: int) -> list[str]:
        """A source that names no targets takes the other corpus's."""
        return self.rest.attack_targets(count, seed)

    def loop_attack(self, prompts: Sequence[Prompt], seed: int) -> AttackMaterial:
        """The training prompts' own pictures and words, and the sentences of a file."""
        if self.train is None:
            return self.rest.loop_attack(prompts, seed)
        pictures = dict.fromkeys(p.image for p in prompts if p.image is not None)
        file = self.settings.data.attack_targets_file
        if not pictures or file is None:
            raise ConfigError(
                "data.attacks needs training prompts with pictures to start from, and "
                "data.attack_targets_file (one harmful sentence a line, others than the "
                f"evaluation's); got {len(pictures)} pictures and {file}"
            )
        return AttackMaterial(
            requests=_harmful(prompts)[:16],
            starts=[Path(path) for path in list(pictures)[: self.settings.data.attacked_pictures]],
            targets=target_sentences(file),
        )


def names_data(source: SourceConfig) -> bool:
    """Whether the contrast of a source is the user's own data."""
    if isinstance(source, FileSource):
        return True
    return isinstance(source, TwoSided) and source.harm is not None


def named_sides(source: SourceConfig, cache: Path, seed: int) -> tuple[Sides, list[QuarantinedRow]]:
    """Both sides of a contrast of the user's own data, at most `source.rows` prompts each.

    Args:
        source: any source; one that names no data, or makes its own pictures, has no side here.
        cache: folder of drawn pictures and of pictures that come as bytes.
        seed: draws the rows of a data set that has more.

    Returns:
        The sides, and rows of a file that cannot be used.
    """
    if isinstance(source, FileSource):
        found, bad = read_contrast(source.path)
        rows = {s: [p for where, p in found if where is s][: source.rows] for s in Side}
        return [(side, prompt) for side, prompts in rows.items() for prompt in prompts], bad
    if not isinstance(source, TwoSided) or source.harm is None or source.safe is None:
        return [], []
    return [
        (side, _formed(prompt, source, cache))
        for side, data in ((Side.HARM, source.harm), (Side.SAFE, source.safe))
        for prompt in _read(data, source.rows, cache, seed)
    ], []


def _read(config: DatasetConfig, rows: int, cache: Path, seed: int) -> list[Prompt]:
    wanted = config.model_copy(update={"rows": min(rows, config.rows or rows)})
    return load_prompts(wanted, cache=cache, seed=seed)[:rows]


def _formed(prompt: Prompt, source: TwoSided, cache: Path) -> Prompt:
    """The prompt as its kind of source is read."""
    if isinstance(source, TypographicSource):
        return _drawn(prompt, source, cache)
    chat = isinstance(source, InstructionSource)
    return replace(prompt, format=PromptFormat.CHAT if chat else PromptFormat.PLAIN)


def _drawn(prompt: Prompt, source: TypographicSource, cache: Path) -> Prompt:
    """The prompt with its own picture, or with its words drawn into one."""
    if prompt.image is not None:
        return prompt
    words = prompt.text
    name = hashlib.sha256(f"{source.picture_size}/{words}".encode()).hexdigest()[:24]
    path = cache / "typographic" / f"{name}.png"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as part:
            draw_text(words, source.picture_size).save(part, format="PNG")
    return replace(prompt, text=source.request, image=str(path))


def _harmful(prompts: Sequence[Prompt]) -> list[Prompt]:
    return [prompt for prompt in prompts if prompt.kind is PromptKind.HARM]


def _decodable(prompts: list[Prompt]) -> tuple[list[Prompt], list[QuarantinedRow]]:
    """Prompts whose picture can be decoded, and the others with the reason."""
    reasons = undecodable(prompts)
    good = [prompt for prompt in prompts if prompt.image not in reasons]
    bad = [
        QuarantinedRow(row_id=prompt.prompt_id, reason=reasons[prompt.image])
        for prompt in prompts
        if prompt.image in reasons
    ]
    return good, bad


def _attack_material(config: EvaluateConfig) -> tuple[Path | None, tuple[str, ...]]:
    """Clean picture and target sentences of picture attacks on a user's own prompts."""
    if not any(isinstance(attack, PgdConfig) for attack in config.attacks):
        return None, ()
    if config.attack_targets_file is None or config.attack_picture is None:
        raise ConfigError(
            "a picture attack on your own prompts needs evaluate.attack_picture (a clean picture) "
            "and evaluate.attack_targets_file (one harmful sentence a line); without a picture "
            "attack set evaluate.attacks=[]"
        )
    return config.attack_picture, target_sentences(config.attack_targets_file)
