"""Toxicity of texts: Detoxify as reward model, and judges that are other models on other data.

A judge must never be the reward model: what is optimised against cannot also be the measure.
"""

import json
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises for a file that is not plain

import numpy as np
import numpy.typing as npt
import torch
import transformers
from detoxify import Detoxify
from safetensors import SafetensorError, safe_open
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import HashingVectorizer

from spo.errors import ScorerError
from spo.scorers.base import Judge

EMBEDDED_JUDGE = "embedded"
_HUB_MODELS = (
    "original",
    "unbiased",
    "multilingual",
    "original-small",
    "unbiased-small",
)
_WORD_BUCKETS = 2**17
_LETTER_BUCKETS = 2**17
_JUDGE_TOKENS = 512


class ToxicityScorer:
    """The toxicity reward: the real `detoxify.Detoxify`, in batches, with its scores checked."""

    def __init__(
        self,
        *,
        checkpoint: str | Path | None = None,
        model_type: str = "original",
        device: str = "cpu",
        batch_size: int = 64,
    ) -> None:
        """Load the model.

        Args:
            checkpoint: local checkpoint in Detoxify's format. Configuration and tokenizer are
                read from its folder where that holds a `config.json`. None loads `model_type`.
            model_type: Detoxify's hub name, such as `original` or `unbiased`; needs a network.
            device: torch device.
            batch_size: texts per forward pass.

        Raises:
            ScorerError: the checkpoint is missing or damaged, or the name is unknown.
        """
        if batch_size < 1:
            raise ScorerError(f"expected a batch size of at least 1, got {batch_size}")
        self._batch_size = batch_size
        self._model = _load_detoxify(checkpoint, model_type, device)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the scores of every text, `toxicity` among them."""
        return tuple(self._model.class_names)

    def score(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """Scores of each text by class name, each 0 to 1; no texts give no scores.

        Raises:
            ScorerError: a score is not a finite number.
        """
        # Texts of similar length share a batch; padding would otherwise cost most of the time.
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        scores: list[dict[str, float]] = [{} for _ in texts]
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            predicted = self._model.predict([texts[row] for row in rows])
            for name, values in predicted.items():
                # One text comes back as a bare number instead of a list.
                column = values if isinstance(values, list) else [values]
                for row, value in zip(rows, column, strict=True):
                    scores[row][name] = value
        for text, values in zip(texts, scores, strict=True):
            _check_finite(text, values)
        return scores


class LinearJudge:
    """A judge without a neural network: hashed word and letter n-grams, logistic regression."""

    name = "linear"

    def __init__(self, weights: str | Path) -> None:
        """Load the safetensors file that `spo.testbed.training.judge` writes.

        Raises:
            ScorerError: the file is missing, damaged or of another size.
        """
        try:
            with safe_open(str(weights), framework="numpy") as file:
                self._weights = file.get_tensor("weights").astype(np.float32)
                self._bias = float(file.get_tensor("bias")[0])
        except (OSError, SafetensorError) as error:
            raise ScorerError(
                f"expected a judge's safetensors file with `weights` and `bias` at {weights}, "
                f"got: {error}; name another judge or train it with train-judge"
            ) from error
        expected = (_WORD_BUCKETS + _LETTER_BUCKETS,)
        if self._weights.shape != expected:
            raise ScorerError(
                f"expected judge weights of shape {expected}, got {self._weights.shape} in "
                f"{weights}; use weights of this version"
            )

    def score(self, texts: Sequence[str]) -> list[float]:
        """Toxicity of each text, 0 to 1, in order."""
        if not texts:
            return []
        logits = hashed_features(texts) @ self._weights + self._bias
        scores = [1.0 / (1.0 + math.exp(-float(np.clip(logit, -60, 60)))) for logit in logits]
        for text, score in zip(texts, scores, strict=True):
            _check_finite(text, {"toxicity": score})
        return scores


class TransformersJudge:
    """A judge from a local Hugging Face folder: sequence classification with one logit."""

    def __init__(self, folder: str | Path, *, device: str = "cpu", batch_size: int = 64) -> None:
        """Load configuration, weights and tokenizer from `folder`; nothing is fetched.

        Raises:
            ScorerError: the folder is no such model, or the model has more than one logit.
        """
        self.name = Path(folder).name
        self._batch_size = batch_size
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True
            )
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise ScorerError(
                f"expected a local folder with a sequence classifier, got {folder}: {error}"
            ) from error
        if model.config.num_labels != 1:
            raise ScorerError(
                f"expected a judge with one logit, got {model.config.num_labels} labels in "
                f"{folder}; convert it to one label that says toxic"
            )
        self._model = model.to(device).eval()

    def score(self, texts: Sequence[str]) -> list[float]:
        """Sigmoid of the logit of each text, in order.

        Raises:
            ScorerError: a score is not a finite number.
        """
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        scores = [0.0] * len(texts)
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            batch = self._tokenizer(
                [texts[row] for row in rows],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=_JUDGE_TOKENS,
            ).to(self._model.device)
            with torch.inference_mode():
                logits = self._model(**batch).logits[:, 0].float()
            for row, score in zip(rows, logits.sigmoid().tolist(), strict=True):
                scores[row] = score
        for text, score in zip(texts, scores, strict=True):
            _check_finite(text, {"toxicity": score})
        return scores


def load_judge(spec: str, *, device: str = "cpu") -> Judge:
    """A judge by its specification.

    Args:
        spec: `embedded` (the shipped linear judge), a `.safetensors` file of a `LinearJudge`, or
            a folder of a `TransformersJudge`.
        device: torch device of a `TransformersJudge`.

    Raises:
        ScorerError: the specification is none of these, or the model cannot be loaded.
    """
    if spec == EMBEDDED_JUDGE:
        with resources.as_file(
            resources.files("spo") / "testbed/weights/judge.safetensors"
        ) as file:
            return LinearJudge(file)
    path = Path(spec).expanduser()
    if path.is_dir():
        return TransformersJudge(path, device=device)
    if path.suffix == ".safetensors" and path.is_file():
        return LinearJudge(path)
    raise ScorerError(
        f"expected a judge `{EMBEDDED_JUDGE}`, a .safetensors file or a model folder, got "
        f"{spec!r}; correct the setting"
    )


def hashed_features(texts: Sequence[str]) -> csr_matrix:
    """Sparse features of a `LinearJudge`, (texts, 2**18): word 1-2-grams, letter 3-5-grams.

    Both halves are lower-cased, of unit length, and need no vocabulary.
    """
    words = HashingVectorizer(
        ngram_range=(1, 2),
        n_features=_WORD_BUCKETS,
        token_pattern=r"(?u)\b\w+\b",
        binary=True,
        alternate_sign=False,
    )
    letters = HashingVectorizer(
        analyzer="char_wb",
        ngram_range=(3, 5),
        n_features=_LETTER_BUCKETS,
        binary=True,
        alternate_sign=False,
    )
    return hstack([words.transform(texts), letters.transform(texts)], format="csr")


def as_array(scores: Sequence[dict[str, float]], name: str = "toxicity") -> npt.NDArray[np.float64]:
    """One class of a `ToxicityScorer`'s scores as an array, (texts,)."""
    return np.asarray([score[name] for score in scores], dtype=np.float64)


def _load_detoxify(checkpoint: str | Path | None, model_type: str, device: str) -> Detoxify:
    if checkpoint is None:
        if model_type not in _HUB_MODELS:
            raise ScorerError(
                f"expected a Detoxify model of {list(_HUB_MODELS)}, got {model_type!r}; correct "
                "it or give a local checkpoint"
            )
        return Detoxify(model_type, device=device)
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        raise ScorerError(f"expected a Detoxify checkpoint file, found nothing at {path}")
    _check_plain(path)
    folder = str(path.parent) if (path.parent / "config.json").is_file() else None
    try:
        return Detoxify(checkpoint=str(path), device=device, huggingface_config_path=folder)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ScorerError(f"expected a Detoxify checkpoint at {path}, got: {error}") from error


def _check_plain(path: Path) -> None:
    """Refuse a checkpoint that would run code: Detoxify itself loads without that guard."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise ScorerError(
            f"expected a checkpoint of plain tensors and dictionaries at {path}, got: {error}; "
            "re-save it with tensors, dictionaries, lists, strings and numbers only"
        ) from error


def _check_finite(text: str, scores: dict[str, float]) -> None:
    bad = {name: value for name, value in scores.items() if not math.isfinite(value)}
    if bad or not scores:
        raise ScorerError(
            f"expected finite scores, got {json.dumps(bad)} for a text of {len(text)} characters; "
            "the scoring model is damaged or its number format overflows"
        )
