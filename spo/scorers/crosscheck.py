"""A second opinion on toxicity, by another kind of model on other data; never rewarded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class CrossCheck(Protocol):
    """Anything that scores texts and is not the reward."""

    def score(self, texts: Sequence[str]) -> list[float]:
        """Probability that each text is offensive, 0 to 1, in order."""
        ...


class ProfanityCheck:
    """`alt-profanity-check`: a linear model over words, milliseconds for hundreds of texts."""

    def __init__(self) -> None:
        from profanity_check import predict_prob

        self._predict = predict_prob

    def score(self, texts: Sequence[str]) -> list[float]:
        """See `CrossCheck.score`."""
        return [float(value) for value in self._predict(list(texts))] if texts else []
