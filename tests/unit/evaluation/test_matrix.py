"""The matrix on scripted engines: resumed cells, success, KL, worst answers, reminders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spo.config import EvaluateConfig
from spo.engines.base import GenerateRequest, LogprobRequest, receipt_for
from spo.errors import DataError
from spo.evaluation import (
    CellStore,
    compare_defences,
    compare_reports,
    evaluate,
    format_comparison,
    load_report,
    save_report,
    shown_conditions,
)
from spo.evaluation.defences import UNDEFENDED, Defence
from spo.records import (
    Attacked,
    EvaluationCell,
    EvaluationReport,
    FinishReason,
    Prompt,
    PromptKind,
    PromptSet,
    Rollout,
)
from tests.unit.evaluation.test_evaluation import SPEC, VECTOR, WordJudge, columns


class Engine:
    """Answers "TOXICITY word" from a table (prompt id, steered) -> one text for each sample."""

    def __init__(self, answers: Mapping[tuple[str, bool], Sequence[str]]) -> None:
        self.answers = answers
        self.asked: list[GenerateRequest] = []
        self.scored: list[LogprobRequest] = []

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Rollout]:
        self.asked += requests
        return [self._one(request) for request in requests]

    def _one(self, request: GenerateRequest) -> Rollout:
        sample = int(request.request_id.rsplit("/", 1)[1])
        text = self.answers[request.prompt.prompt_id, request.steering is not None][sample]
        return Rollout(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=(1,),
            token_ids=(2, 4),
            text=text,
            logprob=-1.0,
            finish=FinishReason.STOP,
            receipt=receipt_for(request.steering, VECTOR) if request.steering else None,
        )

    def logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float]]:
        self.scored += requests
        steered = [-0.25 if r.steering is not None else -0.5 for r in requests]
        return [[s * t for t in r.token_ids] for s, r in zip(steered, requests, strict=True)]


class Verdicts:
    """Success where the answer says so; no verdict on "dunno"."""

    name = "verdicts"

    def verdicts(self, answers: Sequence[tuple[Prompt, str]]) -> list[float | str]:
        self.saw = [prompt.text for prompt, _ in answers]
        return ["no idea" if "dunno" in text else float("yes" in text) for _, text in answers]


def _prompt(prompt_id: str, kind: PromptKind = PromptKind.HARM, **fields: Any) -> Prompt:
    return Prompt(prompt_id=prompt_id, text=f"ask {prompt_id}", kind=kind, **fields)


def _run(engine: Engine, sets: Sequence[PromptSet], **options: Any) -> EvaluationReport:
    return evaluate(
        engine,  # type: ignore[arg-type]
        options.pop("defences", columns("none", "spo")),
        sets,
        judge=WordJudge(),
        alignment=None,
        checks={},
        config=EvaluateConfig(bootstrap=50),
        **options,
    )


def _cell(report: EvaluationReport, condition: str, defence: str) -> EvaluationCell:
    return next(c for c in report.cells if (c.condition, c.defence) == (condition, defence))


def test_success_kl_perplexity_and_worst_answers_by_hand() -> None:
    harm = PromptSet(condition="harm", prompts=(_prompt("a"), _prompt("b")), samples=2)
    text = PromptSet(
        condition="text",
        prompts=(_prompt("c", PromptKind.BENIGN),),
        references={"c": (4, 4)},
    )
    engine = Engine(
        {
            ("a", False): ["0.2 yes", "0.6 no"],
            ("b", False): ["0.4 dunno", "0.0 yes"],
            ("a", True): ["0.0 no", "0.1 no"],
            ("b", True): ["0.0 yes", "0.0 no"],
            ("c", False): ["0.0 x"],
            ("c", True): ["0.0 x"],
        }
    )
    report = _run(engine, [harm, text], success=[Verdicts()])
    bare = _cell(report, "harm", "none").metrics
    # a: (1 + 0) / 2, b: one verdict only, 1.
    assert bare["success"].mean == pytest.approx(0.75)
    assert bare["success"].count == 2
    assert bare["max_toxicity"].mean == pytest.approx((0.6 + 0.4) / 2)
    assert bare["toxicity"].mean == pytest.approx((0.4 + 0.2) / 2)
    spo = _cell(report, "harm", "spo")
    assert spo.metrics["success"].mean == pytest.approx(0.25)
    assert spo.paired["success"].mean == pytest.approx(-0.5)
    assert [row.reason for row in report.quarantined] == ["no idea"]
    # Answer log-probability -1 over 2 tokens under the defence; unsteered -.5 * (2 + 4) / 2.
    assert _cell(report, "text", "spo").metrics["kl"].mean == pytest.approx(-0.5 + 1.5)
    assert "kl" not in _cell(report, "text", "none").metrics
    assert _cell(report, "text", "spo").metrics["reference_nll"].mean == pytest.approx(1.0)
    assert _cell(report, "text", "none").metrics["reference_nll"].mean == pytest.approx(2.0)
    assert _cell(report, "harm", "none").cost["tokens"] == 8


def test_finished_cells_are_not_asked_again_and_other_inputs_are(tmp_path: Path) -> None:
    answers = {(p, s): ["0.5 yes"] for p in "ab" for s in (False, True)}
    sets = [PromptSet(condition="harm", prompts=(_prompt("a"),))]
    store = CellStore(folder=tmp_path, identity="model")
    first = Engine(answers)
    done = _run(first, sets, store=store)
    again = Engine(answers)
    assert _run(again, sets, store=store).cells == done.cells
    assert (len(first.asked), len(again.asked)) == (2, 0)
    damaged = sorted(tmp_path.iterdir())[0]
    damaged.write_text("{")
    _run(again, sets, store=store)
    assert len(again.asked) == 1
    other = Engine(answers)
    stronger = columns("none", "spo", spec=replace(SPEC, coefficient=0.75))
    _run(other, sets, store=store, defences=stronger)
    assert [r.steering is not None for r in other.asked] == [True]
    steered = next(path for path in tmp_path.iterdir() if path.name.startswith("harm--spo"))
    steered.write_text(steered.read_text().replace(VECTOR.sha256, "0" * 64))
    _run(again, sets, store=store)
    _run(again, sets, store=store, defences=stronger)
    assert len(again.asked) == 2, "a kept cell of another vector is made again"
    more = Engine(answers)
    _run(more, [replace(sets[0], prompts=(_prompt("a"), _prompt("b")))], store=store)
    assert len(more.asked) == 4


def test_a_defence_with_prompts_of_its_own_is_judged_on_what_was_asked() -> None:
    plain = _prompt("a")
    judge = Verdicts()
    prompts = PromptSet(
        condition="harm",
        prompts=(plain,),
        by_defence={"reminder": (replace(plain, text="be nice\nask a"),)},
    )
    engine = Engine({("a", False): ["0.1 yes"]})
    defences = [UNDEFENDED, Defence(name="reminder")]
    report = _run(engine, [prompts], defences=defences, success=[judge])
    assert [request.prompt.text for request in engine.asked] == ["ask a", "be nice\nask a"]
    assert judge.saw == ["ask a"]
    # Fluency too is that of the answer to the request without the reminder.
    assert {request.prompt.text for request in engine.scored} == {"ask a"}
    assert {answer.prompt for answer in report.answers} == {"ask a"}


def test_points_of_strength_curves_ask_one_defence_and_stay_out_of_tables() -> None:
    sets = [
        PromptSet(condition="harm", prompts=(_prompt("a"),)),
        PromptSet(
            condition="curve pgd-16 spo 5",
            prompts=(_prompt("a"),),
            only="spo",
            attack=Attacked(attack="pgd-16", kind="pgd", base="harm", step=5),
        ),
        PromptSet(condition="curve-fitting", prompts=(_prompt("a"),)),
    ]
    answers = {("a", False): ["0.1 yes"], ("a", True): ["0.1 yes"]}
    report = _run(Engine(answers), sets)
    points = [c.defence for c in report.cells if c.condition.startswith("curve ")]
    assert points == ["spo"]
    assert {c.condition for c in shown_conditions(report).cells} == {"harm", "curve-fitting"}


def test_two_evaluations_are_compared_on_shared_prompts() -> None:
    sets = [PromptSet(condition="harm", prompts=(_prompt("a"), _prompt("b")))]
    old = _run(Engine({(p, s): ["0.5 yes"] for p in "ab" for s in (False, True)}), sets)
    new = _run(Engine({(p, s): ["0.2 yes"] for p in "ab" for s in (False, True)}), sets)
    found = {entry[:3]: entry[3] for entry in compare_reports(old, new)}
    change = found["harm", "spo", "toxicity"]
    assert (change.mean, change.count) == (pytest.approx(-0.3), 2)
    assert "-0.300 [-0.300, -0.300]*" in format_comparison(compare_reports(old, new), "A", "B")
    with pytest.raises(DataError, match="share no prompt"):
        compare_reports(old, replace(new, answers=()))


def two_defences(conditions: dict[str, tuple[str, str]], *, other: str = "stage1") -> Any:
    """A report: condition to the answers of `other` and of `spo` to one prompt."""
    reports = [
        _run(
            Engine({("a", False): [before], ("a", True): [after]}),
            [PromptSet(condition=name, prompts=(_prompt("a"),), attack=MADE.get(name))],
        )
        for name, (before, after) in conditions.items()
    ]
    answers = [answer for report in reports for answer in report.answers]
    renamed = [replace(a, defence=other) if a.defence == "none" else a for a in answers]
    attacks = {name: made for report in reports for name, made in report.attacks.items()}
    return replace(reports[0], answers=tuple(renamed), attacks=attacks)


def _made(attack: str, blind: str = "", **fields: Any) -> Attacked:
    return Attacked(**{"kind": "pgd", "base": "describe", **fields}, attack=attack, blind=blind)


MADE = {
    "describe pgd-16": _made("pgd-16"),
    "describe adaptive-pgd-16": _made("adaptive-pgd-16", "pgd-16"),
    "describe adaptive-pgd-unbounded": _made("adaptive-pgd-unbounded", "pgd-unbounded"),
}


def compared(reports: Any, defence: str, baseline: str) -> Any:
    return {e[:3]: e[3] for e in compare_defences(reports, defence, baseline)}


ATTACKED = {
    "describe pgd-16": ("0.2 yes", "0.1 yes"),
    "describe adaptive-pgd-16": ("0.4 yes", "0.6 yes"),
    "describe adaptive-pgd-unbounded": ("0.5 yes", "0.4 yes"),
}


def test_two_defences_of_one_evaluation_are_compared_and_attacks_pooled() -> None:
    report = two_defences(ATTACKED)
    found = compared([report], "spo", "stage1")
    assert found["describe adaptive-pgd-16", "spo", "toxicity"].mean == pytest.approx(0.2)
    assert found["all adaptive PGD", "spo", "toxicity"].mean == pytest.approx(0.05)
    assert found["all PGD", "spo", "toxicity"].mean == pytest.approx(0.0)
    assert found["all PGD", "spo", "toxicity"].count == 1
    # At 16/255, the only blind attack. Spo: 0.6 - 0.1; the other: 0.4 - 0.2.
    assert found["gain by adapting", "spo", "toxicity"].mean == pytest.approx(0.3)
    with pytest.raises(DataError, match="no answers of 'bipo'; the evaluation has"):
        compare_defences([report], "spo", "bipo")


def test_no_attack_is_adapted_to_the_unsteered_model() -> None:
    found = compared([two_defences(ATTACKED, other="none")], "spo", "none")
    assert {condition for condition, _, _ in found} == {"describe pgd-16"}


def test_pictures_of_one_attack_are_not_independent_prompts() -> None:
    report = two_defences({"describe pgd-16": ("0.2 yes", "0.1 yes")})
    more = [replace(a, prompt_id="a@1", picture_of="a") for a in report.answers]
    found = compared([replace(report, answers=(*report.answers, *more))], "spo", "stage1")
    assert found["describe pgd-16", "spo", "toxicity"].count == 1
    apart = [replace(answer, picture_of="") for answer in more]
    found = compared([replace(report, answers=(*report.answers, *apart))], "spo", "stage1")
    assert found["describe pgd-16", "spo", "toxicity"].count == 2, "an id is only an id"


def test_a_prompt_set_of_a_users_own_is_no_attack_whatever_it_is_called() -> None:
    report = two_defences({"my adaptive-pgd-16": ("0.2 yes", "0.1 yes")}, other="none")
    assert {condition for condition, *_ in compared([report], "spo", "none")} == {
        "my adaptive-pgd-16"
    }


@pytest.mark.parametrize("defence", ["stage1", "my vector"])
def test_evaluations_from_before_attacks_had_fields_still_load(
    tmp_path: Path, defence: str
) -> None:
    report = two_defences(ATTACKED, other=defence)
    point = f"curve adaptive-pgd-16 {defence} 8"
    extra = [
        *[replace(a, prompt_id="a@1", picture_of="a") for a in report.answers],
        *[replace(a, condition=point) for a in report.answers if a.defence == defence],
        replace(report.answers[0], condition="typographic", prompt_id="user@7"),
    ]
    attacks = {
        **report.attacks,
        point: _made("adaptive-pgd-16", "pgd-16", base="", step=8),
        "typographic": Attacked(attack="typographic", kind="typographic", base="plain"),
    }
    report = replace(report, answers=(*report.answers, *extra), attacks=attacks)
    path = save_report(report, tmp_path / "evaluation.json")
    assert load_report(path) == report
    content = json.loads(path.read_text())
    del content["attacks"]
    for answer in content["answers"]:
        del answer["picture_of"]
    path.write_text(json.dumps(content))
    assert load_report(path) == report
    assert compared([load_report(path)], "spo", defence) == compared([report], "spo", defence)


def test_two_defences_are_compared_over_runs_where_all_have_the_condition() -> None:
    reports = [
        two_defences({"plain": ("0.5 yes", steered), **extra})
        for steered, extra in (("0.1 yes", {}), ("0.4 yes", ATTACKED), ("0.4 yes", ATTACKED))
    ]
    found = compared(reports, "spo", "stage1")
    assert {condition for condition, _, _ in found} == {"plain"}
    change = found["plain", "spo", "toxicity"]
    # -0.4, -0.1, -0.1: standard error 0.1, t with two degrees of freedom 4.303.
    assert change.mean == pytest.approx(-0.2)
    assert change.count == 3
    assert change.low == pytest.approx(-0.2 - 0.4303, abs=1e-3)
    assert "-0.200 [-0.630, +0.230] " in format_comparison(
        compare_defences(reports, "spo", "stage1"), "stage1", "spo", unit="runs"
    )
