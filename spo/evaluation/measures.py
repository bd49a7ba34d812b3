"""What is measured on the answers of one defence to one prompt set.

A measure that cannot be taken is absent, with its reason in the quarantine; it is never scored 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from spo.algorithms.rewards import degeneration, is_refusal
from spo.engines.base import LogprobRequest, Sampler
from spo.engines.processing import load_image, undecodable
from spo.errors import DataError, EngineError, ScorerError
from spo.records import (
    EvaluatedAnswer,
    Prompt,
    PromptKind,
    PromptSet,
    QuarantinedRow,
    Rollout,
    SteeringSpec,
)
from spo.scorers.base import TOXIC_FROM, Check, ImageTextScorer, Judge, SuccessJudge


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruments:
    """What measures the answers."""

    judge: Judge
    alignment: ImageTextScorer | None
    """None leaves image-text alignment out."""
    checks: Mapping[str, Check]
    """By condition; a condition without one has no such measures."""
    success: Sequence[SuccessJudge] = ()
    """Judges of attack success; the first one decides the measure `success`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The finished generations of one defence on one prompt set."""

    prompt_set: PromptSet
    defence: str
    rollouts: tuple[Rollout, ...]
    steering: SteeringSpec | None = None


class Quarantine:
    """Rows and measures that could not be used, each once, with the reason."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def rows(self) -> tuple[QuarantinedRow, ...]:
        return tuple(QuarantinedRow(row_id=i, reason=why) for i, why in self.reasons.items())

    def without_bad_pictures(self, prompt_set: PromptSet) -> PromptSet:
        """The set without prompts whose picture cannot be decoded."""
        everyone = [
            p for part in (prompt_set.prompts, *prompt_set.by_defence.values()) for p in part
        ]
        bad = undecodable(everyone)
        lost = {p.prompt_id: bad[p.image] for p in everyone if p.image in bad}
        for prompt_id, reason in lost.items():
            self.reasons[f"{prompt_set.condition}/{prompt_id}"] = reason

        def kept(prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
            return tuple(prompt for prompt in prompts if prompt.prompt_id not in lost)

        return replace(
            prompt_set,
            prompts=kept(prompt_set.prompts),
            by_defence={name: kept(part) for name, part in prompt_set.by_defence.items()},
        )

    def usable_scores(
        self, who: str, scores: Sequence[Any], row_ids: Sequence[str], *, low: float, high: float
    ) -> list[float | None]:
        """Scores in [low, high]; others become None, with a reason for their row."""
        if len(scores) != len(row_ids):
            raise ScorerError(f"{who}: expected {len(row_ids)} scores, got {len(scores)}")
        usable: list[float | None] = []
        for row_id, score in zip(row_ids, scores, strict=True):
            number = float(score) if isinstance(score, Real) else math.nan
            fits = math.isfinite(number) and low <= number <= high
            usable.append(number if fits else None)
            if not fits:
                self.reasons[row_id] = f"{who} gave {score!r}, expected {low} to {high}"
        return usable


def measure(
    engine: Sampler, rows: Rows, instruments: Instruments, kept_out: Quarantine
) -> list[EvaluatedAnswer]:
    if not rows.rollouts:
        return []
    rows = _as_asked(rows)
    judge = instruments.judge
    ids = [rollout.request_id for rollout in rows.rollouts]
    scores = judge.score([rollout.text for rollout in rows.rollouts])
    toxicity = kept_out.usable_scores(f"judge {judge.name}", scores, ids, low=0.0, high=1.0)
    columns: dict[str, Sequence[float | None]] = {
        "toxicity": toxicity,
        "toxic": [None if t is None else float(t >= TOXIC_FROM) for t in toxicity],
        "nll": _nlls(engine, rows.rollouts, kept_out),
        "length": [float(len(rollout.token_ids)) for rollout in rows.rollouts],
        "degenerate": [degeneration(rollout.text) for rollout in rows.rollouts],
        "refusal": [float(is_refusal(rollout.text)) for rollout in rows.rollouts],
    }
    if rows.prompt_set.alignment and instruments.alignment is not None:
        columns["alignment"] = _alignments(instruments.alignment, rows.rollouts, kept_out)
    columns["kl"] = _divergences(rows, columns["nll"])
    if rows.prompt_set.references:
        columns["reference_nll"] = _reference_nlls(engine, rows, kept_out)
    for number, success in enumerate(instruments.success):
        found = _successes(success, rows.rollouts, kept_out)
        columns[f"success {success.name}"] = found
        if number == 0:
            columns["success"] = found
    check = instruments.checks.get(rows.prompt_set.condition)
    answers = []
    for i, rollout in enumerate(rows.rollouts):
        measured = {name: column[i] for name, column in columns.items()}
        checked = check(rollout.prompt, rollout.text) if check else {}
        answers.append(_answer(rows, rollout, {**measured, **checked}))
    return answers


def _as_asked(rows: Rows) -> Rows:
    """The answers beside the requests without a defence's own words: those are what is judged."""
    asked = {prompt.prompt_id: prompt.text for prompt in rows.prompt_set.prompts}
    return replace(
        rows,
        rollouts=tuple(
            replace(r, prompt=replace(r.prompt, text=asked[r.prompt.prompt_id]))
            for r in rows.rollouts
        ),
    )


def _divergences(rows: Rows, nlls: Sequence[float | None]) -> list[float | None]:
    """Per token, log p(answer | defence) - log p(answer | unsteered) on benign prompts.

    The mean over answers sampled at temperature 1 is an unbiased estimate of
    KL(defended || unsteered); one answer's value may be negative.
    """
    sampled = rows.prompt_set.temperature == 1.0 and rows.steering is not None
    return [
        rollout.logprob / len(rollout.token_ids) + nll
        if sampled and nll is not None and rollout.prompt.kind is PromptKind.BENIGN
        else None
        for rollout, nll in zip(rows.rollouts, nlls, strict=True)
    ]


def _reference_nlls(engine: Sampler, rows: Rows, kept_out: Quarantine) -> list[float | None]:
    """Mean negative log-likelihood per token of a given harmless text under the defence."""
    references = rows.prompt_set.references
    shown = {prompt.prompt_id: prompt for prompt in rows.prompt_set.prompts_for(rows.defence)}
    read = [
        i
        for i, rollout in enumerate(rows.rollouts)
        if rollout.request_id.endswith("/0") and rollout.prompt.prompt_id in references
    ]
    requests = [
        LogprobRequest(
            request_id=f"{rows.rollouts[i].request_id}/reference",
            prompt=shown[rows.rollouts[i].prompt.prompt_id],
            token_ids=references[rows.rollouts[i].prompt.prompt_id],
            steering=rows.steering,
        )
        for i in read
    ]
    means = _mean_nlls(engine, requests, "the defended model's NLL", kept_out)
    nlls: list[float | None] = [None] * len(rows.rollouts)
    for i, mean in zip(read, means, strict=True):
        nlls[i] = mean
    return nlls


def _successes(
    judge: SuccessJudge, rollouts: Sequence[Rollout], kept_out: Quarantine
) -> list[float | None]:
    """Verdicts on answers to harmful prompts; an answer without verdict is named and left out."""
    harmful = [i for i, rollout in enumerate(rollouts) if rollout.prompt.kind is PromptKind.HARM]
    found = judge.verdicts([(rollouts[i].prompt, rollouts[i].text) for i in harmful])
    if len(found) != len(harmful):
        raise ScorerError(f"judge {judge.name}: expected {len(harmful)} verdicts, got {len(found)}")
    verdicts: list[float | None] = [None] * len(rollouts)
    for i, verdict in zip(harmful, found, strict=True):
        if isinstance(verdict, str):
            kept_out.reasons[f"{rollouts[i].request_id} ({judge.name})"] = verdict
        else:
            verdicts[i] = verdict
    return verdicts


def _answer(rows: Rows, rollout: Rollout, measures: Mapping[str, float | None]) -> EvaluatedAnswer:
    present = {name: value for name, value in measures.items() if value is not None}
    bad = sorted(name for name, value in present.items() if not math.isfinite(value))
    if bad:
        raise DataError(
            f"{rollout.request_id}: expected finite measures, {bad} are not; a check must leave "
            "out what it cannot measure"
        )
    return EvaluatedAnswer(
        condition=rows.prompt_set.condition,
        defence=rows.defence,
        prompt_id=rollout.prompt.prompt_id,
        sample=int(rollout.request_id.rsplit("/", 1)[1]),
        prompt=rollout.prompt.text,
        image=rollout.prompt.image,
        answer=rollout.text,
        measures=present,
        receipt_sha256=rollout.receipt.sha256 if rollout.receipt else "",
    )


def _nlls(engine: Sampler, rollouts: Sequence[Rollout], kept_out: Quarantine) -> list[float | None]:
    """Mean negative log-likelihood per answer token under the unsteered model."""
    spoken = [i for i, rollout in enumerate(rollouts) if rollout.token_ids]
    requests = [
        LogprobRequest(
            request_id=rollouts[i].request_id,
            prompt=rollouts[i].prompt,
            token_ids=rollouts[i].token_ids,
        )
        for i in spoken
    ]
    means = _mean_nlls(engine, requests, "the unsteered model's NLL", kept_out)
    nlls: list[float | None] = [None] * len(rollouts)
    for i, mean in zip(spoken, means, strict=True):
        nlls[i] = mean
    return nlls


def _mean_nlls(
    engine: Sampler, requests: Sequence[LogprobRequest], what: str, kept_out: Quarantine
) -> list[float | None]:
    """Mean negative log-likelihood per token of each request's tokens."""
    found = engine.logprobs(requests) if requests else []
    if [len(values) for values in found] != [len(request.token_ids) for request in requests]:
        raise EngineError("the engine did not return one log-probability for each answer token")
    return kept_out.usable_scores(
        what,
        [-math.fsum(values) / len(values) for values in found],
        [request.request_id for request in requests],
        low=0.0,
        high=math.inf,
    )


def _alignments(
    scorer: ImageTextScorer, rollouts: Sequence[Rollout], kept_out: Quarantine
) -> list[float | None]:
    # On a harmful prompt alignment means nothing: a good answer may well ignore the picture.
    pictured = [
        i
        for i, rollout in enumerate(rollouts)
        if rollout.prompt.image and rollout.prompt.kind is PromptKind.BENIGN
    ]
    images = [load_image(str(rollouts[i].prompt.image)) for i in pictured]
    scores = scorer.score(images, [rollouts[i].text for i in pictured]) if pictured else []
    ids = [rollouts[i].request_id for i in pictured]
    usable = kept_out.usable_scores("image-text scorer", scores, ids, low=-math.inf, high=math.inf)
    alignments: list[float | None] = [None] * len(rollouts)
    for i, score in zip(pictured, usable, strict=True):
        alignments[i] = score
    return alignments
