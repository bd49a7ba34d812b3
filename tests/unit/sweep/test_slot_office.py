"""Slot leases: sharing, time limits, fair turns."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from spo.engines.fake import FakeEngine
from spo.errors import StageError, SteeringError
from spo.records import GenerateRequest, Prompt, PromptKind, Sampling, SteeringSpec
from spo.sweep.leased_sampler import LeasedSampler
from spo.sweep.slot_office import SlotOffice
from tests.example_sweep import known_vector


class Engines:
    """What `retire` did; names in `busy` are still read."""

    def __init__(self) -> None:
        self.retired: list[str] = []
        self.busy: set[str] = set()
        self.now = 0.0

    def retire(self, name: str) -> None:
        if name in self.busy:
            raise SteeringError("a request in flight uses it")
        self.retired.append(name)

    def office(self, capacity: int = 4, batch: int = 32) -> SlotOffice:
        return SlotOffice(
            capacity=capacity,
            lease_s=10.0,
            retire=self.retire,
            batch=batch,
            clock=lambda: self.now,
        )


def test_trials_with_one_vector_share_its_slot() -> None:
    office = Engines().office(capacity=1)
    assert all(office.acquire(f"t{i}", "vector", 1) for i in range(50))
    assert office.held()["vector"]["slots"] == 1
    assert not office.acquire("other", "another", 1)


def test_a_lease_that_is_not_renewed_ends_and_its_slots_serve_others() -> None:
    engines = Engines()
    office = engines.office()
    assert office.acquire("killed", "a", 4)
    assert not office.acquire("next", "b", 2)
    engines.now = 9.0
    assert office.renew("killed")
    engines.now = 18.0
    assert not office.acquire("next", "b", 2), "renewed in time"
    engines.now = 20.0
    assert office.acquire("next", "b", 2)
    assert engines.retired == ["a"]
    assert not office.renew("killed"), "it must not go on"
    assert office.expired == 1


def test_a_vector_that_a_killed_trial_still_reads_is_retired_later() -> None:
    engines = Engines()
    office = engines.office()
    office.acquire("killed", "a", 4)
    engines.busy = {"a"}
    engines.now = 11.0
    office.reap()
    assert office.held()
    assert not office.acquire("next", "b", 1)
    engines.busy = set()
    office.reap()
    assert office.held() == {}
    assert office.acquire("next", "b", 1)


def test_idle_vectors_stay_until_their_room_is_needed() -> None:
    engines = Engines()
    office = engines.office(capacity=2)
    for name in ("a", "b"):
        engines.now += 1
        office.acquire(f"of-{name}", name, 1)
        office.release(f"of-{name}")
    assert engines.retired == []
    office.acquire("third", "c", 1)
    assert engines.retired == ["a"], "the one that was used longest ago"


def test_what_can_never_fit_is_an_error_and_not_a_wait() -> None:
    with pytest.raises(StageError, match=r"needs 9 slots, the engines have 4 .* engine.slots"):
        Engines().office().acquire("t", "a", 9)


def leased(office: Any, trial: str, engine: FakeEngine, **changes: float) -> LeasedSampler:
    settings = {"lease_s": 10.0, "wait_s": 5.0, **changes}
    return LeasedSampler(engine, office, trial=trial, **settings)


def requests(count: int, label: str) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            request_id=f"{label}/{i}",
            prompt=Prompt(prompt_id=str(i), text="w", kind=PromptKind.HARM),
            sampling=Sampling(max_tokens=2, seed=i),
            steering=SteeringSpec(vector=label, version=0),
        )
        for i in range(count)
    ]


class SlowEngine(FakeEngine):
    """Takes time for each request and one call at a time, like an engine with a full batch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []
        self._turn = threading.Lock()

    def generate(self, requests: Any) -> Any:
        with self._turn:
            self.calls.append((requests[0].request_id.split("/")[0], len(requests)))
            time.sleep(0.005 * len(requests))
            return super().generate(requests)


def test_a_small_trial_does_not_wait_for_all_of_a_large_one() -> None:
    engine, office = SlowEngine(), Engines().office(batch=32)
    large, small = (leased(office, name, engine) for name in ("large", "small"))
    for name, sampler in (("large", large), ("small", small)):
        sampler.publish(name, known_vector(), 0)
    ended: dict[str, float] = {}

    def run(name: str, sampler: LeasedSampler, count: int) -> None:
        answers = sampler.generate(requests(count, name))
        ended[name] = time.monotonic()
        assert [a.request_id for a in answers] == [f"{name}/{i}" for i in range(count)]

    threads = [threading.Thread(target=run, args=("large", large, 320))]
    threads.append(threading.Thread(target=run, args=("small", small, 32)))
    begin = time.monotonic()
    threads[0].start()
    time.sleep(0.05)
    threads[1].start()
    for thread in threads:
        thread.join(timeout=30)
    took = {name: end - begin for name, end in ended.items()}
    assert took["small"] < 0.6 * took["large"], took
    assert max(size for _, size in engine.calls) == 32, "alone it may fill the batch"
    assert min(size for name, size in engine.calls if name == "large") <= 16, "then it shares"
    large.end(keep=False)
    small.end(keep=False)


def test_a_trial_that_lost_its_lease_stops() -> None:
    engines = Engines()
    office = engines.office()
    sampler = leased(office, "paused", FakeEngine(), lease_s=0.2)
    sampler.publish("paused", known_vector(), 0)
    engines.now = 11.0
    office.reap()
    time.sleep(0.3)
    with pytest.raises(StageError, match="lost its lease"):
        sampler.generate(requests(1, "paused"))
    sampler.end(keep=False)


def test_a_wait_for_a_slot_ends_with_advice() -> None:
    office = Engines().office(capacity=1)
    office.acquire("other", "x", 1)
    sampler = leased(office, "late", FakeEngine(), wait_s=0.2)
    with pytest.raises(StageError, match=r"waited .* lower search.concurrent"):
        sampler.publish("late", known_vector(), 0)
