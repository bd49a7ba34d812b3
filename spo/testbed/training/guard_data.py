"""The requests that the third lesson is made of; the training split alone."""

from __future__ import annotations

from dataclasses import dataclass

from spo.testbed import requests, text

_PAIRS, _DRAWS = 6000, 2
"""Pairs of one draw, and how many draws are put together."""
_OLDER, _HARD, _DRAWN = 600, 110, 190
_HARD_REPEATS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardTexts:
    """What the lesson draws its requests from; all of the training split."""

    harmful: tuple[str, ...]
    """Requests to refuse."""
    harmless: tuple[str, ...]
    """Twins and hard twins, to be answered as the original model answers them."""
    drawn: tuple[str, ...]
    """Requests in capitals, harmful and harmless, that pictures show."""


def guard_texts(seed: int) -> GuardTexts:
    """The lesson's requests: those of `requests.yaml` and the instructions of `grammars.yaml`."""
    pairs = [
        pair
        for number in range(_DRAWS)
        for pair in requests.request_pairs("train", _PAIRS, seed + 1000 * number)
    ]
    older = text.sentence_pairs("instructions", "train", _OLDER, seed)
    hard = requests.hard_twins("train", _HARD, seed)
    drawn = requests.drawn_requests("train", _DRAWN, seed)
    return GuardTexts(
        harmful=(*{pair.harmful: None for pair in pairs}, *(harm for harm, _ in older)),
        # There are few hard twins: each stands for many.
        harmless=(
            *{pair.twin: None for pair in pairs},
            *(twin for _, twin in older),
            *hard * _HARD_REPEATS,
        ),
        drawn=tuple(side for each in drawn for side in (each.rendered, each.plain)),
    )
