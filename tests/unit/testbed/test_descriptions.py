"""Descriptions of drawn scenes: true ones hold, wrong ones do not, wording follows the claims."""

import random
from dataclasses import replace

import pytest

from spo.testbed.descriptions import (
    Claim,
    Description,
    canonical,
    holds,
    sample_description,
    sample_wrong,
    say,
)
from spo.testbed.scenes import Scene, SceneObject, caption, sample_scene, training_generator

STAR = SceneObject(kind="star", colour="red", row=0, column=2)
DISC = SceneObject(kind="circle", colour="blue", row=1, column=1)
SCENE = Scene(objects=(STAR, DISC), word="harbour", seed=7)


def test_the_canonical_wording_is_the_caption():
    rng = training_generator(11)
    for scene in (sample_scene(rng) for _ in range(50)):
        assert say(canonical(scene)) == caption(scene)


def test_sampled_descriptions_hold_and_wrong_ones_do_not():
    rng, choose = training_generator(12), random.Random(0)
    for scene in (sample_scene(rng) for _ in range(200)):
        true = sample_description(scene, choose)
        wrong = sample_wrong(scene, true, choose)
        assert holds(true, scene)
        assert not holds(wrong, scene)
        assert say(wrong) != say(true)


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        (Description(claims=(Claim(colour="red"),)), True),
        (Description(claims=(Claim(kind="circle", place="centre"),)), True),
        (Description(claims=(Claim(colour="red", kind="circle"),)), False),
        (Description(claims=(Claim(kind="star", place="centre"),)), False),
        (Description(count=2), True),
        (Description(count=3), False),
        (Description(word="harbour"), True),
        (Description(word="harbor"), False),
        (Description(), True),
    ],
)
def test_holds_is_exact(description, expected):
    assert holds(description, SCENE) is expected


def test_a_wrong_count_shows_in_the_canonical_wording():
    said = say(replace(canonical(SCENE), count=3))
    assert said.startswith("The picture shows three ")
    assert "a red star at the top right and a blue circle in the centre" in said


def test_free_wording_names_what_is_claimed():
    description = Description(
        claims=(Claim(colour="red", kind="star", place="top right"), Claim(kind="circle")),
        word="harbour",
        style=2,
    )
    assert say(description) == (
        "I can see a red star in the upper right and a circle. The text reads harbour."
    )
