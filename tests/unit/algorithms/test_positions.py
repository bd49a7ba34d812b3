"""Position selectors on a hand-made sequence, and exactness under any cutting of the sequence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spo.algorithms.positions import image_spans, select_positions
from spo.records import Positions

IMAGE = 99
# position:  0  1  2      3      4  5      6  7 | 8  9  10 (generated)
TOKENS = [1, 5, IMAGE, IMAGE, 6, IMAGE, 7, 8]
PROMPT_LENGTH = 8
SPANS = ((2, 2), (5, 1))
EXPECTED = {
    Positions.ALL: range(11),
    Positions.PROMPT: range(8),
    Positions.GENERATED: [7, 8, 9, 10],
    Positions.LAST_PROMPT: [7],
    Positions.IMAGE: [2, 3, 5],
    Positions.TEXT: [0, 1, 4, 6, 7, 8, 9, 10],
    Positions.AFTER_IMAGE: [6, 7, 8, 9, 10],
}


def chosen(positions: Positions, index: list[int], spans: tuple[tuple[int, int], ...]) -> list[int]:
    array = np.array(index, dtype=np.int64)
    mask = select_positions(positions, array, prompt_length=PROMPT_LENGTH, image_spans=spans)
    assert mask.dtype == np.bool_
    return [int(i) for i in array[mask]]


@pytest.mark.parametrize("positions", list(Positions))
def test_by_hand(positions: Positions) -> None:
    assert chosen(positions, list(range(11)), SPANS) == list(EXPECTED[positions])


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (Positions.IMAGE, []),
        (Positions.TEXT, list(range(11))),
        (Positions.AFTER_IMAGE, list(range(11))),
    ],
)
def test_without_picture(positions: Positions, expected: list[int]) -> None:
    assert chosen(positions, list(range(11)), ()) == expected


@given(
    positions=st.sampled_from(list(Positions)),
    cuts=st.sets(st.integers(1, 40)),
    prompt_length=st.integers(1, 30),
    spans=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 6)), max_size=3),
)
def test_any_cutting_equals_the_whole(
    positions: Positions, cuts: set[int], prompt_length: int, spans: list[tuple[int, int]]
) -> None:
    """Chunked prefill and one-token decoding select exactly what one pass selects."""
    index = np.arange(41, dtype=np.int64)
    whole = select_positions(positions, index, prompt_length=prompt_length, image_spans=spans)
    parts = [
        select_positions(positions, part, prompt_length=prompt_length, image_spans=spans)
        for part in np.split(index, sorted(cuts))
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@given(st.permutations(range(20)), st.sampled_from(list(Positions)))
def test_order_does_not_matter(order: list[int], positions: Positions) -> None:
    """A batch of rows from several steps is not sorted by position."""
    index = np.arange(20, dtype=np.int64)
    whole = select_positions(positions, index, prompt_length=9, image_spans=SPANS)
    shuffled = select_positions(positions, index[order], prompt_length=9, image_spans=SPANS)
    np.testing.assert_array_equal(shuffled, whole[order])


@pytest.mark.parametrize("positions", list(Positions))
def test_input_is_not_changed(positions: Positions) -> None:
    index = np.arange(5, dtype=np.int64)
    mask = select_positions(positions, index, prompt_length=3, image_spans=SPANS)
    mask[:] = False
    np.testing.assert_array_equal(index, np.arange(5))


def test_text_and_image_share_nothing_and_cover_all() -> None:
    index = list(range(11))
    image, text = chosen(Positions.IMAGE, index, SPANS), chosen(Positions.TEXT, index, SPANS)
    assert sorted(image + text) == index


def test_spans_of_tokens() -> None:
    assert image_spans(TOKENS, IMAGE) == SPANS


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([], ()), ([IMAGE], ((0, 1),)), ([1, IMAGE, IMAGE], ((1, 2),)), ([1, 2], ())],
)
def test_spans_at_the_edges(tokens: list[int], expected: tuple[tuple[int, int], ...]) -> None:
    assert image_spans(tokens, IMAGE) == expected


def test_text_only_model_has_no_spans() -> None:
    assert image_spans(TOKENS, None) == ()


@given(st.lists(st.sampled_from([1, 2, IMAGE]), max_size=30))
def test_spans_rebuild_the_image_tokens(tokens: list[int]) -> None:
    covered = [
        p for start, length in image_spans(tokens, IMAGE) for p in range(start, start + length)
    ]
    assert covered == [p for p, token in enumerate(tokens) if token == IMAGE]
