"""The verbs of jobs.evaluate that read files: what they ask for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("compare", "RUN_A, RUN_B"),
        ("versus", "RUN, DEFENCE, OTHER"),
        ("agreement", "LABELS"),
        ("benchmarks", "FOLDER"),
    ],
)
def test_a_verb_says_what_is_missing(repository: Path, verb: str, words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.evaluate", verb],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert f"the following arguments are required: {words}\n" in done.stderr
