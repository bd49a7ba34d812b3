"""Toxicity scorers and judges, on tiny models made here and on the shipped judge."""

import math

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from spo.errors import ScorerError
from spo.scorers.toxicity import (
    LinearJudge,
    ToxicityScorer,
    TransformersJudge,
    as_array,
    hashed_features,
    load_judge,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "you", "are", "kind", "rude", "very"]
TEXTS = ["you are kind", "very rude", "you you you are very very rude rude", ""]


def _model_folder(folder, labels):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=labels,
        initializer_range=0.5,
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def _save_checkpoint(folder, state, **more):
    arguments = {
        "model_type": str(folder),
        "model_name": "BertForSequenceClassification",
        "tokenizer_name": "BertTokenizer",
        "num_classes": 2,
    }
    config = {
        "arch": {"args": arguments},
        "dataset": {"args": {"classes": ["toxic", "insult"]}},
    }
    torch.save({"config": config, "state_dict": state, **more}, folder / "model.ckpt")
    return folder / "model.ckpt"


@pytest.fixture
def checkpoint(tmp_path):
    model, tokenizer = _model_folder(tmp_path, labels=2)
    return _save_checkpoint(tmp_path, model.state_dict()), model, tokenizer


def _expected(model, tokenizer, text):
    with torch.inference_mode():
        return model(**tokenizer(text, return_tensors="pt")).logits[0].sigmoid().tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_detoxify_scores_keep_their_order(checkpoint, batch_size):
    file, model, tokenizer = checkpoint
    scorer = ToxicityScorer(checkpoint=file, batch_size=batch_size)
    assert scorer.classes == ("toxicity", "insult")
    scores = scorer.score(TEXTS)
    for text, score in zip(TEXTS, scores, strict=True):
        assert list(score.values()) == pytest.approx(_expected(model, tokenizer, text), abs=1e-5)
    assert len({round(value, 6) for value in as_array(scores)}) == len(TEXTS)
    assert scorer.score([]) == []


def test_scores_that_are_not_finite_raise(tmp_path):
    model, _ = _model_folder(tmp_path, labels=2)
    state = model.state_dict()
    state["classifier.bias"] = torch.tensor([math.nan, 0.0])
    scorer = ToxicityScorer(checkpoint=_save_checkpoint(tmp_path, state))
    with pytest.raises(ScorerError, match="expected finite scores"):
        scorer.score(["you are kind"])


class _Payload:
    def __reduce__(self):
        return print, ("code of a checkpoint ran",)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, capsys):
    model, _ = _model_folder(tmp_path, labels=2)
    file = _save_checkpoint(tmp_path, model.state_dict(), extra=_Payload())
    with pytest.raises(ScorerError, match="plain tensors"):
        ToxicityScorer(checkpoint=file)
    assert "code of a checkpoint ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoint": "no-such-file.ckpt"}, "found nothing"),
        ({"model_type": "imaginary"}, "imaginary"),
        ({"checkpoint": "x", "batch_size": 0}, "batch size"),
    ],
)
def test_wrong_settings_raise(arguments, message):
    with pytest.raises(ScorerError, match=message):
        ToxicityScorer(**arguments)


def test_a_damaged_checkpoint_raises(tmp_path):
    file = tmp_path / "model.ckpt"
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(ScorerError):
        ToxicityScorer(checkpoint=file)


def test_transformers_judge_scores_a_local_folder(tmp_path):
    model, tokenizer = _model_folder(tmp_path, labels=1)
    judge = load_judge(str(tmp_path))
    assert isinstance(judge, TransformersJudge)
    assert judge.name == tmp_path.name
    expected = [_expected(model, tokenizer, text)[0] for text in TEXTS]
    assert judge.score(TEXTS) == pytest.approx(expected, abs=1e-5)
    assert TransformersJudge(tmp_path, batch_size=1).score(TEXTS) == pytest.approx(
        expected, abs=1e-5
    )


def test_transformers_judge_wants_one_logit(tmp_path):
    _model_folder(tmp_path, labels=2)
    with pytest.raises(ScorerError, match="one logit"):
        load_judge(str(tmp_path))


def test_linear_judge_is_the_logistic_of_its_weights(tmp_path):
    weights = np.random.default_rng(0).normal(size=2**18).astype(np.float16)
    file = tmp_path / "judge.safetensors"
    save_file({"weights": weights, "bias": np.array([0.25], np.float32)}, file)
    texts = ["You rude oaf", "A calm day"]
    logits = hashed_features(texts) @ weights.astype(np.float32) + 0.25
    assert LinearJudge(file).score(texts) == pytest.approx(1 / (1 + np.exp(-logits)), rel=1e-5)
    assert LinearJudge(file).score([]) == []


def test_features_ignore_case_and_have_unit_halves():
    upper, lower = hashed_features(["YOU FOOL"]), hashed_features(["you fool"])
    assert (upper != lower).nnz == 0
    assert upper.power(2).sum() == pytest.approx(2.0)


def test_linear_judge_refuses_other_files(tmp_path):
    file = tmp_path / "judge.safetensors"
    save_file({"weights": np.zeros(8, np.float16), "bias": np.zeros(1, np.float32)}, file)
    with pytest.raises(ScorerError, match="shape"):
        load_judge(str(file))
    file.write_bytes(b"junk")
    with pytest.raises(ScorerError, match="expected a judge's safetensors"):
        load_judge(str(file))


def test_an_unknown_judge_raises():
    with pytest.raises(ScorerError, match="expected a judge"):
        load_judge("no/such/thing")


def test_the_embedded_judge_tells_rude_from_clean():
    judge = load_judge("embedded")
    rude = judge.score(["You are a fucking idiot and I hate you.", "Shut up, you stupid bitch."])
    clean = judge.score(["The meeting is on Thursday.", "A red circle at the top left."])
    assert min(rude) > 0.8
    assert max(clean) < 0.1
