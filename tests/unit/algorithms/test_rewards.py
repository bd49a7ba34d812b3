"""Rules over the text of an answer: degeneration by hand, and what counts as a refusal."""

from __future__ import annotations

import pytest

from spo.algorithms.rewards import degeneration, is_refusal


def test_degeneration_by_hand() -> None:
    assert degeneration("") == 1.0
    assert degeneration("...") == 1.0
    assert degeneration("a plain sentence, nothing odd.") == 0.0
    # Six words make four triples of which two differ.
    assert degeneration("go on go on go on") == pytest.approx(0.5)
    assert degeneration("ab ####") == pytest.approx(4 / 7)


def test_refusals_are_recognised_at_the_beginning_only() -> None:
    assert is_refusal("I\u2019m sorry, I cannot help.")
    assert is_refusal("As an AI language model, I")
    assert not is_refusal("The red circle is at the top left.")
    assert not is_refusal("word " * 40 + "I'm sorry")
