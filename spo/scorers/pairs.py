"""A sequence classifier that reads a request and its answer: harm, refusal, or another label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers

from spo.errors import ScorerError


class PairClassifier:
    """Any Transformers sequence classifier over (request, answer).

    Args:
        model: local folder or hub id.
        label: label whose chance is the score; None: the only one.
        max_length: tokens that are read, of request and answer together; the longer one is cut.
        device: torch device.
        batch_size: pairs per forward pass.

    Raises:
        ScorerError: there is no such classifier, or no such label.
    """

    def __init__(
        self,
        model: str,
        *,
        label: str | None = None,
        max_length: int = 512,
        device: str = "cpu",
        batch_size: int = 64,
    ) -> None:
        config = read_classifier(model)
        self._index = label_index(config, label, model)
        self._softmax = (
            config.num_labels > 1 and config.problem_type != "multi_label_classification"
        )
        self._batch_size = batch_size
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(model)
            loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
                model, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise ScorerError(
                f"expected a sequence classifier with its tokenizer at {model!r}, got: {error}; "
                "correct 'model' or fetch it whole"
            ) from error
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if loaded.config.pad_token_id is None:
            loaded.config.pad_token_id = self._tokenizer.pad_token_id
        room = getattr(config, "max_position_embeddings", None) or max_length
        self._max_length = min(max_length, room, self._tokenizer.model_max_length)
        self._model = loaded.to(device).eval()

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Chance of the label for each (request, answer), 0 to 1, in order; not checked further."""
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        scores = [0.0] * len(pairs)
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            batch = self._tokenizer(
                [pairs[row][0] for row in rows],
                [pairs[row][1] for row in rows],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=self._max_length,
            ).to(self._model.device)
            with torch.inference_mode():
                logits = self._model(**batch).logits.float()
            chances = logits.softmax(dim=1) if self._softmax else logits.sigmoid()
            for row, value in zip(rows, chances[:, self._index].tolist(), strict=True):
                scores[row] = value
        return scores


def read_classifier(model: str) -> Any:
    """The configuration of a sequence classifier, without its weights.

    Raises:
        ScorerError: there is none.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ScorerError(
            f"expected a Transformers sequence classifier (local folder or hub id), got {model!r}: "
            f"{error}"
        ) from error
    kinds = config.architectures or []
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ScorerError(
            f"expected a Transformers sequence classifier, got {model!r} with {kinds}; its head "
            "would have random weights"
        )
    return config


def label_index(config: Any, label: str | None, model: str) -> int:
    """Place of a label among a classifier's logits.

    Raises:
        ScorerError: it has no such label, or several and none was named.
    """
    labels = [str(config.id2label[i]) for i in range(config.num_labels)]
    if label is None and len(labels) == 1:
        return 0
    if label not in labels:
        raise ScorerError(
            f"{model!r} has the labels {labels}, got label {label!r}; name the one whose chance "
            "is the score"
        )
    return labels.index(label)
