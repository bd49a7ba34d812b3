"""The report: whole and partial runs, odd text, and figures that are those of the evaluation."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from spo.errors import DataError, StageError
from spo.evaluation import load_report, save_report, shown_conditions
from spo.records import EvaluatedAnswer, EvaluationCell, EvaluationReport, Interval
from spo.report import write_report
from spo.report.answers import VEIL_FROM, attack_pictures, card_groups, open_picture
from spo.report.headline import findings, machine_readable, stage1_difference, tables, tiles
from spo.report.matrix import success_points
from spo.report.metrics import Metric, Verdict, defences_of, metric_named
from spo.report.run_record import read_run
from tests.example_run import CHOSEN, ODD_TEXT, write_example_run

FILES = [
    "config.yaml",
    "separability.json",
    "history.jsonl",
    "evaluation.json",
    "attack.json",
    "environment.json",
]


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.scripts = 0
        self.text = ""
        self._hidden = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self._hidden = tag in ("script", "style")
        named = dict(attrs)
        self.addresses += [str(named[n]) for n in ("src", "srcset", "href", "action") if n in named]

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_example_run(tmp_path_factory.mktemp("runs") / "example")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return (run / "report.html").read_text()


def copy(run: Path, target: Path) -> Path:
    return shutil.copytree(run, target, ignore=shutil.ignore_patterns("report.*", "plots"))


def example(condition: str, defence: str, toxicity: float, **more: float) -> EvaluatedAnswer:
    return EvaluatedAnswer(
        condition=condition,
        defence=defence,
        prompt_id="p",
        sample=0,
        prompt="You are",
        image=None,
        answer="so kind",
        measures={"toxicity": toxicity, **more},
        receipt_sha256="",
    )


def interval(mean: float, low: float, high: float) -> Interval:
    return Interval(mean=mean, low=low, high=high, count=9)


# The files


def test_page_is_self_contained(html: str) -> None:
    page = Page(html)
    outside = [a for a in page.addresses if not a.startswith(("data:", "#"))]
    assert outside == []
    assert not re.search(r"url\((?!data:)|@import|https?://", html)
    assert "default-src 'none'" in html


def test_every_plot_is_a_picture_and_in_the_page(run: Path, html: str) -> None:
    names = {path.stem for path in (run / "plots").iterdir()}
    assert names == {
        *("toxicity", "front", "training", "doses", "separability", "attack"),
        *("matrix", "cost", "strength"),
    }
    for path in (run / "plots").iterdir():
        image = Image.open(path)
        assert image.size[0] > 800
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20
        assert base64.b64encode(path.read_bytes()).decode() in html


def test_figures_of_the_page_are_those_of_the_evaluation(run: Path, html: str) -> None:
    text = Page(html).text
    report = shown_conditions(load_report(run / "evaluation.json"))
    for cell in report.cells:
        for name, value in cell.metrics.items():
            metric = metric_named(name)
            assert metric.figure(value.mean) in text
            assert metric.range(value) in text
        for name, change in cell.paired.items():
            assert metric_named(name).change(change.mean) in text


def test_a_curve_belongs_to_its_attack_and_its_defence(run: Path, tmp_path: Path) -> None:
    folder = copy(run, tmp_path / "named")
    report = load_report(folder / "evaluation.json")
    old, new = "curve adaptive-pgd-32 stage1 ", "curve adaptive-pgd-32 my vector "
    cells = [
        replace(cell, condition=cell.condition.replace(old, new), defence="my vector")
        if cell.condition.startswith(old)
        else cell
        for cell in report.cells
    ]
    attacks = {name.replace(old, new): made for name, made in report.attacks.items()}
    before = success_points(read_run(folder))
    save_report(replace(report, cells=tuple(cells), attacks=attacks), folder / "evaluation.json")
    points = success_points(read_run(folder))
    assert points.keys() == {("pgd-32", "none"), ("adaptive-pgd-32", "my vector")}
    assert points["adaptive-pgd-32", "my vector"] == before["adaptive-pgd-32", "stage1"]
    assert list(points["pgd-32", "none"]) == [0, 8, 16, 24, 32, 40]


def test_machine_readable_headline(run: Path) -> None:
    summary = json.loads((run / "report.json").read_text())
    report = shown_conditions(load_report(run / "evaluation.json"))
    assert summary["layers"] == list(CHOSEN)
    assert summary["missing"] == {}
    assert summary["quarantined"] == 2
    assert summary["training"]["steps"] == 20
    assert summary["training"]["dropped"] == {"empty answer": 4}
    assert len(summary["evaluation"]["cells"]) == len(report.cells)
    against = summary["evaluation"]["difference_to_stage1"]["plain"]["toxicity"]
    assert against["high"] < 0
    assert summary["plots"] == sorted(summary["plots"], key=summary["plots"].index)


def test_writing_again_replaces(run: Path, tmp_path: Path) -> None:
    folder = copy(run, tmp_path / "again")
    write_report(folder)
    (folder / "report.html").write_text("old")
    assert write_report(folder).read_text().startswith("<!doctype html>")
    assert not list(folder.glob("*.part"))


# Odd text


def test_odd_text_is_shown_and_never_runs(html: str) -> None:
    page = Page(html)
    assert page.scripts == 1
    assert "<script>alert('x')</script> & \"quotes\" $\\frac{1}{0}$" in page.text
    assert "{{ 7*7 }}" in page.text
    assert "\x00" not in html


@pytest.mark.parametrize(
    "text",
    [
        "\ud800 lone surrogate",
        "",
        "   \n\n ",
        "x" * 20_000,
        "</textarea></style><img src=x onerror=alert(1)>",
        "e\u0301" * 300 + "\u202e\u2066",
        "&lt;already escaped&gt;",
        '" onmouseover="alert(1)',
    ],
    ids=["surrogate", "empty", "blank", "long", "markup", "combining", "escaped", "attribute"],
)
def test_any_text_anywhere(tmp_path: Path, text: str) -> None:
    answers = tuple(
        EvaluatedAnswer(
            condition=f"c{text}",
            defence=defence,
            prompt_id=text,
            sample=0,
            prompt=text,
            image=text or None,
            answer=text,
            measures={"toxicity": 0.2, "nll": 2.0, text: 1.0},
            receipt_sha256="",
        )
        for defence in ("none", text or "other")
    )
    metrics = {
        "toxicity": interval(0.2, 0.1, 0.3),
        "nll": interval(2, 1, 3),
        text: interval(1, 1, 1),
    }
    cells = tuple(
        EvaluationCell(condition=a.condition, defence=a.defence, metrics=metrics, paired=metrics)
        for a in answers
    )
    save_report(
        EvaluationReport(cells=cells, answers=answers, judge=text), tmp_path / "evaluation.json"
    )
    (tmp_path / "config.yaml").write_text(json.dumps({"name": text}))
    quarantine = {text: [{"row_id": text, "reason": text}]}
    (tmp_path / "quarantine.json").write_text(json.dumps(quarantine))
    step = {"step": 0, "reward": 1.0, "reward_parts": {text: 1.0}, "dropped": {text: 1}}
    (tmp_path / "history.jsonl").write_text(json.dumps(step))
    curve = {"auc": [0.5]}
    separability = {"layers": [0], "sources": {text: curve}, "combined": curve, "chosen": [0]}
    (tmp_path / "separability.json").write_text(
        json.dumps({**separability, "cosines": {text: [0]}})
    )
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert page.scripts == 1
    assert all(a.startswith(("data:", "#")) for a in page.addresses)
    json.loads((tmp_path / "report.json").read_text())


# Partial and damaged runs


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_told_and_the_rest_is_there(run: Path, tmp_path: Path, name: str) -> None:
    folder = copy(run, tmp_path / "partial")
    (folder / name).unlink()
    text = Page(write_report(folder).read_text()).text
    assert f"{name} is not there" in text
    assert set(json.loads((folder / "report.json").read_text())["missing"]) == {name}


@pytest.mark.parametrize("name", [f for f in FILES if f != "config.yaml"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b'{"layers": 3, "losses": "x", "cells": 1}'],
)
def test_damaged_file_is_told(run: Path, tmp_path: Path, name: str, content: bytes) -> None:
    folder = copy(run, tmp_path / "damaged")
    (folder / name).write_bytes(content)
    facts = name == "environment.json" and content.startswith(b'{"layers"')
    assert set(read_run(folder).missing) == (set() if facts else {name})


def test_report_of_damaged_files_only(tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name).write_bytes(b"{")
    text = Page(write_report(tmp_path).read_text()).text
    assert text.count("is damaged") >= len(FILES) - 2


def test_empty_folder_says_what_to_run(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path).read_text())
    for name in FILES:
        assert f"{name} is not there" in page.text
    assert "jobs.evaluate writes it" in page.text
    assert tmp_path.name in page.text


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected the output folder of a run"):
        write_report(tmp_path / "none")


def test_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "plots").write_text("a file where the folder belongs")
    with pytest.raises(StageError, match="cannot write the report"):
        write_report(tmp_path)


def test_history_of_an_interrupted_run(tmp_path: Path) -> None:
    """A step that was run again counts as its last run; a half-written line is counted."""
    lines = [{"step": 0, "reward": 1.0}, {"step": 1, "reward": 2.0}, {"step": 1, "reward": 3.0}]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"step": 2, "rew'
    (tmp_path / "history.jsonl").write_text(text)
    record = read_run(tmp_path)
    assert [(row.step, row.reward) for row in record.history] == [(0, 1.0), (1, 3.0)]
    assert "1 line(s)" in record.missing["history.jsonl"]


def test_not_a_number_is_a_gap(run: Path, tmp_path: Path) -> None:
    folder = copy(run, tmp_path / "gaps")
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    rows[3].update(reward=None, kl=float("nan"), doses=[])
    rows[4].update(reward=float("inf"), reward_parts={})
    (folder / "history.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    write_report(folder)
    assert (folder / "plots" / "training.png").is_file()


def test_unequal_curves_are_refused(run: Path, tmp_path: Path) -> None:
    folder = copy(run, tmp_path / "unequal")
    content = json.loads((folder / "separability.json").read_text())
    content["combined"]["auc"].pop()
    (folder / "separability.json").write_text(json.dumps(content))
    assert "must have 30 values" in read_run(folder).missing["separability.json"]


# The result in words


@pytest.mark.parametrize(
    ("better", "change", "expected"),
    [
        (-1, (-0.2, -0.3, -0.1), Verdict.BETTER),
        (-1, (0.2, 0.1, 0.3), Verdict.WORSE),
        (1, (0.2, 0.1, 0.3), Verdict.BETTER),
        (1, (-0.2, -0.3, -0.1), Verdict.WORSE),
        (-1, (-0.2, -0.4, 0.0), Verdict.EVEN),
        (1, (0.0, 0.0, 0.0), Verdict.EVEN),
        (0, (0.2, 0.1, 0.3), Verdict.CHANGED),
    ],
)
def test_verdicts(better: int, change: tuple[float, float, float], expected: Verdict) -> None:
    metric = Metric(name="m", label="m", better=better)
    assert metric.verdict(interval(*change)) is expected


def test_numbers_as_text() -> None:
    rate, score = metric_named("toxic"), metric_named("toxicity")
    assert (rate.figure(0.1234), score.figure(0.1234)) == ("12.3 %", "0.123")
    assert (rate.change(-0.02), score.change(0.5)) == ("−2.0 points", "+0.500")
    assert (rate.change(-0.0001), score.change(-1e-9)) == ("+0.0 points", "+0.000")
    assert score.change_range(interval(0, -0.25, 0.5)) == "−0.250 to +0.500"


def test_words_say_what_the_intervals_say() -> None:
    def cell(defence: str, mean: float, change: Interval | None) -> EvaluationCell:
        return EvaluationCell(
            condition="plain",
            defence=defence,
            metrics={"toxicity": interval(mean, mean - 0.05, mean + 0.05)},
            paired={} if change is None else {"toxicity": change},
        )

    report = EvaluationReport(
        cells=(
            cell("spo", 0.1, interval(-0.2, -0.3, -0.1)),
            cell("none", 0.3, None),
            cell("stage1", 0.2, interval(-0.1, -0.3, 0.1)),
        ),
        answers=(example("plain", "stage1", 0.2), example("plain", "spo", 0.1)),
        judge="j",
    )
    assert defences_of(report) == ["none", "stage1", "spo"]
    (found,) = findings(report)
    assert found.lead == "Text prompts (9 prompts)"
    assert found.rest == (
        "mean toxicity 0.300 (0.250 to 0.350) unsteered, 0.100 (0.050 to 0.150) with SPO; paired "
        "difference −0.200 (−0.300 to −0.100): better. Against Stage I alone −0.100 "
        "(−0.100 to −0.100): better."
    )
    (tile,) = tiles(report)
    assert (tile.before, tile.after, tile.verdict) == ("0.300", "0.100", Verdict.BETTER)
    (table,) = tables(report)
    verdicts = [entries[0].verdict_text for _, entries in table.rows if entries[0]]
    assert verdicts == ["", "no clear change", "better"]


def test_only_the_unsteered_model() -> None:
    report = EvaluationReport(cells=(), answers=(example("plain", "none", 0.1),), judge="j")
    assert "nothing to compare" in findings(report)[0].rest
    assert tiles(report) == []
    assert stage1_difference(report, "plain", "toxicity") is None
    assert machine_readable(report)["final_defence"] is None


# Sample answers and pictures


def test_choice_of_answers_is_the_stated_rule(run: Path) -> None:
    report = shown_conditions(load_report(run / "evaluation.json"))
    groups = card_groups(report, run)
    titles = [group.title for group in groups]
    assert titles == [
        "Text prompts",
        "With a clean picture",
        "Under the picture attack",
        "Captions",
        "Questions about pictures",
        "Harmless text",
        "Most toxic answers with SPO",
    ]
    assert [len(group.cards) for group in groups] == [3] * 7
    first = [a for a in report.answers if a.sample == 0 and a.defence == "spo"]
    judged = [a.measures["toxicity"] for a in first if "toxicity" in a.measures]
    worst = sorted(judged, reverse=True)[:3]
    assert [card.answers[-1].toxicity for card in groups[-1].cards] == worst
    assert groups[0].cards[0].answers[0].text == ODD_TEXT.strip()


def test_toxic_and_unjudged_text_is_veiled(run: Path) -> None:
    report = shown_conditions(load_report(run / "evaluation.json"))
    shown = [a for g in card_groups(report, run) for c in g.cards for a in c.answers]
    assert {a.veiled for a in shown} == {True, False}
    assert all(a.veiled == (a.toxicity is None or a.toxicity >= VEIL_FROM) for a in shown)
    unjudged = example("plain", "none", 0.0)
    unjudged = EvaluatedAnswer(
        **{n: getattr(unjudged, n) for n in unjudged.__slots__ if n != "measures"}, measures={}
    )
    cell = EvaluationCell(condition="plain", defence="none", metrics={}, paired={})
    report = EvaluationReport(cells=(cell,), answers=(unjudged,), judge="j")
    assert card_groups(report, run)[0].cards[0].answers[0].veiled


def decoded(address: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))


def test_pictures_are_inside_and_exact(run: Path) -> None:
    pictures = attack_pictures(str(run / "clean.png"), "attack/pgd-32.png", run)
    assert pictures is not None
    assert pictures.largest == 32
    assert decoded(pictures.clean).tobytes() == Image.open(run / "clean.png").tobytes()
    low, high = zip(*decoded(pictures.difference).getextrema(), strict=True)
    assert min(low) == 1
    assert max(high) == 255


def test_pictures_of_different_sizes(run: Path, tmp_path: Path) -> None:
    Image.new("RGB", (600, 300), "white").save(tmp_path / "large.png")
    pictures = attack_pictures(str(tmp_path / "large.png"), "attack/pgd-32.png", run)
    assert pictures is not None
    assert (pictures.difference, pictures.largest) == ("", None)
    assert decoded(pictures.clean).size == (112, 112)


def test_unreadable_pictures_are_told(run: Path, tmp_path: Path) -> None:
    folder = copy(run, tmp_path / "lost")
    (folder / "attack" / "pgd-32.png").write_bytes(b"not a picture")
    text = Page(write_report(folder).read_text()).text
    assert "The picture pgd-32.png is no longer there or cannot be read." in text
    assert "The clean or the attacked picture is no longer there" in text
    assert open_picture("\x00", folder) is None
    assert open_picture("attack", folder) is None
