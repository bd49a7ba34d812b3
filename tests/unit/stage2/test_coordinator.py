"""The coordinator's promises on fakes: overlap, staleness, exactly once, refills, deadlines."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from spo.engines.fake import FakeEngine
from spo.errors import DataError, EngineError, StageError, SteeringError
from spo.records import Batch, GenerateRequest, Rollout
from spo.stage2.coordinator_thread import CoordinatorThread
from spo.stage2.ledger import Fate, Ledger, committed_ids
from spo.stage2.loop import train
from spo.vector import SteeringVector
from tests.receipts import WRONG
from tests.unit.stage2.test_preference_loop import (
    WordScorer,
    coordinator,
    learner,
    start_vector,
)


class SlowEngine(FakeEngine):
    """Answers after a fixed time, one call at a time: an engine of a known speed."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds
        self.busy = 0.0
        """Seconds that sampling really took: more than asked for on a busy machine."""
        self._turn = threading.Lock()

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Rollout]:
        with self._turn:
            begin = time.monotonic()
            time.sleep(self._seconds)
            try:
                return super().generate(requests)
            finally:
                self.busy += time.monotonic() - begin


class Straggler(FakeEngine):
    """The second half of some groups never comes while the test runs."""

    def __init__(self) -> None:
        super().__init__()
        self.over = threading.Event()

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Rollout]:
        if (
            requests[0].request_id.startswith(("0/0/", "0/3/"))
            and requests[0].request_id[-1] == "1"
        ):
            self.over.wait(30)
        return super().generate(requests)


def ids(batch: Batch) -> list[str]:
    return [item.rollout.request_id for group in batch.groups for item in group]


def run(
    made: CoordinatorThread, steps: int, vector: SteeringVector, learn_s: float = 0.0
) -> list[Batch]:
    batches = []
    for step in range(steps):
        # Each step has a vector of its own.
        batches.append(made.batch(step, vector * (1.0 + 0.01 * step)))
        time.sleep(learn_s)
        made.record({"step": step, "learn_s": learn_s})
    return batches


def test_engines_and_learner_work_at_the_same_time() -> None:
    """Ideal: the longer of sampling and learning, after the first batch. Reached: 85 % of it."""
    steps, learning = 6, 0.6

    def run_with(staleness: int) -> tuple[float, float, float]:
        engine = SlowEngine(0.1)  # six groups a step, one call each
        made = coordinator(engine, max_staleness=staleness, calls_per_group=1)
        vector = start_vector(engine)
        learned = 0.0
        begin = time.monotonic()
        for step in range(steps):
            made.batch(step, vector * (1.0 + 0.01 * step))
            started = time.monotonic()
            time.sleep(learning)
            learned += time.monotonic() - started
            made.record({"step": step, "learn_s": learning})
        return time.monotonic() - begin, engine.busy * steps / (steps + staleness), learned

    wall, busy, learned = run_with(0)
    assert wall > 0.95 * (busy + learned)
    wall, busy, learned = run_with(1)
    ideal = busy / steps + max(busy, learned)
    assert ideal / wall > 0.85, (ideal, wall)


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_no_sample_is_older_than_allowed_and_none_is_used_twice(staleness: int) -> None:
    made = coordinator(FakeEngine(), max_staleness=staleness)
    batches = run(made, 8, start_vector(FakeEngine()))
    used = [name for batch in batches for name in ids(batch)]
    assert len(used) == len(set(used)) == 8 * 24
    assert max(age for batch in batches for age in batch.staleness) == staleness
    # Admission: never more than S batches beyond the one that was handed out.
    assert set(made.inner._places) <= set(range(8, 8 + staleness))


def test_stale_samples_carry_the_receipt_of_the_vector_that_made_them() -> None:
    made = coordinator(FakeEngine(), max_staleness=1)
    vector = start_vector(FakeEngine())
    batches = run(made, 3, vector)
    seen = {item.rollout.receipt.sha256 for g in batches[2].groups for item in g}  # type: ignore[union-attr]
    assert seen == {(vector * 1.01).sha256}
    assert batches[2].engine_logprobs  # the parity gate needs the current vector's


@pytest.mark.parametrize("wrong", WRONG)
def test_nothing_is_learned_from_an_answer_that_was_not_steered_as_asked(wrong: str) -> None:
    class Forgetful(FakeEngine):
        def generate(self, requests: Sequence[GenerateRequest]) -> list[Rollout]:
            answers = super().generate(requests)
            return [replace(r, receipt=r.receipt and WRONG[wrong](r.receipt)) for r in answers]

    engine = Forgetful()
    with pytest.raises(SteeringError, match="the answer is not used"):
        coordinator(engine).batch(0, start_vector(engine))


def test_static_answers_are_the_unsteered_model_s_and_proved_to_be() -> None:
    engine = FakeEngine()
    made = coordinator(engine, max_staleness=1, static=True)
    batches = run(made, 4, start_vector(engine))
    answers = [item.rollout for batch in batches for group in batch.groups for item in group]
    receipts = [answer.receipt for answer in answers if answer.receipt]
    assert len(receipts) == len(answers)
    assert {receipt.coefficient for receipt in receipts} == {0.0}
    assert {age for batch in batches for age in batch.staleness} <= {0, 1}
    assert not any(batch.engine_logprobs for batch in batches)
    plain = [
        engine.generate([replace(request, steering=None)])[0].text
        for request in made.inner.schedule.requests(
            made.inner.schedule.slot(0, 0, 0), made.inner._policy.spec
        )
    ]
    assert plain == [item.rollout.text for item in batches[0].groups[0]]


def test_groups_without_information_are_replaced_one_for_one() -> None:
    refused: list[Sequence[float]] = []

    def informative(rewards: Sequence[float]) -> bool:
        if len(refused) < 3:
            refused.append(rewards)
            return False
        return True

    made = coordinator(FakeEngine(), informative=informative)
    batch = made.batch(0, start_vector(FakeEngine()))
    assert len(batch.groups) == 6
    assert batch.dropped == {"no information": 12}
    counts = made.inner.ledger.counts(0)
    assert (counts["consumed"], counts["filtered"]) == (24, 12)


def test_refilling_has_an_end() -> None:
    made = coordinator(FakeEngine(), informative=lambda rewards: False, max_refills=2)
    batch = made.batch(0, start_vector(FakeEngine()))
    assert len(batch.groups) == 2  # the benign ones: they guard utility whatever their rewards
    assert made.inner.ledger.counts(0)["filtered"] == 4 * 3 * 4


def test_a_group_goes_on_without_its_stragglers_at_the_deadline() -> None:
    engine = Straggler()
    made = coordinator(engine, max_staleness=1, group_deadline_s=0.3)
    begin = time.monotonic()
    batch = made.batch(0, start_vector(engine))
    assert time.monotonic() - begin < 10
    engine.over.set()
    assert sorted(map(len, batch.groups)) == [2, 2, 4, 4, 4, 4]
    assert batch.dropped == {"timed out": 4}
    assert made.inner.ledger.counts(0)["timed_out"] == 4


def test_a_prompt_that_cannot_be_used_is_set_aside_and_replaced() -> None:
    class Picky(FakeEngine):
        def generate(self, requests: Sequence[GenerateRequest]) -> list[Rollout]:
            if requests[0].prompt.prompt_id == "harm2":
                raise DataError("prompt 'harm2' is too long")
            return super().generate(requests)

    made = coordinator(Picky())
    batches = run(made, 6, start_vector(FakeEngine()))
    assert all(len(batch.groups) == 6 for batch in batches)
    assert all("harm2" not in name for batch in batches for name in ids(batch))
    assert made.inner.schedule.banned == {"harm2"}
    assert made.inner.ledger.quarantined[0].reason == "prompt 'harm2' is too long"


def test_some_scores_that_fail_are_left_out_and_many_stop_the_run() -> None:
    class Sometimes(WordScorer):
        def __init__(self, share: float) -> None:
            self._share = share

        def score(self, rollouts: Sequence[Rollout]) -> list[dict[str, float]]:
            scores = super().score(rollouts)
            for item, rollout in zip(scores, rollouts, strict=True):
                if random.Random(rollout.request_id).random() < self._share:
                    item["toxicity"] = float("nan")
            return scores

    batch = coordinator(FakeEngine(), Sometimes(0.1)).batch(0, start_vector(FakeEngine()))
    lost = 24 - len(ids(batch))
    assert 0 < lost == sum(batch.dropped.values())
    with pytest.raises(StageError, match="have no usable score"):
        coordinator(FakeEngine(), Sometimes(0.6)).batch(0, start_vector(FakeEngine()))


def test_what_scores_cost_is_in_the_history_of_every_answer_also_those_left_out(
    tmp_path: Path,
) -> None:
    class Costly(WordScorer):
        asked = 0

        def score(self, rollouts: Sequence[Rollout]) -> list[dict[str, float]]:
            type(self).asked += len(rollouts)
            cost = {"judge:tokens": 10.0, "judge:seconds": 0.5}
            return [{**values, **cost} for values in super().score(rollouts)]

    made = coordinator(
        FakeEngine(),
        Costly(),
        tmp_path / "history.jsonl",
        informative=lambda rewards: max(rewards) - min(rewards) > 0.3,
        max_staleness=0,
    )
    batch = made.batch(0, start_vector(FakeEngine()))
    made.inner.record({"step": 0, "learn_s": 0.1, "kl": 0.0})
    line = json.loads((tmp_path / "history.jsonl").read_text())
    assert Costly.asked > len(ids(batch)), "some groups said nothing and were replaced"
    assert line["reward_cost"] == {
        "judge": {"tokens": 10.0 * Costly.asked, "seconds": 0.5 * Costly.asked}
    }
    assert "judge:tokens" not in batch.groups[0][0].reward.parts


def test_a_batch_that_breaks_the_learner_twice_is_made_anew_from_other_groups() -> None:
    made = coordinator(FakeEngine())
    vector = start_vector(FakeEngine())
    first, second = made.batch(0, vector), made.batch(0, vector)
    assert ids(first) == ids(second)
    third = made.batch(0, vector)
    assert not set(ids(first)) & set(ids(third))
    counts = made.inner.ledger.counts(0)
    assert (counts["quarantined"], counts["consumed"]) == (24, 24)
    assert ids(made.batch(0, vector)) == ids(third)


def test_a_failed_batch_can_be_asked_for_again() -> None:
    class Once(FakeEngine):
        failed = False

        def generate(self, requests: Sequence[GenerateRequest]) -> list[Rollout]:
            if not self.failed:
                self.failed = True
                raise EngineError("lost")
            return super().generate(requests)

    made = coordinator(Once())
    vector = start_vector(FakeEngine())
    with pytest.raises(EngineError, match="lost"):
        made.batch(0, vector)
    assert len(made.batch(0, vector).groups) == 6


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_strict_run_interrupted_anywhere_ends_with_the_same_vector(
    tmp_path: Path, at: int
) -> None:
    """Learner and coordinator are both new after the interruption; one step is lost as well."""
    steps = 6

    def follow(made: CoordinatorThread, one: object, first: int, last: int) -> dict[str, object]:
        kept: dict[str, object] = {}

        def after(update: object, vector: SteeringVector) -> None:
            step = update.step  # type: ignore[attr-defined]
            snapshot = made.record({"step": step, "learn_s": 0.0})
            folder = tmp_path / f"{at}-{id(made)}-{step + 1}"
            one.save(folder, step + 1)  # type: ignore[attr-defined]
            kept[str(step + 1)] = (folder, json.loads(json.dumps(snapshot)))

        train(one, made.batch, steps=range(first, last), after_step=after)  # type: ignore[arg-type]
        return kept

    whole_path, parts_path = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    whole = learner(FakeEngine(), "dpo")
    follow(coordinator(FakeEngine(), ledger=whole_path), whole, 0, steps)
    kept = follow(
        coordinator(FakeEngine(), ledger=parts_path), learner(FakeEngine(), "dpo"), 0, at + 1
    )
    # The checkpoint of the last step was lost with the worker: that step is run again.
    folder, snapshot = kept[str(at)]  # type: ignore[misc]
    again = learner(FakeEngine(), "dpo")
    made = coordinator(FakeEngine(), ledger=parts_path)
    made.inner.restore(snapshot)
    follow(made, again, again.restore(folder), steps)
    assert again.vector.sha256 == whole.vector.sha256
    assert committed_ids(parts_path) == committed_ids(whole_path)


def test_the_ledger_counts_nothing_twice() -> None:
    ledger = Ledger()
    ledger.enter(0, ["a", "b"], Fate.CONSUMED)
    with pytest.raises(StageError, match="'b' was consumed and would now be filtered"):
        ledger.enter(0, ["b"], Fate.FILTERED)
