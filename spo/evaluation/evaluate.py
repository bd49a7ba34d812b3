"""The evaluation itself: generate, confirm the steering, measure, sum up.

In: an engine that holds the defences' vectors, prompt sets (the conditions), a judge that is never
the reward model. Out: an `EvaluationReport`. Same prompts and same seeds under every defence, so
differences are paired. A steered answer without a matching receipt stops the evaluation; a row that
cannot be used is quarantined with its reason and left out of the means. This package makes no
attacks and knows no data set: what an answer should say comes in through `checks`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from spo.algorithms.metrics import bootstrap_interval, paired_interval
from spo.config import EvaluateConfig
from spo.engines.base import Sampler, confirm
from spo.errors import ConfigError, DataError, EngineError
from spo.evaluation.cell_store import Cell, CellStore
from spo.evaluation.defences import Defence
from spo.evaluation.measures import Instruments, Quarantine, Rows, measure
from spo.evaluation.results import BASELINE, values_of
from spo.records import (
    EvaluatedAnswer,
    EvaluationCell,
    EvaluationReport,
    GenerateRequest,
    Prompt,
    PromptSet,
    Rollout,
    Sampling,
)
from spo.scorers.base import Check, ImageTextScorer, Judge, SuccessJudge

Progress = Callable[[int, int, str], None]
"""Called with (answers done, answers in all, what is being measured)."""


def evaluate(  # noqa: PLR0913 - what is evaluated, three instruments, and how
    engine: Sampler,
    defences: Sequence[Defence],
    prompt_sets: Sequence[PromptSet],
    *,
    judge: Judge,
    alignment: ImageTextScorer | None,
    checks: Mapping[str, Check],
    config: EvaluateConfig,
    seed: int = 0,
    progress: Progress | None = None,
    success: Sequence[SuccessJudge] = (),
    store: CellStore | None = None,
) -> EvaluationReport:
    """Answer and measure every prompt set under every defence.

    Args:
        engine: holds every vector that the defences name.
        defences: what the model is asked under; `BASELINE` is the unsteered model.
        prompt_sets: the conditions.
        judge: scores toxicity; never the reward model.
        alignment: scores answers to benign prompts with a picture; None leaves it out.
        checks: by condition, measures against the prompt's known truth.
        config: number of bootstrap samples.
        seed: decides sampling and bootstrap.
        progress: called after every cell.
        success: judges of attack success; the first one decides.
        store: keeps finished cells and takes those that are there; None keeps nothing.

    Raises:
        ConfigError: two sets or two defences share a name, or the baseline is steered.
        DataError: two prompts of a set share an id, or no answer could be measured.
        SteeringError: a receipt is missing or not what was asked for.
        ScorerError: the judge or the alignment scorer answers with the wrong number of scores.
    """
    _check_plan(defences, prompt_sets)
    instruments = Instruments(judge=judge, alignment=alignment, checks=checks, success=success)
    kept_out = Quarantine()
    usable = [kept_out.without_bad_pictures(prompt_set) for prompt_set in prompt_sets]
    answers: list[EvaluatedAnswer] = []
    costs: dict[tuple[str, str], Mapping[str, float]] = {}
    planned = _planned(defences, usable)
    sizes = [len(part.prompts) * part.samples for _, part in planned]
    for number, (defence, part) in enumerate(planned):
        cell = _cell(engine, part, defence, instruments, seed=seed, store=store)
        answers += _with_pictures(cell.answers, part)
        kept_out.reasons.update(cell.reasons)
        costs[part.condition, defence.name] = cell.cost
        if progress:
            progress(sum(sizes[: number + 1]), sum(sizes), f"{part.condition} / {defence.name}")
    _check_any(answers, kept_out)
    return EvaluationReport(
        cells=_cells(answers, costs, config.bootstrap, seed),
        answers=tuple(answers),
        judge="; ".join([judge.name, *(f"success: {other.name}" for other in success)]),
        attacks={part.condition: part.attack for part in prompt_sets if part.attack},
        quarantined=kept_out.rows(),
    )


def _cell(
    engine: Sampler,
    prompt_set: PromptSet,
    defence: Defence,
    instruments: Instruments,
    *,
    seed: int,
    store: CellStore | None,
) -> Cell:
    """One condition under one defence, taken from the store if it is there."""
    path = store.path(prompt_set, defence) if store else None
    found = store.load(path) if store and path else None
    if found and all(answer.receipt_sha256 == defence.sha256 for answer in found.answers):
        return found
    kept_out = Quarantine()
    requests = _requests(prompt_set, defence, seed)
    begin = time.monotonic()
    rollouts = _generate(engine, requests, prompt_set.condition, kept_out)
    seconds = time.monotonic() - begin
    for rollout in rollouts:
        confirm(rollout.receipt, defence.spec, defence.sha256, answer=rollout.request_id)
    rows = Rows(
        prompt_set=prompt_set,
        defence=defence.name,
        rollouts=tuple(rollouts),
        steering=defence.spec,
    )
    cell = Cell(
        answers=tuple(measure(engine, rows, instruments, kept_out)),
        reasons=kept_out.reasons,
        cost={"seconds": seconds, "tokens": float(sum(len(r.token_ids) for r in rollouts))},
    )
    if store and path:
        store.save(path, cell)
    return cell


def _with_pictures(answers: Sequence[EvaluatedAnswer], part: PromptSet) -> list[EvaluatedAnswer]:
    """Which answers are to one prompt: kept here, so that cells of older runs get it as well."""
    shared = part.pictures_of
    return [replace(answer, picture_of=shared.get(answer.prompt_id, "")) for answer in answers]


def _planned(
    defences: Sequence[Defence], prompt_sets: Sequence[PromptSet]
) -> list[tuple[Defence, PromptSet]]:
    """Every cell: all defences on all sets, but a strength curve's point only on its own."""
    return [
        (defence, part)
        for defence in defences
        for part in prompt_sets
        if part.only in (None, defence.name)
    ]


def _check_any(answers: Sequence[EvaluatedAnswer], kept_out: Quarantine) -> None:
    if not answers:
        raise DataError(
            f"no answer could be measured: {len(kept_out.reasons)} rows are quarantined, the first "
            f"because: {next(iter(kept_out.reasons.values()), 'there were no prompts')}"
        )


def _check_plan(defences: Sequence[Defence], prompt_sets: Sequence[PromptSet]) -> None:
    for defence in defences:
        if defence.name == BASELINE and defence.spec is not None:
            raise ConfigError(
                f"the defence {BASELINE!r} is the unsteered model and takes no steering, got "
                f"{defence.spec}; give the steered one another name"
            )
    for what, names in (
        ("defences", [defence.name for defence in defences]),
        ("conditions", [prompt_set.condition for prompt_set in prompt_sets]),
    ):
        if len(set(names)) != len(names):
            raise ConfigError(f"{what} must have different names, got {names}")
    for prompt_set in prompt_sets:
        ids = [prompt.prompt_id for prompt in prompt_set.prompts]
        if len(set(ids)) != len(ids):
            twice = sorted({i for i in ids if ids.count(i) > 1})
            raise DataError(
                f"condition {prompt_set.condition!r}: prompt ids must be unique, these are not: "
                f"{twice[:5]}"
            )


def _requests(prompt_set: PromptSet, defence: Defence, seed: int) -> list[GenerateRequest]:
    """Requests of one defence; seeds depend on prompt and sample only, so defences are paired."""

    def sampling(prompt: Prompt, sample: int) -> Sampling:
        digest = hashlib.sha256(f"{seed}/{prompt.prompt_id}/{sample}".encode()).digest()
        return Sampling(
            max_tokens=prompt_set.max_tokens,
            temperature=prompt_set.temperature,
            seed=int.from_bytes(digest[:4], "big") >> 1,
        )

    return [
        GenerateRequest(
            request_id=f"{prompt_set.condition}/{defence.name}/{prompt.prompt_id}/{sample}",
            prompt=prompt,
            sampling=sampling(prompt, sample),
            steering=defence.spec,
        )
        for prompt in prompt_set.prompts_for(defence.name)
        for sample in range(prompt_set.samples)
    ]


def _generate(
    engine: Sampler, requests: Sequence[GenerateRequest], condition: str, kept_out: Quarantine
) -> list[Rollout]:
    """Rollouts of the requests that can be answered; halves the batch to find those that cannot."""
    if not requests:
        return []
    try:
        rollouts = engine.generate(requests)
    except DataError as error:
        if len(requests) == 1:
            kept_out.reasons[f"{condition}/{requests[0].prompt.prompt_id}"] = str(error)
            return []
        half = len(requests) // 2
        return [
            *_generate(engine, requests[:half], condition, kept_out),
            *_generate(engine, requests[half:], condition, kept_out),
        ]
    if [r.request_id for r in rollouts] != [r.request_id for r in requests]:
        raise EngineError(
            f"condition {condition!r}: the engine's answers are not those of the requests, in "
            "order; nothing of them is used"
        )
    return rollouts


def _cells(
    answers: Sequence[EvaluatedAnswer],
    costs: Mapping[tuple[str, str], Mapping[str, float]],
    bootstrap: int,
    seed: int,
) -> tuple[EvaluationCell, ...]:
    grouped: dict[tuple[str, str], list[EvaluatedAnswer]] = {}
    for answer in answers:
        grouped.setdefault((answer.condition, answer.defence), []).append(answer)
    values = {key: _with_worst(values_of(group)) for key, group in grouped.items()}
    cells = []
    for (condition, defence), metrics in values.items():
        base = {} if defence == BASELINE else values.get((condition, BASELINE), {})
        cells.append(
            EvaluationCell(
                condition=condition,
                defence=defence,
                metrics={
                    name: bootstrap_interval(units, samples=bootstrap, seed=seed)
                    for name, units in metrics.items()
                },
                paired={
                    name: paired_interval(units, base[name], samples=bootstrap, seed=seed)
                    for name, units in metrics.items()
                    if units.keys() & base.get(name, {}).keys()
                },
                cost=costs[condition, defence],
            )
        )
    return tuple(sorted(cells, key=lambda cell: _first_seen(answers, cell.condition)))


def _with_worst(values: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    """Adds the expected maximum toxicity (RealToxicityPrompts): the worst answer of each prompt."""
    units = values.get("toxicity", {})
    if any(len(found) > 1 for found in units.values()):
        worst = {prompt: [max(found)] for prompt, found in units.items() if found}
        return {**values, "max_toxicity": worst}
    return values


def _first_seen(answers: Sequence[EvaluatedAnswer], condition: str) -> int:
    return next(i for i, answer in enumerate(answers) if answer.condition == condition)
