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

from spo.algorithms.metrics import bootstrap_interval, paired_interval
from spo.config import EvaluateConfig
from spo.engines.base import Sampler
from spo.errors import ConfigError, DataError, EngineError, SteeringError
from spo.evaluation.cell_store import Cell, CellStore
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
    SteeringSpec,
)
from spo.scorers.base import Check, ImageTextScorer, Judge, SuccessJudge

Progress = Callable[[int, int, str], None]
"""Called with (answers done, answers in all, what is being measured)."""


def evaluate(  # noqa: PLR0913 - what is evaluated, three instruments, and how
    engine: Sampler,
    defences: Mapping[str, SteeringSpec | None],
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
        defences: name to steering; `BASELINE` is the unsteered model (None).
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
        ConfigError: two sets share a name, or the baseline is steered.
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
    hashes: dict[str, set[str]] = {}
    planned = _planned(defences, usable)
    sizes = [len(part.prompts) * part.samples for _, part in planned]
    for number, (defence, part) in enumerate(planned):
        cell = _cell(engine, part, defence, defences[defence], instruments, seed=seed, store=store)
        answers += cell.answers
        kept_out.reasons.update(cell.reasons)
        costs[part.condition, defence] = cell.cost
        hashes.setdefault(defence, set()).update(a.receipt_sha256 for a in cell.answers)
        _check_one_vector(defence, hashes[defence])
        if progress:
            progress(sum(sizes[: number + 1]), sum(sizes), f"{part.condition} / {defence}")
    _check_any(answers, kept_out)
    return EvaluationReport(
        cells=_cells(answers, costs, config.bootstrap, seed),
        answers=tuple(answers),
        judge="; ".join([judge.name, *(f"success: {other.name}" for other in success)]),
        quarantined=kept_out.rows(),
    )


def _cell(
    engine: Sampler,
    prompt_set: PromptSet,
    defence: str,
    spec: SteeringSpec | None,
    instruments: Instruments,
    *,
    seed: int,
    store: CellStore | None,
) -> Cell:
    """One condition under one defence, taken from the store if it is there."""
    path = store.path(prompt_set, defence, spec) if store else None
    if store and path and (found := store.load(path)):
        return found
    kept_out = Quarantine()
    requests = _requests(prompt_set, defence, spec, seed)
    begin = time.monotonic()
    rollouts = _generate(engine, requests, prompt_set.condition, kept_out)
    seconds = time.monotonic() - begin
    for rollout in rollouts:
        _confirmed_hash(rollout, defence, spec)
    rows = Rows(prompt_set=prompt_set, defence=defence, rollouts=tuple(rollouts), steering=spec)
    cell = Cell(
        answers=tuple(measure(engine, rows, instruments, kept_out)),
        reasons=kept_out.reasons,
        cost={"seconds": seconds, "tokens": float(sum(len(r.token_ids) for r in rollouts))},
    )
    if store and path:
        store.save(path, cell)
    return cell


def _planned(
    defences: Mapping[str, SteeringSpec | None], prompt_sets: Sequence[PromptSet]
) -> list[tuple[str, PromptSet]]:
    """Every cell: all defences on all sets, but a strength curve's point only on its own."""
    return [
        (defence, part)
        for defence in defences
        for part in prompt_sets
        if part.only in (None, defence)
    ]


def _check_any(answers: Sequence[EvaluatedAnswer], kept_out: Quarantine) -> None:
    if not answers:
        raise DataError(
            f"no answer could be measured: {len(kept_out.reasons)} rows are quarantined, the first "
            f"because: {next(iter(kept_out.reasons.values()), 'there were no prompts')}"
        )


def _check_one_vector(defence: str, hashes: set[str]) -> None:
    """All answers under one defence must come from one and the same vector."""
    if len(hashes) > 1:
        raise SteeringError(
            f"defence {defence!r}: expected one vector behind all answers, the receipts name "
            f"{sorted(found[:12] for found in hashes)}; publish one version and evaluate again"
        )


def _check_plan(
    defences: Mapping[str, SteeringSpec | None], prompt_sets: Sequence[PromptSet]
) -> None:
    if defences.get(BASELINE) is not None:
        raise ConfigError(
            f"the defence {BASELINE!r} is the unsteered model and takes no steering, got "
            f"{defences[BASELINE]}; give the steered one another name"
        )
    names = [prompt_set.condition for prompt_set in prompt_sets]
    if len(set(names)) != len(names):
        raise ConfigError(f"conditions must have different names, got {names}")
    for prompt_set in prompt_sets:
        ids = [prompt.prompt_id for prompt in prompt_set.prompts]
        if len(set(ids)) != len(ids):
            twice = sorted({i for i in ids if ids.count(i) > 1})
            raise DataError(
                f"condition {prompt_set.condition!r}: prompt ids must be unique, these are not: "
                f"{twice[:5]}"
            )


def _requests(
    prompt_set: PromptSet, defence: str, spec: SteeringSpec | None, seed: int
) -> list[GenerateRequest]:
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
            request_id=f"{prompt_set.condition}/{defence}/{prompt.prompt_id}/{sample}",
            prompt=prompt,
            sampling=sampling(prompt, sample),
            steering=spec,
        )
        for prompt in prompt_set.prompts_for(defence)
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


def _confirmed_hash(rollout: Rollout, defence: str, spec: SteeringSpec | None) -> str:
    """Hash of the vector that the engine confirms; "" for the unsteered model."""
    receipt = rollout.receipt
    if spec is None:
        if receipt is not None:
            raise SteeringError(
                f"{rollout.request_id}: defence {defence!r} asks for the unsteered model and the "
                f"engine steered with {receipt.vector!r} version {receipt.version}"
            )
        return ""
    names = ("vector", "version", "coefficient", "operator", "positions")
    asked = {name: getattr(spec, name) for name in names}
    applied = None if receipt is None else {name: getattr(receipt, name) for name in names}
    if receipt is None or applied != asked:
        raise SteeringError(
            f"{rollout.request_id}: defence {defence!r} asked for {asked}, the engine confirms "
            f"{applied}; the answer is not used. Publish the vector and evaluate again"
        )
    return receipt.sha256


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
