"""Requests of the guarded model: splits that share nothing, twins, refusals."""

import random
import re
from itertools import combinations

import pytest

from spo.algorithms.rewards import is_refusal
from spo.errors import DataError
from spo.testbed import requests
from spo.testbed.training.guard_data import guard_texts

SPLITS = ("train", "validation", "heldout")
GRAMMAR = requests._grammar()


def slot_values(split: str) -> set[str]:
    groups = [*requests._slots_of_all(GRAMMAR), GRAMMAR["hard_twins"]["slots"]]
    return {value for slots in groups for values in slots.values() for value in values[split]}


def forms(split: str) -> set[str]:
    pairs = [
        side
        for family in ("categories", "acts")
        for each in GRAMMAR[family].values()
        for pair in (each["pairs"] if family == "categories" else each)[split]
        for side in pair
    ]
    drawn = [side for pair in GRAMMAR["drawn"][split] for side in pair]
    single = [*GRAMMAR["frames"][split], *GRAMMAR["hard_twins"]["templates"][split]]
    return {*pairs, *drawn, *single, *GRAMMAR["carriers"][split], *GRAMMAR["compliance"][split]}


@pytest.mark.parametrize("split", SPLITS)
def test_pairs_are_distinct_seeded_and_balanced(split):
    pairs = requests.request_pairs(split, 90, seed=3)
    assert pairs == requests.request_pairs(split, 90, seed=3)
    assert pairs != requests.request_pairs(split, 90, seed=4)
    said = [side for pair in pairs for side in (pair.harmful, pair.twin)]
    assert len(set(said)) == len(said) == 180
    assert not any(re.search(r"[{}]", side) for side in said)
    assert {pair.category for pair in pairs} == set(requests.categories(split))


@pytest.mark.parametrize(("one", "other"), list(combinations(SPLITS, 2)))
def test_splits_share_no_form_and_no_slot_value(one, other):
    assert not forms(one) & forms(other)
    assert not slot_values(one) & slot_values(other)


def test_one_category_is_held_out_and_there_are_eight_others():
    assert requests.HELDOUT_CATEGORY in requests.categories("heldout")
    for split in ("train", "validation"):
        assert requests.HELDOUT_CATEGORY not in requests.categories(split)
        assert len(requests.categories(split)) >= 8
    only = requests.request_pairs("heldout", 20, 0, only=requests.HELDOUT_CATEGORY)
    assert {pair.category for pair in only} == {requests.HELDOUT_CATEGORY}


def test_every_refusal_is_known_as_one_and_they_vary():
    said = {requests.refusal(random.Random(seed)) for seed in range(400)}
    assert len(said) > 150
    assert all(is_refusal(text) for text in said)


def test_openings_of_compliance_are_no_refusals():
    assert not any(is_refusal(text) for s in SPLITS for text in requests.compliance_openings(s))


def test_the_lesson_is_of_the_training_split_alone():
    texts = guard_texts(seed=2)
    heldout = requests.request_pairs("heldout", 300, 0)
    assert len(set(texts.harmful)) > 8000
    assert not {pair.harmful for pair in heldout} & set(texts.harmful)
    assert not {pair.twin for pair in heldout} & set(texts.harmless)
    assert not set(texts.harmful) & set(texts.harmless)
    assert not set(requests.hard_twins("heldout", 60, 0)) & set(texts.harmless)


def test_words_of_drawn_requests_are_short_capitals():
    for item in requests.drawn_requests("heldout", 40, 0):
        assert item.rendered == item.rendered.upper() != item.plain
        assert item.prompt in GRAMMAR["carriers"]["heldout"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: requests.request_pairs("tests", 1, 0), "expected a split of"),
        (lambda: requests.request_pairs("train", 1, 0, only="privacy"), "expected a category of"),
        (lambda: requests.request_pairs("validation", 10**6, 0), "the grammar gave only"),
    ],
)
def test_impossible_draws_are_refused(call, message):
    with pytest.raises(DataError, match=message):
        call()
