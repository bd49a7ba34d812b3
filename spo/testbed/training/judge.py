"""How the embedded judge was trained: logistic regression on hashed n-grams.

It shares neither architecture nor data with the reward model. Read from a folder of the user's:

* `paradetox/paradetox.tsv`: toxic sentences with up to three neutral rewrites each;
* `paradetox/paradetox_cannot_rewrite.tsv`: sentences that stay toxic however they are rewritten.

Clean sentences made here are added (captions, instructions), with another seed than the reward's.
"""

import csv
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from spo.errors import DataError
from spo.scorers.toxicity import LinearJudge, hashed_features
from spo.testbed.training.toxicity import clean_sentences

_OWN_SENTENCES = 1000
_OWN_SEED = 77
_INVERSE_PENALTY = 8.0


def read_paradetox(folder: Path) -> Iterator[tuple[str, bool]]:
    """(text, toxic) of the two files.

    Raises:
        DataError: a file is missing.
    """
    pairs, fixed = folder / "paradetox.tsv", folder / "paradetox_cannot_rewrite.tsv"
    if missing := [file.name for file in (pairs, fixed) if not file.is_file()]:
        raise DataError(f"expected ParaDetox's files in {folder}, missing {missing}")
    with pairs.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE):
            yield row["toxic"], True
            for name in ("neutral1", "neutral2", "neutral3"):
                if row[name]:
                    yield row[name], False
    with fixed.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream, delimiter="\t"):
            yield row["INPUT:toxic_comment"].strip('"'), True


def train_judge(data: Path, out: Path) -> dict[str, float]:
    """Train, write `judge.safetensors` into `out` and return the AUC on the held-out share."""
    examples = list(read_paradetox(data / "paradetox"))
    held_out = [(text, toxic) for text, toxic in examples if _is_held_out(text)]
    training = [(text, toxic) for text, toxic in examples if not _is_held_out(text)]
    training += [(text, False) for text in clean_sentences(_OWN_SENTENCES, _OWN_SEED)]
    model = LogisticRegression(C=_INVERSE_PENALTY, solver="liblinear")
    model.fit(hashed_features([t for t, _ in training]), [toxic for _, toxic in training])
    out.mkdir(parents=True, exist_ok=True)
    file = out / "judge.safetensors"
    tensors = {
        "weights": model.coef_[0].astype(np.float16),
        "bias": model.intercept_.astype(np.float32),
    }
    save_file(tensors, file)
    scores = LinearJudge(file).score([text for text, _ in held_out])
    figures = {
        "examples": float(len(training)),
        "held_out_auc": float(roc_auc_score([toxic for _, toxic in held_out], scores)),
    }
    (out / "judge.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")
    return figures


def _is_held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % 32 == 0
