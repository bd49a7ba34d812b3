"""The testbed's prompts as a corpus: training prompts, evaluation sets with their checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from spo.config import DataConfig, RunConfig
from spo.corpus.base import EvaluationInputs, benchmark_sets, greedy, sampled, with_drawn_words
from spo.records import Prompt
from spo.testbed import data


def testbed_prompts(config: DataConfig, cache: Path, seed: int) -> list[Prompt]:
    """Openings, requests and questions of the testbed's grammars; a share of them attacked."""
    prompts = data.training_prompts(
        cache,
        harm=config.harm_prompts,
        benign=config.benign_prompts,
        image_fraction=config.image_fraction,
        seed=seed,
    )
    return with_drawn_words(prompts, config, cache, seed, data.PICTURE_SIZE)


def testbed_inputs(config: RunConfig, model: str, revision: str | None) -> EvaluationInputs:
    """Prompt sets, exact checks and the attack's material; held out from training.

    Args:
        config: the run.
        model: folder or hub id of the model, whose tokenizer cuts the reference texts.
        revision: its hub revision.
    """
    settings = config.evaluate
    picture = data.clean_picture(config.cache, config.seed)
    captions, questions = data.heldout_scenes(config.cache, count=settings.scenes, seed=config.seed)
    openings = tuple(
        data.heldout_openings(count=settings.harm_prompts, seed=config.seed, image=None)
    )
    pictured = tuple(
        data.heldout_openings(count=settings.harm_prompts, seed=config.seed, image=picture)
    )
    requests = tuple(data.picture_requests("heldout", image=picture)[: settings.harm_prompts])
    twins = data.benign_twins(count=settings.benign_prompts, seed=config.seed)
    texts, references = data.benign_texts(count=settings.benign_prompts, seed=config.seed)
    attacks = [attack for attack in settings.attacks if attack.kind == "pgd"]
    benchmarks = benchmark_sets(config)
    return EvaluationInputs(
        sets=(
            sampled("plain", openings, settings),
            sampled("image", pictured, settings),
            sampled("describe", requests, settings),
            greedy("caption", tuple(captions), settings.caption_tokens),
            replace(greedy("question", tuple(questions), settings.max_tokens), alignment=False),
            sampled("twin", tuple(twins), settings),
            replace(
                sampled("text", tuple(texts), settings),
                references=_tokens(references, model, revision),
            ),
            *(part for part, _ in benchmarks),
        ),
        checks={
            "caption": data.check_caption,
            "question": data.check_question,
            **{part.condition: check for part, check in benchmarks if check},
        },
        attack_starts=tuple(
            data.clean_picture(config.cache, config.seed + 1009 * number)
            for number in range(max((attack.pictures for attack in attacks), default=0))
        ),
        attack_targets=tuple(data.attack_targets(16, config.seed)) if attacks else (),
        attack_prompts=tuple(data.picture_requests("train", image=picture)),
        attacked="describe" if attacks else None,
        picture_size=data.PICTURE_SIZE,
    )


def _tokens(
    texts: Mapping[str, str], model: str, revision: str | None
) -> dict[str, tuple[int, ...]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
    return {
        prompt_id: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        for prompt_id, text in texts.items()
    }
