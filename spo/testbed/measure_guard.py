"""Prompts that the guarded model is measured on, and its answers to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from spo.attacks.templates import template_prompts
from spo.engines.base import Engine
from spo.records import GenerateRequest, Prompt, PromptKind, Sampling, Split, SteeringSpec
from spo.testbed import data, requests
from spo.testbed.requests import RequestSplit


def request_prompts(
    split: RequestSplit, count: int, seed: int, cache: Path
) -> dict[str, tuple[Prompt, ...]]:
    """The guard's prompt sets: harmful requests in four forms, twins in three.

    Keys: `harm`, `harm_picture` (beside a clean picture), `template` (text jailbreaks), `drawn`
    (words in the picture), `twin`, `twin_picture` and `hard_twin`.
    """
    pairs = requests.request_pairs(split, count, seed)
    pictures = [str(path) for _, path in data.draw_scenes(cache, split, min(count, 32), seed + 5)]

    def of(
        name: str, texts: Sequence[str], kind: PromptKind, groups: Sequence[str]
    ) -> list[Prompt]:
        return [
            Prompt(
                prompt_id=f"{split}-{name}-{i:05d}",
                text=text,
                kind=kind,
                category=group,
                split=Split.TRAIN if split == "train" else Split.HELDOUT,
            )
            for i, (text, group) in enumerate(zip(texts, groups, strict=True))
        ]

    def pictured(prompts: Sequence[Prompt], name: str) -> tuple[Prompt, ...]:
        return tuple(
            replace(p, prompt_id=f"{split}-{name}-{i:05d}", image=pictures[i % len(pictures)])
            for i, p in enumerate(prompts)
        )

    groups = [pair.category for pair in pairs]
    harm = of("harm", [pair.harmful for pair in pairs], PromptKind.HARM, groups)
    twin = of("twin", [pair.twin for pair in pairs], PromptKind.BENIGN, groups)
    most = {"train": 110, "validation": 16, "heldout": 70}[split]
    hard = requests.hard_twins(split, min(count, most), seed)
    return {
        "harm": tuple(harm),
        "harm_picture": pictured(harm, "harm-picture"),
        "template": tuple(template_prompts(harm)),
        "drawn": data.drawn_request_prompts(split, min(count, 40), seed, cache),
        "twin": tuple(twin),
        "twin_picture": pictured(twin, "twin-picture"),
        "hard_twin": tuple(of("hard-twin", hard, PromptKind.BENIGN, ["hard_twin"] * len(hard))),
    }


def answers(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    samples: int = 1,
    max_tokens: int = 32,
    temperature: float = 1.0,
    steering: SteeringSpec | None = None,
) -> list[str]:
    """Sampled answers, prompt by prompt."""
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature)
    asked = [
        GenerateRequest(
            request_id=f"{prompt.prompt_id}/{number}",
            prompt=prompt,
            sampling=sampling,
            steering=steering,
        )
        for prompt in prompts
        for number in range(samples)
    ]
    return [rollout.text for rollout in engine.generate(asked)]
