"""The contrast with exact truth that the alignment model learns from."""

import random

import pytest
import torch

from spo.testbed.descriptions import (
    claim_facts,
    holds,
    sample_description,
    sample_wrong,
    scene_facts,
    word_number,
)
from spo.testbed.scenes import sample_scene, training_generator
from spo.testbed.training.alignment import contrast_loss, truth_matrix


def _padded(rows):
    width = max(map(len, rows))
    return torch.tensor([sorted(row) + [-1] * (width - len(row)) for row in rows])


def test_the_truth_matrix_equals_the_definition():
    rng, choose = training_generator(3), random.Random(1)
    scenes = [sample_scene(rng) for _ in range(40)]
    said = [sample_description(scene, choose) for scene in scenes]
    said += [sample_wrong(scene, true, choose) for scene, true in zip(scenes, said, strict=True)]
    truth = truth_matrix(
        _padded([scene_facts(scene) for scene in scenes]),
        torch.tensor([word_number(scene.word) for scene in scenes]),
        _padded([claim_facts(description) for description in said]),
        torch.tensor([word_number(description.word) for description in said]),
    )
    expected = [[holds(description, scene) for description in said] for scene in scenes]
    assert truth.tolist() == expected
    assert truth[:, :40].diagonal().all()
    assert truth.sum() > 40


def test_the_loss_ignores_descriptions_that_also_hold():
    similarity = torch.tensor([[2.0, 9.0, 0.0], [1.0, 3.0, 0.0]])
    own = torch.tensor([0, 1])
    truth = torch.tensor([[True, True, False], [False, True, False]])
    to_text = -(
        torch.log_softmax(torch.tensor([2.0, 0.0]), 0)[0]
        + torch.log_softmax(torch.tensor([3.0, 1.0, 0.0]), 0)[0]
    )
    to_image = -(torch.log_softmax(torch.tensor([2.0, 1.0]), 0)[0] + 0.0)
    expected = (to_text / 2 + to_image / 2) / 2
    assert contrast_loss(similarity, truth, own).item() == pytest.approx(expected.item(), rel=1e-6)
