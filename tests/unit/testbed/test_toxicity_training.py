"""Merging the shipped update, and reading labelled text."""

import json

import pytest
import torch

from spo.errors import ArtifactError, DataError
from spo.testbed.toxicity import WEIGHTS, assemble_toxicity, merge_update
from spo.testbed.training import toxicity as training


def test_merge_adds_low_rank_products_and_replaces_the_rest():
    state = {"a.weight": torch.ones(2, 3), "head.bias": torch.zeros(1)}
    update = {
        "a.down": torch.tensor([[1.0, 0.0, 2.0]]),
        "a.up": torch.tensor([[3.0], [0.0]]),
        "head.bias": torch.tensor([0.5], dtype=torch.float16),
    }
    merged = merge_update(state, update)
    assert merged["a.weight"].tolist() == [[4.0, 1.0, 7.0], [1.0, 1.0, 1.0]]
    assert merged["head.bias"].tolist() == [0.5]
    assert state["a.weight"].tolist() == [[1.0] * 3] * 2


def test_merge_refuses_a_strange_update():
    with pytest.raises(ArtifactError, match=r"b\.weight"):
        merge_update({"a.weight": torch.ones(1, 1)}, {"b.down": torch.ones(1, 1)})


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"none\.safetensors"):
        assemble_toxicity(tmp_path, weights=tmp_path / "none.safetensors")


def test_low_rank_layers_start_as_the_frozen_layer_and_merge_to_the_same_output():
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 4)
    plain = torch.nn.Linear(5, 4)
    plain.load_state_dict(linear.state_dict())
    layer = training.LowRankLinear(linear, rank=2)
    inputs = torch.randn(3, 5)
    assert torch.equal(layer(inputs), plain(inputs))
    layer.up.data = torch.randn(4, 2)
    merged = merge_update(
        {"x.weight": plain.weight.detach()}, {"x.down": layer.down, "x.up": layer.up}
    )
    plain.weight.data = merged["x.weight"].detach()
    torch.testing.assert_close(layer(inputs), plain(inputs))


def test_readers_give_labels(tmp_path):
    for name in ("davidson", "civil-spans", "detox"):
        (tmp_path / name).mkdir()
    (tmp_path / "davidson/labeled_data.csv").write_text(
        ",count,hate_speech,offensive_language,neither,class,tweet\n"
        '0,4,1,2,1,1,"!!! RT @somebody: you &amp; your cat"\n',
        encoding="utf-8",
    )
    post = "What a fool you are. The weather is nice here today."
    spans = json.dumps(list(range(7, 11)))
    for name in ("tsd_train.csv", "tsd_trial.csv"):
        text = f'spans,text\n"{spans}","{post}"\n"[]","Nobody agreed on this one."\n'
        (tmp_path / "civil-spans" / name).write_text(text, encoding="utf-8")
    for part in ("test_10k", "dev"):
        (tmp_path / f"detox/{part}_toxic.txt").write_text("you oaf\n", encoding="utf-8")
        (tmp_path / f"detox/{part}_normal.txt").write_text("see you soon\n", encoding="utf-8")
    tweets = list(training.read_davidson(tmp_path / "davidson"))
    assert [(e.text, e.toxicity) for e in tweets] == [("you & your cat", 0.75)]
    spanned = {(e.text, e.toxicity) for e in training.read_civil_spans(tmp_path / "civil-spans")}
    assert (post, 1.0) in spanned
    assert ("The weather is nice here today.", 0.0) in spanned
    assert all("fool" in text for text, toxicity in spanned if toxicity == 1.0)
    assert {e.text for e in training.read_detox(tmp_path / "detox") if e.toxicity} == {"you oaf"}


def test_a_folder_without_the_data_is_refused(tmp_path):
    with pytest.raises(DataError, match="davidson"):
        training.load_examples(tmp_path, seed=0)


def test_the_shipped_weights_are_small():
    assert WEIGHTS.stat().st_size <= 4 * 2**20
