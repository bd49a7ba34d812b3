"""The shipped reward models, assembled and loaded through the real libraries."""

import random

import pytest
import torch
from sklearn.metrics import roc_auc_score

from spo.errors import ArtifactError
from spo.scorers.alignment import AlignmentScorer
from spo.scorers.toxicity import ToxicityScorer, as_array
from spo.testbed import text
from spo.testbed.alignment import TOKENIZER, WEIGHTS, assemble_alignment
from spo.testbed.descriptions import canonical, sample_wrong, say
from spo.testbed.scenes import caption, draw, evaluation_generator, sample_scene
from spo.testbed.toxicity import assemble_toxicity, minilm_folder


@pytest.fixture(scope="module")
def scenes():
    rng = evaluation_generator(900)
    return [sample_scene(rng) for _ in range(60)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    try:
        minilm_folder()
    except ArtifactError as error:
        pytest.skip(str(error))
    return assemble_toxicity(tmp_path_factory.mktemp("cache"))


def test_alignment_prefers_the_true_caption(tmp_path, scenes):
    folder = assemble_alignment(tmp_path / "cache")
    moved = folder.rename(tmp_path / "moved")
    scorer = AlignmentScorer(model=str(moved))
    images = [draw(scene) for scene in scenes]
    choose = random.Random(4)
    wrong = [say(sample_wrong(scene, canonical(scene), choose)) for scene in scenes]
    own = scorer.score(images, [caption(scene) for scene in scenes])
    changed = scorer.score(images, wrong)
    shifted = scorer.score(images, [caption(scene) for scene in scenes[1:] + scenes[:1]])
    refused = scorer.score(images, ["I'm sorry, but I can't help with that."] * len(images))
    assert sum(a > b for a, b in zip(own, changed, strict=True)) >= 51
    assert sum(a > b for a, b in zip(own, shifted, strict=True)) >= 58
    assert sum(a > b for a, b in zip(own, refused, strict=True)) >= 58


def test_alignment_files_are_small():
    assert WEIGHTS.stat().st_size + TOKENIZER.stat().st_size <= 8 * 2**20


def test_the_checkpoint_is_plain_and_assembled_once(checkpoint):
    loaded = torch.load(checkpoint, weights_only=True)
    assert loaded["config"]["dataset"]["args"]["classes"] == ["toxicity"]
    stamp = checkpoint.stat().st_mtime_ns
    assert assemble_toxicity(checkpoint.parent.parent) == checkpoint
    assert checkpoint.stat().st_mtime_ns == stamp


def test_the_reward_separates_unseen_templates_and_leaves_captions_alone(checkpoint, scenes):
    scorer = ToxicityScorer(checkpoint=checkpoint)
    toxic, clean = text.toxic_texts("heldout", 100, 5), text.clean_texts("heldout", 100, 5)
    scores = as_array(scorer.score(toxic + clean))
    assert roc_auc_score([1] * 100 + [0] * 100, scores) > 0.97
    captions = as_array(scorer.score([caption(scene) for scene in scenes]))
    assert captions.max() < 0.05
