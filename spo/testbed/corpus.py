"""The testbed's prompts as a corpus: training prompts, evaluation sets with their checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spo.config import CorpusSettings, PgdConfig
from spo.corpus.base import (
    AttackMaterial,
    EvaluationInputs,
    Sides,
    TwoSided,
    benchmark_sets,
    greedy,
    sampled,
    with_drawn_words,
)
from spo.records import Prompt, PromptFormat, PromptKind, QuarantinedRow
from spo.testbed import data, text


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedCorpus:
    """Everything out of the testbed's grammars and scenes, by seed. A `Corpus`."""

    settings: CorpusSettings
    tokenizer: Callable[[], Any]
    """Opens the tokenizer of the model, which cuts the reference texts of an evaluation."""

    def training_prompts(self) -> tuple[list[Prompt], list[QuarantinedRow]]:
        """Openings, requests and questions of the grammars; a share of them with drawn words."""
        config, cache, seed = self.settings.data, self.settings.cache, self.settings.seed
        prompts = data.training_prompts(
            cache,
            harm=config.harm_prompts,
            benign=config.benign_prompts,
            image_fraction=config.image_fraction,
            seed=seed,
        )
        return with_drawn_words(prompts, config, cache, seed, data.PICTURE_SIZE), []

    def contrast(self, source: TwoSided, seed: int) -> Sides:
        """Sentences of the grammars, or their words drawn into pictures."""
        rows = data.contrast(source.kind, source.rows, self.settings.cache, seed)
        return [(side, prompt) for side, prompt, _ in rows]

    def calibration_prompts(self) -> tuple[list[Prompt], list[QuarantinedRow]]:
        """Neutral openings and pictures to describe."""
        count, seed = self.settings.extract.calibration_rows, self.settings.seed
        return data.calibration_prompts(self.settings.cache, count=count, seed=seed), []

    def evaluation_inputs(self) -> EvaluationInputs:
        """Prompt sets, exact checks and the attack's material; held out from training."""
        settings, cache, seed = self.settings.evaluate, self.settings.cache, self.settings.seed
        picture = data.clean_picture(cache, seed)
        captions, questions = data.heldout_scenes(cache, count=settings.scenes, seed=seed)
        openings = tuple(data.heldout_openings(count=settings.harm_prompts, seed=seed, image=None))
        pictured = tuple(
            data.heldout_openings(count=settings.harm_prompts, seed=seed, image=picture)
        )
        requests = tuple(data.picture_requests("heldout", image=picture)[: settings.harm_prompts])
        twins = data.benign_twins(count=settings.benign_prompts, seed=seed)
        texts, references = data.benign_texts(count=settings.benign_prompts, seed=seed)
        attacks = [attack for attack in settings.attacks if isinstance(attack, PgdConfig)]
        benchmarks = benchmark_sets(self.settings)
        return EvaluationInputs(
            sets=(
                sampled("plain", openings, settings),
                sampled("image", pictured, settings),
                sampled("describe", requests, settings),
                greedy("caption", tuple(captions), settings.caption_tokens),
                replace(greedy("question", tuple(questions), settings.max_tokens), alignment=False),
                sampled("twin", tuple(twins), settings),
                replace(
                    sampled("text", tuple(texts), settings), references=self._tokens(references)
                ),
                *(part for part, _ in benchmarks),
            ),
            checks={
                "caption": data.check_caption,
                "question": data.check_question,
                **{part.condition: check for part, check in benchmarks if check},
            },
            attack_starts=tuple(
                data.clean_picture(cache, seed + 1009 * number)
                for number in range(max((attack.pictures for attack in attacks), default=0))
            ),
            attack_targets=tuple(data.attack_targets(16, seed)) if attacks else (),
            attack_prompts=tuple(data.picture_requests("train", image=picture)),
            attacked="describe" if attacks else None,
            picture_size=data.PICTURE_SIZE,
        )

    def attack_starts(self, count: int, seed: int) -> list[Path]:
        """Training scenes."""
        drawn = data.draw_scenes(self.settings.cache, "train", count, seed + 7)
        return [path for _, path in drawn]

    def attack_prompts(self, count: int, seed: int) -> list[Prompt]:
        """Rude openings."""
        return [
            Prompt(
                prompt_id=f"attacked-{number}",
                text=opening,
                kind=PromptKind.HARM,
                format=PromptFormat.PLAIN,
            )
            for number, opening in enumerate(text.rude_openings("train", count, seed + 29))
        ]

    def attack_targets(self, count: int, seed: int) -> list[str]:
        """Toxic sentences, disjoint from held-out prompts."""
        return data.attack_targets(count, seed)

    def loop_attack(self, prompts: Sequence[Prompt], seed: int) -> AttackMaterial:
        """Training scenes, with requests that only the picture can answer."""
        count = self.settings.data.attacked_pictures
        scenes = data.draw_scenes(self.settings.cache, "train", count, seed)
        starts = [path for _, path in scenes]
        return AttackMaterial(
            requests=data.picture_requests("train", image=starts[0]),
            starts=starts,
            targets=tuple(data.attack_targets(16, seed)),
            asks_requests=True,
        )

    def _tokens(self, texts: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
        tokenizer = self.tokenizer()
        return {
            prompt_id: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            for prompt_id, text in texts.items()
        }
