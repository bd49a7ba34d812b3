"""The objectives of a sweep, measured on training prompts that no trial learns from.

Never on the evaluation's held-out prompts and never with its judge: a sweep that tuned to them
would leave nothing to compare the found setting on. Prompts are split by a hash of their ids. All
trials answer the same prompts with the same seeds.

* `toxicity`: the reward model's toxicity of answers to harmful prompts.
* `utility`: of answers to benign prompts, image-text alignment (1 where the prompt has no picture)
  times (1 - degeneration), and 0 for a refusal or nothing.
* `kl`: KL(unsteered || steered) per token on benign prompts, nats, estimated on fixed answers of
  the unsteered model by the non-negative estimator (r - 1) - log r, r = p_steered / p_unsteered.
* `nll`: negative log-likelihood per token of the answers to harmful prompts under the unsteered
  model: fluency.
* `degenerate`: how far answers to harmful prompts are from language, see `algorithms.rewards`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from spo.algorithms.estimators import is_held_out
from spo.algorithms.metrics import bootstrap_interval
from spo.algorithms.rewards import degeneration, is_refusal
from spo.engines.base import LogprobRequest, Sampler, confirm
from spo.errors import ConfigError, DataError, ScorerError
from spo.files import write_atomic
from spo.records import (
    GenerateRequest,
    Interval,
    Prompt,
    PromptKind,
    Rollout,
    Sampling,
    SteeringSpec,
)
from spo.sweep.settings import BEST_IS, Metric, SweepConfig, ValidationConfig

_LARGEST_LOG_RATIO = 20.0


class Scorer(Protocol):
    """The reward models."""

    def score(self, rollouts: Sequence[Rollout]) -> list[dict[str, float]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSplit:
    """Training prompts, parted."""

    train: tuple[Prompt, ...]
    harm: tuple[Prompt, ...]
    """Validation prompts that pull towards harm."""
    benign: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleAnswer:
    """One answer, for the report."""

    prompt_id: str
    prompt: str
    image: str | None
    kind: str
    answer: str
    toxicity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one setting scored."""

    metrics: Mapping[Metric, Interval]
    """Mean over prompts with its bootstrap interval."""
    answers: tuple[SampleAnswer, ...]


def split_prompts(prompts: Sequence[Prompt], config: ValidationConfig) -> PromptSplit:
    """Part prompts by a hash of their ids, so that more prompts never move one across."""
    held = [p for p in prompts if is_held_out(f"validation/{p.prompt_id}", config.fraction)]
    train = tuple(p for p in prompts if p not in set(held))
    harm = [p for p in held if p.kind is PromptKind.HARM][: config.harm_prompts]
    benign = [p for p in held if p.kind is PromptKind.BENIGN][: config.benign_prompts]
    return PromptSplit(train=train, harm=tuple(harm), benign=tuple(benign))


def check_measurable(config: SweepConfig, split: PromptSplit) -> None:
    """Raise ConfigError when an objective would never get a value."""
    needs = {name: split.benign if name in ("utility", "kl") else split.harm for name in BEST_IS}
    missing = [name for name in config.objectives if not needs[name]]
    if missing:
        raise ConfigError(
            f"objectives {missing} would never get a value: the validation split has "
            f"{len(split.harm)} harmful and {len(split.benign)} benign prompts. Raise "
            "validation.fraction or its prompt counts, or give more training prompts"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fixed:
    """An answer of the unsteered model to a benign prompt, with its log-probabilities."""

    prompt_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class Validator:
    """Measures settings on a split.

    Args:
        sampler: engine or pool; holds the vectors that are asked for.
        scorer: reward models.
        split: the prompts.
        config: sizes and sampling.
        folder: where the unsteered model's answers are kept, made once for all trials.
        seed: decides the sampling seeds.
    """

    def __init__(
        self,
        sampler: Sampler,
        scorer: Scorer,
        split: PromptSplit,
        *,
        config: ValidationConfig,
        folder: Path,
        seed: int,
    ) -> None:
        self._sampler = sampler
        self._scorer = scorer
        self._split = split
        self._config = config
        self._path = folder / "unsteered.json"
        self._seed = seed
        self._fixed: list[_Fixed] | None = None

    def unsteered(self) -> Measured:
        """The model without steering; kept in a file."""
        if self._path.is_file():
            return load_measured(json.loads(self._path.read_text())["measured"])
        requests = self._requests(self._split.benign, None, max_tokens=self._config.benign_tokens)
        rollouts = self._sampler.generate(requests)
        for rollout in rollouts:
            confirm(rollout.receipt, None, "", answer=rollout.request_id)
        rollouts = [rollout for rollout in rollouts if rollout.token_ids]
        logprobs = self._logprobs(
            [(r.prompt, r.token_ids) for r in rollouts], None, label="unsteered"
        )
        fixed = [
            _Fixed(prompt_id=r.prompt.prompt_id, token_ids=r.token_ids, logprobs=tuple(values))
            for r, values in zip(rollouts, logprobs, strict=True)
        ]
        self._fixed = fixed
        measured = self.measure(None, sha256="")
        content = {
            "measured": dump_measured(measured),
            "fixed": [asdict(item) for item in fixed],
        }
        write_atomic(self._path, json.dumps(content).encode())
        return measured

    def measure(self, spec: SteeringSpec | None, *, sha256: str) -> Measured:
        """Every metric of one setting.

        Args:
            spec: steering, None for the unsteered model.
            sha256: hash of the vector that every receipt must name.

        Raises:
            SteeringError: an answer was not steered as asked.
            ScorerError: a reward model gave no finite score.
        """
        config = self._config
        requests = self._requests(self._split.harm, spec, max_tokens=config.max_tokens)
        requests += self._requests(
            self._split.benign, spec, max_tokens=config.benign_tokens, greedy=True
        )
        rollouts = self._sampler.generate(requests)
        for rollout in rollouts:
            confirm(rollout.receipt, spec, sha256, answer=rollout.request_id)
        scores = self._scorer.score(rollouts)
        values: dict[Metric, dict[str, list[float | None]]] = {name: {} for name in BEST_IS}
        harm: list[Rollout] = []
        for rollout, score in zip(rollouts, scores, strict=True):
            prompt_id = rollout.prompt.prompt_id
            if rollout.prompt.kind is PromptKind.HARM:
                harm.append(rollout)
                toxicity = _finite(score.get("toxicity"), "toxicity", rollout)
                values["toxicity"].setdefault(prompt_id, []).append(toxicity)
                degenerate = degeneration(rollout.text)
                values["degenerate"].setdefault(prompt_id, []).append(degenerate)
            else:
                values["utility"].setdefault(prompt_id, []).append(_utility(rollout, score))
        for rollout, nll in zip(harm, self._nlls(harm), strict=True):
            values["nll"].setdefault(rollout.prompt.prompt_id, []).append(nll)
        values["kl"] = self._kl(spec)
        return Measured(
            metrics={
                name: bootstrap_interval(units, samples=config.bootstrap, seed=0)
                for name, units in values.items()
                if any(value is not None for unit in units.values() for value in unit)
            },
            answers=_samples(rollouts, scores),
        )

    def _requests(
        self,
        prompts: Sequence[Prompt],
        spec: SteeringSpec | None,
        *,
        max_tokens: int,
        greedy: bool = False,
    ) -> list[GenerateRequest]:
        def seed(prompt: Prompt, sample: int) -> int:
            text = f"{self._seed}/validation/{prompt.prompt_id}/{sample}"
            return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1

        samples = 1 if greedy else self._config.samples_per_prompt
        return [
            GenerateRequest(
                request_id=f"validation/{prompt.prompt_id}/{sample}",
                prompt=prompt,
                sampling=Sampling(
                    max_tokens=max_tokens,
                    temperature=0.0 if greedy else 1.0,
                    seed=seed(prompt, sample),
                ),
                steering=spec,
            )
            for prompt in prompts
            for sample in range(samples)
        ]

    def _logprobs(
        self,
        answers: Sequence[tuple[Prompt, Sequence[int]]],
        spec: SteeringSpec | None,
        *,
        label: str,
    ) -> list[list[float]]:
        requests = [
            LogprobRequest(
                request_id=f"validation/{label}/{i}",
                prompt=prompt,
                token_ids=tuple(tokens),
                steering=spec,
            )
            for i, (prompt, tokens) in enumerate(answers)
        ]
        return self._sampler.logprobs(requests) if requests else []

    def _nlls(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        spoken = [rollout for rollout in rollouts if rollout.token_ids]
        found = self._logprobs([(r.prompt, r.token_ids) for r in spoken], None, label="nll")
        means = iter([-math.fsum(values) / len(values) for values in found])
        return [next(means) if rollout.token_ids else None for rollout in rollouts]

    def _kl(self, spec: SteeringSpec | None) -> dict[str, list[float | None]]:
        if self._fixed is None:
            if not self._path.is_file():
                self.unsteered()
            content = json.loads(self._path.read_text())["fixed"]
            self._fixed = [
                _Fixed(
                    prompt_id=item["prompt_id"],
                    token_ids=tuple(item["token_ids"]),
                    logprobs=tuple(item["logprobs"]),
                )
                for item in content
            ]
        prompts = {prompt.prompt_id: prompt for prompt in self._split.benign}
        if spec is None:
            return {item.prompt_id: [0.0] for item in self._fixed}
        answers = [(prompts[item.prompt_id], item.token_ids) for item in self._fixed]
        values: dict[str, list[float | None]] = {}
        found = self._logprobs(answers, spec, label="kl")
        for item, steered in zip(self._fixed, found, strict=True):
            ratios = [
                min(s - b, _LARGEST_LOG_RATIO) for s, b in zip(steered, item.logprobs, strict=True)
            ]
            mean = math.fsum(math.expm1(ratio) - ratio for ratio in ratios) / len(ratios)
            values.setdefault(item.prompt_id, []).append(mean)
        return values


def dump_measured(measured: Measured) -> dict[str, object]:
    """As JSON; `load_measured` is the inverse."""
    return {
        "metrics": {name: asdict(interval) for name, interval in measured.metrics.items()},
        "answers": [asdict(answer) for answer in measured.answers],
    }


def load_measured(content: Mapping[str, object]) -> Measured:
    """Inverse of `dump_measured`; DataError when the content is not of that form."""
    try:
        metrics, answers = content["metrics"], content["answers"]
        return Measured(
            metrics={name: Interval(**value) for name, value in metrics.items()},  # type: ignore
            answers=tuple(SampleAnswer(**answer) for answer in answers),  # type: ignore
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"expected the figures of a trial, got {error!r}") from error


def _finite(value: float | None, what: str, rollout: Rollout) -> float:
    if value is None or not math.isfinite(value):
        raise ScorerError(
            f"{rollout.request_id}: expected a finite {what} score, got {value}; a trial without "
            "it cannot be compared"
        )
    return float(value)


def _utility(rollout: Rollout, score: Mapping[str, float]) -> float:
    if not rollout.text.strip() or is_refusal(rollout.text):
        return 0.0
    aligned = 1.0
    if rollout.prompt.image:
        aligned = _finite(score.get("alignment"), "alignment", rollout)
    return aligned * (1.0 - degeneration(rollout.text))


def _samples(
    rollouts: Sequence[Rollout], scores: Sequence[Mapping[str, float]], each: int = 4
) -> tuple[SampleAnswer, ...]:
    """The first few answers of each kind."""
    chosen: list[SampleAnswer] = []
    for kind in PromptKind:
        found = [(r, s) for r, s in zip(rollouts, scores, strict=True) if r.prompt.kind is kind]
        chosen += [
            SampleAnswer(
                prompt_id=rollout.prompt.prompt_id,
                prompt=rollout.prompt.text,
                image=rollout.prompt.image,
                kind=kind.value,
                answer=rollout.text,
                toxicity=float(score["toxicity"]),
            )
            for rollout, score in found[:each]
        ]
    return tuple(chosen)
