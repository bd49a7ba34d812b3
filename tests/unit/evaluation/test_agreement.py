"""Agreement of judges with people, against hand-computed figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from spo.errors import DataError
from spo.evaluation.agreement import (
    agreement,
    has_refusals,
    judge_agreement,
    read_labelled,
    read_refusals,
    refusal_agreement,
)
from spo.scorers.judges import KeywordJudge

HEADER = "goal,target_response,human_majority,other_cf\n"


def test_figures_by_hand() -> None:
    # Verdicts against labels: 3 hits, 1 miss, 2 false alarms, 4 right rejections; one missing.
    verdicts = [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, "timed out"]
    labels = [True] * 4 + [False] * 6 + [True]
    found = agreement("judge", verdicts, labels)
    assert found.accuracy.mean == pytest.approx(7 / 10)
    assert found.accuracy.count == 10
    # chance = (5*4 + 5*6) / 100 = .5, kappa = (.7 - .5) / .5
    assert found.kappa.mean == pytest.approx(0.4)
    assert found.kappa.low < 0.4 < found.kappa.high
    assert found.false_alarm == pytest.approx(2 / 6)
    assert found.missed == pytest.approx(1 / 4)
    assert found.without_verdict == 1


def test_labels_are_read_with_published_verdicts(tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text(HEADER + "steal,I'm sorry,0,0\nsteal,Sure: take it,1,0\n")
    rows, others = read_labelled(file)
    assert [label for _, _, label in rows] == [False, True]
    assert others == {"other_cf": [0.0, 0.0]}
    found = judge_agreement(KeywordJudge(), rows)
    assert found.accuracy.mean == 1.0
    assert found.kappa.mean == 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("goal,human_majority\n", "target_response"),
        (HEADER + "a,b,maybe,0\n", "line 2: expected human_majority 0 or 1, got 'maybe'"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "labels.csv"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        read_labelled(file)


def test_one_sided_labels_have_no_agreement() -> None:
    with pytest.raises(DataError, match="both human labels"):
        agreement("judge", [1.0, 1.0], [True, True])


REFUSALS = "id,prompt,completion,final_label\n"


def test_refusals_of_a_folder_against_three_labels(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        REFUSALS + "1,q,I'm sorry,2_full_refusal\n2,q,Sure,1_full_compliance\n"
    )
    (tmp_path / "b.csv").write_text(
        REFUSALS + "1,q,I'm sorry. Still,3_partial_refusal\n2,q,Yes,1_full_compliance\n"
    )
    assert has_refusals(tmp_path)
    rows = read_refusals(tmp_path)
    assert [label for _, _, label in rows] == ["full", "none", "partial", "none"]
    found = refusal_agreement(KeywordJudge(), rows)
    assert found.accuracy.mean == pytest.approx(3 / 4)
    assert found.found == {"full": 1.0, "none": 1.0, "partial": 0.0}
    # chance = (2*1 + 2*2 + 0*1) / 16 = .375, kappa = (.75 - .375) / .625
    assert found.kappa.mean == pytest.approx(0.6)


def test_bad_refusal_labels_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text(REFUSALS + "1,q,a,7_perhaps\n")
    with pytest.raises(DataError, match=r"line 2: expected final_label .*perhaps"):
        read_refusals(file)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="folder with CSV files"):
        has_refusals(tmp_path / "empty")
