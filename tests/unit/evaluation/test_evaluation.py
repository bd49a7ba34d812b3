"""The evaluation on scripted engines with hand-computed figures, and on the fake model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from spo.config import EvaluateConfig
from spo.engines.base import GenerateRequest, LogprobRequest, receipt_for
from spo.engines.fake import FakeEngine
from spo.errors import ConfigError, DataError, EngineError, ScorerError, SteeringError
from spo.evaluation import compare, evaluate, format_table, load_report, save_report
from spo.evaluation.defences import UNDEFENDED, Defence
from spo.records import (
    EvaluationCell,
    EvaluationReport,
    FinishReason,
    Prompt,
    PromptKind,
    PromptSet,
    Rollout,
    SteeringSpec,
)
from spo.vector import SteeringVector
from tests.receipts import WRONG

SPEC = SteeringSpec(vector="spo", version=3, coefficient=0.5)
CONFIG = EvaluateConfig(bootstrap=200)
VECTOR = SteeringVector(
    layers=(0, 2),
    directions=torch.ones(2, 8),
    mean_norms=torch.ones(2),
    calibration=torch.zeros(2, 8),
    model_id="fake",
)


class ScriptedEngine:
    """Answers from a table (prompt id, steered?, sample); token log-probability by token id."""

    def __init__(self, answers: Mapping[tuple[str, bool, int], str]) -> None:
        self.answers = answers
        self.requests: list[GenerateRequest] = []
        self.scored: list[LogprobRequest] = []
        self.change_receipt: Callable[[Any], Any] = lambda receipt: receipt
        self.refused: set[str] = set()

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Rollout]:
        refused = sorted({r.prompt.prompt_id for r in requests} & self.refused)
        if refused:
            raise DataError(f"prompt {refused[0]} is too long")
        self.requests += requests
        return [self._one(request) for request in requests]

    def _one(self, request: GenerateRequest) -> Rollout:
        sample = int(request.request_id.rsplit("/", 1)[1])
        key = (request.prompt.prompt_id, request.steering is not None, sample)
        words = self.answers[key].split()
        receipt = receipt_for(request.steering, VECTOR) if request.steering else None
        return Rollout(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=(1,),
            token_ids=tuple(len(word) for word in words),
            text=" ".join(words),
            logprob=-1.0,
            finish=FinishReason.STOP,
            receipt=self.change_receipt(receipt),
        )

    def logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float]]:
        self.scored += requests
        return [[-0.5 * token for token in request.token_ids] for request in requests]


class WordJudge:
    """Toxicity = the answer's first word, if that is a number."""

    name = "words"

    def score(self, texts: Sequence[str]) -> list[float]:
        return [float(text.split()[0]) if text else 0.0 for text in texts]


class WidthScorer:
    """Alignment = picture width + number of words."""

    def score(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        return [image.width + len(text.split()) for image, text in zip(images, texts, strict=True)]


def _prompt(prompt_id: str, **fields: Any) -> Prompt:
    return Prompt(**{"prompt_id": prompt_id, "text": prompt_id, "kind": PromptKind.HARM, **fields})


def columns(*names: str, spec: SteeringSpec = SPEC, sha256: str = VECTOR.sha256) -> list[Defence]:
    """Defences by name; all but the unsteered model steer with the same vector."""
    return [
        UNDEFENDED if name == "none" else Defence(name=name, spec=spec, sha256=sha256)
        for name in names
    ]


def _evaluate(engine: Any, sets: Sequence[PromptSet], **changes: Any) -> EvaluationReport:
    options: dict[str, Any] = {
        "defences": columns("none", "spo"),
        "judge": WordJudge(),
        "alignment": None,
        "checks": {},
        "config": CONFIG,
        **changes,
    }
    return evaluate(engine, options.pop("defences"), sets, **options)


def _cell(report: EvaluationReport, condition: str, defence: str) -> EvaluationCell:
    [cell] = [c for c in report.cells if (c.condition, c.defence) == (condition, defence)]
    return cell


@pytest.fixture
def engine() -> ScriptedEngine:
    """Two prompts, two samples each."""
    return ScriptedEngine(
        {
            ("a", False, 0): "0.9 vile",
            ("a", False, 1): "0.5 vile thing",
            ("b", False, 0): "0.1 calm",
            ("b", False, 1): "0.3 fair",
            ("a", True, 0): "0.2 warm",
            ("a", True, 1): "0.4 warm",
            ("b", True, 0): "0.0 kind",
            ("b", True, 1): "0.2 kind",
        }
    )


PLAIN = PromptSet(condition="plain", prompts=(_prompt("a"), _prompt("b")), samples=2)


def test_cells_by_hand(engine: ScriptedEngine) -> None:
    report = _evaluate(engine, [PLAIN])
    none, spo = _cell(report, "plain", "none"), _cell(report, "plain", "spo")
    # a: .9, .5 -> .7; b: .1, .3 -> .2.   Steered a: .3, b: .1.
    assert none.metrics["toxicity"].mean == pytest.approx(0.45)
    assert spo.metrics["toxicity"].mean == pytest.approx(0.20)
    assert none.metrics["toxicity"].count == 2
    # 0.5 itself counts as toxic: a 2 of 2, b 0 of 2.
    assert none.metrics["toxic"].mean == 0.5
    assert spo.metrics["toxic"].mean == 0.0
    # Differences: a -.4, b -.1.
    change = spo.paired["toxicity"]
    assert change.mean == pytest.approx(-0.25)
    assert (change.low, change.high) == (pytest.approx(-0.4), pytest.approx(-0.1))
    assert not none.paired
    # Tokens are word lengths, NLL is half a token: "0.9 vile" (3 + 4)/2/2 = 1.75,
    # "0.5 vile thing" (3 + 4 + 5)/2/3 = 2, so a 1.875; "0.1 calm", "0.3 fair" 1.75.
    assert none.metrics["nll"].mean == pytest.approx((1.875 + 1.75) / 2)
    assert none.metrics["length"].mean == pytest.approx((2.5 + 2.0) / 2)
    assert none.metrics["refusal"].mean == 0.0
    assert "alignment" not in none.metrics
    assert report.judge == "words"
    assert len(report.answers) == 8


def test_nll_is_taken_under_the_unsteered_model(engine: ScriptedEngine) -> None:
    _evaluate(engine, [PLAIN])
    assert len(engine.scored) == 8
    assert all(request.steering is None for request in engine.scored)


def test_answers_name_prompt_sample_and_vector(engine: ScriptedEngine) -> None:
    report = _evaluate(engine, [PLAIN])
    steered = [a for a in report.answers if a.defence == "spo"]
    assert [(a.prompt_id, a.sample) for a in steered] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert {a.receipt_sha256 for a in steered} == {VECTOR.sha256}
    assert {a.receipt_sha256 for a in report.answers if a.defence == "none"} == {""}


def test_defences_share_seeds_and_samples_do_not(engine: ScriptedEngine) -> None:
    _evaluate(engine, [PLAIN], seed=4)
    seeds: dict[str, list[int | None]] = {"none": [], "spo": []}
    for request in engine.requests:
        seeds[request.request_id.split("/")[1]].append(request.sampling.seed)
    assert seeds["none"] == seeds["spo"]
    assert len(set(seeds["none"])) == 4
    assert len({request.request_id for request in engine.requests}) == 8
    engine.requests.clear()
    _evaluate(engine, [PLAIN], seed=5)
    assert engine.requests[0].sampling.seed not in seeds["none"]


@pytest.mark.parametrize(
    "change",
    [
        *[lambda receipt, wrong=wrong: receipt and wrong(receipt) for wrong in WRONG.values()],
        lambda receipt: receipt or receipt_for(SPEC, VECTOR),
    ],
    ids=[*WRONG, "steered unasked"],
)
def test_steering_that_is_not_confirmed_stops_the_evaluation(
    engine: ScriptedEngine, change: Callable[[Any], Any]
) -> None:
    engine.change_receipt = change
    with pytest.raises(SteeringError, match="plain/"):
        _evaluate(engine, [PLAIN])


def test_bad_pictures_are_quarantined_under_every_defence(
    engine: ScriptedEngine, tmp_path: Path
) -> None:
    good, torn = tmp_path / "good.png", tmp_path / "torn.png"
    Image.new("RGB", (8, 8)).save(good)
    torn.write_bytes(good.read_bytes()[:40])
    prompts = (_prompt("a", image=str(good)), _prompt("b", image=str(torn)))
    report = _evaluate(engine, [PromptSet(condition="image", prompts=prompts, samples=2)])
    [row] = report.quarantined
    assert row.row_id == "image/b"
    assert "torn.png" in row.reason
    for defence, mean in (("none", 0.7), ("spo", 0.3)):
        toxicity = _cell(report, "image", defence).metrics["toxicity"]
        assert (toxicity.mean, toxicity.count) == (pytest.approx(mean), 1)


def test_rows_that_the_engine_refuses_are_found_and_quarantined(engine: ScriptedEngine) -> None:
    engine.answers = {**engine.answers, **{("c", s, n): "0.6" for s in (0, 1) for n in (0, 1)}}
    engine.refused = {"b"}
    prompts = tuple(_prompt(i) for i in "abc")
    report = _evaluate(engine, [PromptSet(condition="plain", prompts=prompts, samples=2)])
    assert [(row.row_id, row.reason) for row in report.quarantined] == [
        ("plain/b", "prompt b is too long")
    ]
    assert _cell(report, "plain", "none").metrics["toxicity"].mean == pytest.approx(0.65)
    assert _cell(report, "plain", "none").metrics["toxicity"].count == 2


def test_nothing_measured_is_an_error(engine: ScriptedEngine) -> None:
    engine.refused = {"a", "b"}
    with pytest.raises(DataError, match=r"2 rows are quarantined.*prompt a is too long"):
        _evaluate(engine, [PLAIN])
    with pytest.raises(DataError, match="there were no prompts"):
        _evaluate(engine, [PromptSet(condition="plain", prompts=())])


@pytest.mark.parametrize("nonsense", [math.nan, 1.5, -0.1, None, "toxic"])
def test_a_judge_that_answers_nonsense_is_counted_out(
    engine: ScriptedEngine, nonsense: Any
) -> None:
    class OddJudge(WordJudge):
        def score(self, texts: Sequence[str]) -> list[Any]:
            scores: list[Any] = super().score(texts)
            scores[texts.index("0.9 vile")] = nonsense
            return scores

    report = _evaluate(engine, [PLAIN], judge=OddJudge(), defences=[UNDEFENDED])
    # a keeps its second sample, .5; b is .2.
    assert _cell(report, "plain", "none").metrics["toxicity"].mean == pytest.approx(0.35)
    [row] = report.quarantined
    assert row.row_id == "plain/none/a/0"
    assert repr(nonsense) in row.reason
    [answer] = [a for a in report.answers if a.answer == "0.9 vile"]
    assert not {"toxicity", "toxic"} & answer.measures.keys()
    assert "nll" in answer.measures


def test_a_judge_with_the_wrong_number_of_scores_stops(engine: ScriptedEngine) -> None:
    class ShortJudge(WordJudge):
        def score(self, texts: Sequence[str]) -> list[float]:
            return super().score(texts)[1:]

    with pytest.raises(ScorerError, match="judge words: expected 4 scores, got 3"):
        _evaluate(engine, [PLAIN], judge=ShortJudge())


def test_an_empty_answer_has_no_nll() -> None:
    engine = ScriptedEngine({("a", False, 0): "", ("b", False, 0): "0.4 x"})
    report = _evaluate(engine, [replace(PLAIN, samples=1)], defences=[UNDEFENDED])
    cell = _cell(report, "plain", "none")
    assert (cell.metrics["nll"].mean, cell.metrics["nll"].count) == (1.0, 1)
    assert (cell.metrics["length"].mean, cell.metrics["length"].count) == (1.0, 2)
    assert [request.prompt.prompt_id for request in engine.scored] == ["b"]


def test_missing_logprobs_stop(engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "logprobs", lambda requests: [[-1.0] for _ in requests])
    with pytest.raises(EngineError, match="each answer token"):
        _evaluate(engine, [PLAIN])


def test_alignment_is_scored_on_benign_prompts_with_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    Image.new("RGB", (30, 8)).save(path)
    prompts = (
        _prompt("benign", kind=PromptKind.BENIGN, image=str(path)),
        _prompt("harmful", image=str(path)),
        _prompt("text", kind=PromptKind.BENIGN),
    )
    engine = ScriptedEngine({(p.prompt_id, False, 0): "0.1 two" for p in prompts})
    options = {"defences": [UNDEFENDED], "alignment": WidthScorer()}
    caption = PromptSet(condition="caption", prompts=prompts)
    report = _evaluate(engine, [caption], **options)
    alignment = _cell(report, "caption", "none").metrics["alignment"]
    assert (alignment.mean, alignment.count) == (32.0, 1)
    off = _evaluate(engine, [replace(caption, alignment=False)], **options)
    assert "alignment" not in _cell(off, "caption", "none").metrics


def test_checks_apply_to_their_own_condition(engine: ScriptedEngine) -> None:
    def check(prompt: Prompt, answer: str) -> dict[str, float]:
        return {"kindness": float("kind" in answer)} if prompt.prompt_id == "b" else {}

    sets = [PLAIN, replace(PLAIN, condition="other")]
    report = _evaluate(engine, sets, checks={"plain": check})
    spo = _cell(report, "plain", "spo")
    assert (spo.metrics["kindness"].mean, spo.metrics["kindness"].count) == (1.0, 1)
    assert spo.paired["kindness"].mean == 1.0
    assert "kindness" not in _cell(report, "other", "spo").metrics
    with pytest.raises(DataError, match=r"plain/none/a/0.*\['odd'\]"):
        _evaluate(engine, [PLAIN], checks={"plain": lambda prompt, answer: {"odd": math.nan}})


def test_plans_that_make_no_sense_are_refused(engine: ScriptedEngine) -> None:
    with pytest.raises(ConfigError, match="'none' is the unsteered model"):
        _evaluate(engine, [PLAIN], defences=[Defence(name="none", spec=SPEC)])
    with pytest.raises(ConfigError, match="defences must have different names"):
        _evaluate(engine, [PLAIN], defences=columns("spo", "spo"))
    with pytest.raises(ConfigError, match="conditions must have different names"):
        _evaluate(engine, [PLAIN, PLAIN])
    with pytest.raises(DataError, match=r"unique.*\['a'\]"):
        _evaluate(engine, [replace(PLAIN, prompts=(_prompt("a"), _prompt("a")))])


def test_answers_out_of_order_are_refused(
    engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = engine.generate
    monkeypatch.setattr(engine, "generate", lambda requests: generate(requests)[::-1])
    with pytest.raises(EngineError, match="in order"):
        _evaluate(engine, [PLAIN])


def test_progress_counts_answers(engine: ScriptedEngine) -> None:
    seen: list[tuple[int, int, str]] = []
    _evaluate(engine, [PLAIN], progress=lambda *event: seen.append(event))
    assert seen == [(4, 8, "plain / none"), (8, 8, "plain / spo")]


def test_compare_pairs_any_two_defences(engine: ScriptedEngine) -> None:
    report = _evaluate(engine, [PLAIN], defences=columns("none", "stage1", "spo"))
    assert compare(report, "plain", "toxicity", defence="spo", baseline="none").mean == (
        pytest.approx(-0.25)
    )
    same = compare(report, "plain", "toxicity", defence="spo", baseline="stage1")
    assert (same.mean, same.low, same.high, same.count) == (0.0, 0.0, 0.0, 2)
    with pytest.raises(DataError, match="at least one unit"):
        compare(report, "pgd", "toxicity", defence="spo", baseline="none")


def test_reports_survive_json(engine: ScriptedEngine, tmp_path: Path) -> None:
    engine.refused = {"b"}
    report = _evaluate(engine, [PLAIN])
    path = save_report(report, tmp_path / "new" / "evaluation.json")
    assert load_report(path) == report
    assert [file.name for file in path.parent.iterdir()] == ["evaluation.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.update(format="other/1"),
        lambda content: content.pop("cells"),
        lambda content: content.update(surplus=1),
        lambda content: content["cells"][0]["metrics"]["toxicity"].pop("low"),
        lambda content: content["answers"][0].update(mood="bad"),
    ],
)
def test_damaged_reports_are_refused(
    engine: ScriptedEngine, tmp_path: Path, damage: Callable[[dict[str, Any]], Any]
) -> None:
    path = save_report(_evaluate(engine, [PLAIN]), tmp_path / "evaluation.json")
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"evaluation\.json: expected an evaluation report"):
        load_report(path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(DataError, match="JSONDecodeError"):
        load_report(path)
    with pytest.raises(DataError, match="FileNotFoundError"):
        load_report(tmp_path / "none.json")


def test_the_table_shows_means_intervals_and_marks_clear_differences(
    engine: ScriptedEngine,
) -> None:
    table = format_table(_evaluate(engine, [PLAIN]))
    [row] = [line for line in table.splitlines() if " toxicity " in line]
    assert "0.450 [0.200, 0.700]" in row
    assert "0.200 [0.100, 0.300]" in row
    # Both differences are negative, so the interval leaves out 0; lengths differ in one prompt.
    assert "-0.250 [-0.400, -0.100]*" in table
    assert "-0.250 [-0.500, +0.000] " in table
    assert "Judge: words. Quarantined rows: 0." in table
    assert max(map(len, table.splitlines())) <= 110


def test_steering_against_the_planted_direction_lowers_toxicity() -> None:
    engine = FakeEngine()
    vector = VECTOR.replace(
        layers=(1,),
        directions=engine.harm_direction[None],
        mean_norms=torch.ones(1),
        calibration=torch.zeros(1, 8),
    )
    spec = replace(SPEC, coefficient=3.0)
    engine.publish("spo", vector, SPEC.version)

    class RudeShare:
        name = "rude share"

        def score(self, texts: Sequence[str]) -> list[float]:
            rude = {"rude", "mean", "vile", "cruel"}
            return [sum(word in rude for word in t.split()) / len(t.split()) for t in texts]

    prompts = tuple(_prompt(f"p{i}") for i in range(12))
    sets = [PromptSet(condition="plain", prompts=prompts, samples=2)]
    defences = columns("none", "spo", spec=spec, sha256=vector.sha256)
    report = _evaluate(engine, sets, judge=RudeShare(), defences=defences)
    none, spo = (_cell(report, "plain", name).metrics for name in ("none", "spo"))
    # Rude words have logit 1 - 3 after steering, 1 before: shares e/(1 + e) and 1/(1 + e^2).
    assert none["toxicity"].mean == pytest.approx(1 / (1 + math.exp(-1)), abs=0.06)
    assert spo["toxicity"].mean == pytest.approx(1 / (1 + math.exp(2)), abs=0.06)
    assert _cell(report, "plain", "spo").paired["toxicity"].high < 0
    # Kind words are less likely under the unsteered model: steering costs likelihood, visibly.
    assert _cell(report, "plain", "spo").paired["nll"].low > 0
