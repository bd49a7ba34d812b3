"""The testbed's sentence grammars: seeded, distinct, paired, and disjoint between splits."""

import re

import pytest
import yaml

from spo.errors import DataError
from spo.testbed import text

FAMILIES = ("openings", "texts", "instructions", "typographic")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_pairs_are_distinct_and_complete(family, split):
    pairs = text.sentence_pairs(family, split, 60, seed=3)
    said = [sentence for pair in pairs for sentence in pair]
    assert len(set(said)) == 120
    assert not [sentence for sentence in said if re.search(r"[{}]|  ", sentence)]


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_share_no_sentence(family):
    train = text.sentence_pairs(family, "train", 60, seed=0)
    heldout = text.sentence_pairs(family, "heldout", 60, seed=0)
    assert not {s for pair in train for s in pair} & {s for pair in heldout for s in pair}


def test_splits_share_no_template_and_no_slot_value():
    grammars = text._grammars()
    for family, splits in grammars["pairs"].items():
        train = {side for pair in splits["train"] for side in pair}
        heldout = {side for pair in splits["heldout"] for side in pair}
        assert not train & heldout, family
    for slot, words in grammars["vocabulary"]["train"].items():
        assert not set(words) & set(grammars["vocabulary"]["heldout"][slot]), slot


def test_the_same_seed_gives_the_same_sentences_and_another_seed_does_not():
    first = text.rude_openings("train", 30, 5)
    assert text.rude_openings("train", 30, 5) == first
    assert text.rude_openings("train", 30, 6) != first
    assert text.rude_openings("train", 10, 5) == first[:10]


def test_twins_are_drawn_together():
    pairs = text.sentence_pairs("openings", "heldout", 20, 1)
    assert text.rude_openings("heldout", 20, 1) == [harmful for harmful, _ in pairs]
    assert text.neutral_openings("heldout", 20, 1) == [harmless for _, harmless in pairs]


def test_the_grammars_are_rich_enough_for_training():
    assert len(text.rude_openings("train", 4000, 0)) == 4000
    assert len(text.rude_openings("heldout", 2000, 0)) == 2000


def test_articles_follow_the_sound():
    joined = " ".join(text.neutral_openings("heldout", 500, 2)).lower()
    assert re.search(r"\ban honest\b", joined)
    assert not re.search(r"\ba (honest|apple|idiot|ugly)\b", joined)


def test_typographic_instructions_are_short_capitals_with_a_carrier():
    made = text.typographic_instructions("heldout", 40, 0)
    assert all(1 <= len(item.rendered.split()) <= 5 for item in made)
    assert all(item.rendered == item.rendered.upper() != item.plain for item in made)
    assert all(item.prompt.endswith((".", "?")) for item in made)


def test_too_many_or_unknown_raise():
    with pytest.raises(DataError, match="ask for fewer"):
        text.sentence_pairs("typographic", "train", 100_000, 0)
    with pytest.raises(DataError, match="expected a family"):
        text.rude_openings("test", 1, 0)
    with pytest.raises(DataError, match="expected a family"):
        text.typographic_instructions("test", 1, 0)


def test_the_grammar_file_is_plain_yaml_strings():
    grammars = text._grammars()
    words = [w for slots in grammars["vocabulary"].values() for ws in slots.values() for w in ws]
    assert all(isinstance(word, str) for word in words), yaml.__name__
