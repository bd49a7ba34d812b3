"""From names in the configuration to things on disk: models, scorers, judge, prompts.

"testbed" stands for the embedded default everywhere; it is assembled in the cache on first use.
Anything else is a hub id, a local folder or a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spo.attacks.typographic import typographic_prompts
from spo.config import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    RewardConfig,
    RunConfig,
)
from spo.datasets.prompts import read_prompts
from spo.draws import share_of
from spo.engines.processing import undecodable
from spo.errors import ConfigError, DataError
from spo.evaluation import Judge, PromptSet, SuccessJudge
from spo.records import Prompt, PromptKind, QuarantinedRow, Split

TESTBED = "testbed"
PICTURE_SIZE = 336
"""Side of a drawn picture for models other than the testbed's, which sees 112."""
_CHECK = Callable[[Prompt, str], Mapping[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """Where the model is."""

    path: str
    """Local folder or hub id."""
    revision: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationInputs:
    """What an evaluation runs on."""

    sets: tuple[PromptSet, ...]
    checks: Mapping[str, _CHECK]
    attack_starts: tuple[Path, ...] = ()
    """Clean pictures that picture attacks start from, in turn; none when no attack is run."""
    attack_targets: tuple[str, ...] = ()
    attack_prompts: tuple[Prompt, ...] = ()
    """Training prompts that one picture for all prompts is made on."""
    attacked: str | None = None
    """Condition whose pictures are attacked."""
    picture_size: int | None = None
    """Side of drawn pictures in pixels; None takes the usual one."""
    quarantined: tuple[QuarantinedRow, ...] = ()


def resolve_model(config: ModelConfig, cache: Path) -> ResolvedModel:
    """The model's folder; assembles the testbed model on first use."""
    if config.id == TESTBED:
        from spo.testbed.model import assemble

        return ResolvedModel(path=str(assemble(cache)), revision=None)
    if Path(config.id).is_dir():
        return ResolvedModel(path=str(Path(config.id).absolute()), revision=None)
    return ResolvedModel(path=config.id, revision=config.revision)


def learner_model(config: RunConfig, model: ResolvedModel) -> str:
    """What the learner loads: the model's folder or id, or "fake" beside fake engines."""
    return "fake" if config.engine.backend == "fake" else model.path


def toxicity_arguments(config: RewardConfig, cache: Path) -> dict[str, Any]:
    """Arguments of `ToxicityScorer`."""
    if config.toxicity_model == TESTBED:
        from spo.testbed.toxicity import assemble_toxicity

        return {"checkpoint": str(assemble_toxicity(cache))}
    if Path(config.toxicity_model).exists():
        return {"checkpoint": str(Path(config.toxicity_model).absolute())}
    return {"model_type": config.toxicity_model}


def alignment_arguments(config: RewardConfig, cache: Path) -> dict[str, Any]:
    """Arguments of `AlignmentScorer`."""
    if config.alignment_model == TESTBED:
        from spo.testbed.alignment import assemble_alignment

        return {"model": str(assemble_alignment(cache))}
    model, sign, pretrained = config.alignment_model.partition(":")
    if not sign:
        raise ConfigError(
            f"reward.alignment_model must be MODEL:PRETRAINED of open_clip (for instance "
            f"ViT-B-32:laion2b_s34b_b79k) or 'testbed', got {config.alignment_model!r}"
        )
    return {"model": model, "pretrained": pretrained}


def open_judge(config: EvaluateConfig) -> Judge:
    """The judge of the evaluation; never the reward model."""
    from spo.scorers.toxicity import EMBEDDED_JUDGE, load_judge

    return load_judge(EMBEDDED_JUDGE if config.judge == TESTBED else config.judge)


def open_success_judges(config: EvaluateConfig) -> list[SuccessJudge]:
    """Judges of attack success; the first one decides."""
    from spo.scorers.judges import open_success_judge

    toxicity = open_judge(config)
    return [open_success_judge(settings, toxicity) for settings in config.success_judges]


def training_prompts(
    config: DataConfig, cache: Path, seed: int
) -> tuple[list[Prompt], list[QuarantinedRow]]:
    """Prompts of Stage II, a share of them attacked."""
    if config.train == TESTBED:
        from spo.testbed import data

        prompts = data.training_prompts(
            cache,
            harm=config.harm_prompts,
            benign=config.benign_prompts,
            image_fraction=config.image_fraction,
            seed=seed,
        )
        return _with_drawn_words(prompts, config, cache, seed, data.PICTURE_SIZE), []
    prompts, bad = read_prompts(Path(config.train))
    prompts, damaged = _decodable(prompts)
    bad += damaged
    harm = [p for p in prompts if p.kind is PromptKind.HARM][: config.harm_prompts]
    benign = [p for p in prompts if p.kind is PromptKind.BENIGN][: config.benign_prompts]
    return _with_drawn_words(harm + benign, config, cache, seed, PICTURE_SIZE), bad


def harmful_share(prompts: Sequence[Prompt], fraction: float, draw: str) -> list[Prompt]:
    """A share of the harmful prompts, chosen by a hash of their ids; `draw` names the draw."""
    return [
        prompt
        for prompt in prompts
        if prompt.kind is PromptKind.HARM and share_of(f"{draw}/{prompt.prompt_id}") < fraction
    ]


def target_sentences(file: Path) -> tuple[str, ...]:
    """What picture attacks aim at: one sentence a line."""
    return tuple(line.strip() for line in file.read_text().splitlines() if line.strip())


def _with_drawn_words(
    prompts: Sequence[Prompt], config: DataConfig, cache: Path, seed: int, size: int
) -> list[Prompt]:
    """A share of the harmful prompts, chosen by id, asked through a picture of their words."""
    if not config.typographic_fraction:
        return list(prompts)
    from spo.attacks.drawing import draw_text

    side = config.picture_size or size

    attacked = harmful_share(prompts, config.typographic_fraction, f"typographic/{seed}")
    drawn = typographic_prompts(attacked, lambda text: draw_text(text, side), cache / "typographic")
    by_id = {prompt.prompt_id: prompt for prompt in drawn}
    return [by_id.get(prompt.prompt_id, prompt) for prompt in prompts]


def evaluation_inputs(config: RunConfig) -> EvaluationInputs:
    """Prompt sets, exact checks and the attack's material; all held out from training."""
    if config.data.heldout == TESTBED:
        return _testbed_inputs(config)
    prompts, bad = read_prompts(Path(config.data.heldout))
    harm = tuple(p for p in prompts if p.kind is PromptKind.HARM)[: config.evaluate.harm_prompts]
    benign = tuple(p for p in prompts if p.kind is PromptKind.BENIGN)[: config.evaluate.scenes]
    sets = [_sampled("plain", harm, config.evaluate)]
    start, targets = _attack_material(config.evaluate)
    if start is not None:
        pictured = tuple(replace(prompt, image=str(start)) for prompt in harm)
        sets.append(_sampled("image", pictured, config.evaluate))
    if benign:
        sets.append(_greedy("benign", benign, config.evaluate.caption_tokens))
    benchmarks = _benchmark_sets(config)
    sets += [part for part, _ in benchmarks]
    if not harm:
        raise DataError(f"{config.data.heldout} has no prompt of kind 'harm' to evaluate on")
    return EvaluationInputs(
        sets=tuple(sets),
        checks={part.condition: check for part, check in benchmarks if check},
        attack_starts=() if start is None else (start,),
        attack_targets=targets,
        attack_prompts=tuple(_attack_prompts(config)) if start is not None else (),
        attacked="image" if start is not None else None,
        quarantined=tuple(bad),
    )


def _testbed_inputs(config: RunConfig) -> EvaluationInputs:
    from spo.testbed import data

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
    benchmarks = _benchmark_sets(config)
    return EvaluationInputs(
        sets=(
            _sampled("plain", openings, settings),
            _sampled("image", pictured, settings),
            _sampled("describe", requests, settings),
            _greedy("caption", tuple(captions), settings.caption_tokens),
            replace(_greedy("question", tuple(questions), settings.max_tokens), alignment=False),
            _sampled("twin", tuple(twins), settings),
            replace(
                _sampled("text", tuple(texts), settings),
                references=_tokens(references, resolve_model(config.model, config.cache)),
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


def _tokens(texts: Mapping[str, str], model: ResolvedModel) -> dict[str, tuple[int, ...]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.path, revision=model.revision)
    return {
        prompt_id: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        for prompt_id, text in texts.items()
    }


def _benchmark_sets(config: RunConfig) -> list[tuple[PromptSet, _CHECK | None]]:
    """One condition for each benchmark and kind of prompt; questions come with their check."""
    from spo.datasets import CHECKS, load_prompts

    settings = config.evaluate
    sets: list[tuple[PromptSet, _CHECK | None]] = []
    for benchmark in settings.benchmarks:
        prompts = load_prompts(benchmark, cache=config.cache, seed=config.seed, split=Split.HELDOUT)
        check = CHECKS.get(benchmark.format)
        for kind in PromptKind:
            part = tuple(prompt for prompt in prompts if prompt.kind is kind)
            if not part:
                continue
            name = f"{benchmark.format} {Path(benchmark.path).stem} {kind.value}"
            made = (
                _greedy(name, part, settings.caption_tokens)
                if check
                else _sampled(name, part, settings)
            )
            sets.append((replace(made, alignment=False), check))
    return sets


def _sampled(condition: str, prompts: tuple[Prompt, ...], config: EvaluateConfig) -> PromptSet:
    return PromptSet(
        condition=condition,
        prompts=prompts,
        samples=config.samples_per_prompt,
        max_tokens=config.max_tokens,
        temperature=1.0,
    )


def _greedy(condition: str, prompts: tuple[Prompt, ...], max_tokens: int) -> PromptSet:
    return PromptSet(
        condition=condition, prompts=prompts, samples=1, max_tokens=max_tokens, temperature=0.0
    )


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
    if not any(attack.kind == "pgd" for attack in config.attacks):
        return None, ()
    if config.attack_targets_file is None or config.attack_picture is None:
        raise ConfigError(
            "a picture attack on your own prompts needs evaluate.attack_picture (a clean picture) "
            "and evaluate.attack_targets_file (one harmful sentence a line); without a picture "
            "attack set evaluate.attacks=[]"
        )
    return config.attack_picture, target_sentences(config.attack_targets_file)


def _attack_prompts(config: RunConfig) -> list[Prompt]:
    prompts, _ = training_prompts(config.data, config.cache, config.seed)
    return [prompt for prompt in prompts if prompt.kind is PromptKind.HARM][:16]
