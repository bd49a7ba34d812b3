"""Whether an answer to a benchmark's question is right, without a judge."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from spo.records import Prompt

_OPTION = re.compile(r"^([A-H])\. (.+)$", re.MULTILINE)
_LETTER = re.compile(
    r"^\(?([A-H])(?:[).:,]|$)|\b(?:answer(?: is)?|option):?\s*\(?((?-i:[A-H]))\b", re.IGNORECASE
)


def check_choice(prompt: Prompt, answer: str) -> dict[str, float]:
    """Multiple choice, as MMBench's exact matching before it asks a judge (arXiv 2307.06281, 4.2).

    An answer names an option by its letter ("B", "(b)", "the answer is B") or by its words, if no
    other option's words are in it.

    Returns:
        "correct" (1 or 0), and "answered": 0 where no one option is named, which is not correct.
    """
    options = dict(_OPTION.findall(prompt.text))
    named = _LETTER.search(answer.strip())
    letter = (named[1] or named[2]).upper() if named else ""
    if letter in options:
        chosen: str | None = letter
    else:
        within = [key for key, words in options.items() if _plain(words) in _plain(answer)]
        chosen = within[0] if len(within) == 1 else None
    return {
        "correct": float(chosen == prompt.reference),
        "answered": float(chosen is not None),
    }


def check_contained(prompt: Prompt, answer: str) -> dict[str, float]:
    """Does the answer contain the reference? MM-Vet's own score asks GPT-4 (arXiv 2308.02490, 3.2).

    "<AND>" joins parts that must all be there, "<OR>" alternatives, as in MM-Vet's file. Words are
    compared without case and punctuation.

    Returns:
        "contained", 1 or 0: a lower bound on what a judge would accept.
    """
    said = _plain(answer)
    alternatives = (prompt.reference or "").split("<OR>")
    found = any(all(_plain(part) in said for part in one.split("<AND>")) for one in alternatives)
    return {"contained": float(found)}


def _plain(text: str) -> str:
    """Lower case, single spaces, a space at both ends: whole words are compared."""
    words = re.findall(r"[^\W_]+", text.lower())
    return f" {' '.join(words)} "


CHECKS: Mapping[str, Callable[[Prompt, str], dict[str, float]]] = {
    "mmbench": check_choice,
    "mmvet": check_contained,
}
"""By format of the data set."""
