"""Small parts of Stage II: scorers' micro-batches, alarms, what the learner refuses."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

from spo.actors.reward_pool import MicroBatcher
from spo.bench.objectives import write_table
from spo.config import LearnConfig, RewardConfig
from spo.engines.fake import FakeEngine
from spo.errors import ConfigError, StageError
from spo.records import Batch
from spo.scorers.crosscheck import ProfanityCheck
from spo.stage2.history import Recorder, open_sinks
from spo.stage2.learner import VectorLearner
from tests.unit.stage2.test_preference_loop import STEERING, coordinator, start_vector


def test_calls_of_several_threads_are_joined_and_answered_apart() -> None:
    sizes: list[int] = []
    together = threading.Barrier(6)

    def double(items: Sequence[Any]) -> list[Any]:
        sizes.append(len(items))
        return [2 * item for item in items]

    batcher = MicroBatcher(double, max_items=12, max_wait_s=0.5)

    def call(i: int) -> list[Any]:
        together.wait()
        return batcher.call([i, 10 * i])

    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(call, range(6)))
    assert answers == [[2 * i, 20 * i] for i in range(6)]
    assert sum(sizes) == 12
    assert len(sizes) < 6
    alone = MicroBatcher(double, max_items=12, max_wait_s=0.0)
    assert alone.call([1]) == [2]


def test_an_error_reaches_every_joined_caller() -> None:
    def fail(items: Sequence[Any]) -> list[Any]:
        raise ValueError("broken")

    batcher = MicroBatcher(fail, max_items=4, max_wait_s=0.2)
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(batcher.call, [1]) for _ in range(2)]
        for each in calls:
            with pytest.raises(ValueError, match="broken"):
                each.result()


def test_the_cross_check_tells_rude_from_kind() -> None:
    rude, kind = ProfanityCheck().score(["you are a stupid idiot", "you are a kind person"])
    assert rude > 0.8 > 0.2 > kind
    assert ProfanityCheck().score([]) == []


def test_reward_hacking_raises_an_alarm_after_three_steps(tmp_path: Path) -> None:
    recorder = Recorder(RewardConfig(hacking_gap=0.3), history=tmp_path / "h.jsonl")
    alarms = []
    for step, (toxicity, second) in enumerate([(0.4, 0.4), (0.1, 0.38), (0.1, 0.4), (0.05, 0.4)]):
        recorder._figures[step] = {
            "reward_parts": {"toxicity_harm": toxicity, "crosscheck_harm": second}
        }
        recorder.record({"step": step, "learn_s": 0.0}, {})
    for line in (tmp_path / "h.jsonl").read_text().splitlines():
        alarms.append(json.loads(line)["alarms"])
    assert alarms[:3] == [[], [], []]
    assert alarms[3][0].startswith("reward hacking: 12% of the first toxicity")


def test_rollouts_are_kept_and_figures_reach_tensorboard(tmp_path: Path) -> None:
    recorder = Recorder(
        RewardConfig(),
        rollouts=tmp_path / "rollouts",
        sinks=open_sinks(["tensorboard"], tmp_path, "run"),
    )
    batch = coordinator(FakeEngine()).batch(0, start_vector(FakeEngine()))
    recorder.batch(batch)
    recorder.record({"step": 0, "learn_s": 1.0, "kl": 0.1}, {})
    table = pyarrow.parquet.read_table(tmp_path / "rollouts" / "step-000000.parquet").to_pylist()
    assert len(table) == 24
    assert table[0]["request_id"] == batch.groups[0][0].rollout.request_id
    assert list((tmp_path / "tensorboard" / "run").glob("events*"))
    with pytest.raises(ConfigError, match="'wandb', which is not installed"):
        open_sinks(["wandb"], tmp_path, "run")


def made(engine: FakeEngine, **changes: Any) -> VectorLearner:
    learn = LearnConfig(**{"learning_rate": 0.3, "max_grad_norm": 1e9, **changes})
    return VectorLearner(engine, start_vector(engine), steering=STEERING, config=learn)


def batch_of(engine: FakeEngine) -> Batch:
    return coordinator(engine).batch(0, start_vector(engine))


def test_a_step_that_breaks_benign_answers_is_taken_back() -> None:
    engine = FakeEngine()
    batch = batch_of(engine)
    one = made(engine, max_kl=1e-9, kl_weight=0.0, kl_weight_harm=0.0)
    one.update(batch)  # nothing to go back to yet
    moved = one.vector
    with torch.no_grad():
        one._tensors["directions"].add_(0.5)
    update = one.update(batch)
    if update.kl_benign <= 1e-9:
        pytest.fail("the fake model's benign answers do not feel the vector: no divergence to see")
    assert update.rejected
    assert "went back one step" in update.alarms[-1]
    assert one.vector.sha256 != moved.sha256
    assert one.vector.sha256 == start_vector(engine).sha256
    assert update.learning_rate == pytest.approx(0.15 / 8**0.5)


def moved_by(one: VectorLearner, much: float) -> None:
    with torch.no_grad():
        one._tensors["directions"].add_(much)


def test_a_start_above_the_bound_does_not_lock() -> None:
    engine = FakeEngine()
    batch = batch_of(engine)
    one = made(engine, max_kl=1e-9, kl_weight=5.0, kl_weight_harm=0.0, learning_rate=1e-3)
    first = one.update(batch)
    assert first.kl_benign > 1e-9
    worse = made(engine, max_kl=1e-9, kl_weight=5.0, kl_weight_harm=0.0, learning_rate=1e-3)
    worse.update(batch)
    moved_by(worse, 0.5)
    refused = worse.update(batch)
    assert refused.rejected
    after = worse.update(batch)  # from the kept vector, which is not asked again
    assert not after.rejected
    assert after.grad_norm > 0


def test_moves_that_are_all_taken_back_end_the_training(tmp_path: Path) -> None:
    engine = FakeEngine()
    batch = batch_of(engine)
    one = made(engine, max_kl=1e-9, kl_weight=0.0, kl_weight_harm=0.0)
    one.update(batch)
    for step in range(7):
        if step == 3:  # the count is in the checkpoint
            one.save(tmp_path, step)
            one = made(engine, max_kl=1e-9, kl_weight=0.0, kl_weight_harm=0.0)
            one.restore(tmp_path)
        moved_by(one, 0.5)
        assert one.update(batch).rejected
        assert not one.update(batch).rejected
    moved_by(one, 0.5)
    with pytest.raises(StageError, match="8 steps in a row were taken back"):
        one.update(batch)


def test_the_rate_warms_up_and_falls() -> None:
    config = LearnConfig(steps=6, warmup_steps=2, schedule="linear")
    shares = [config.rate_share(step) for step in range(6)]
    assert shares == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25])
    assert LearnConfig(steps=6).rate_share(5) == 1.0
    assert config.rate_share(6) > 0  # a run that was extended


def test_a_share_of_the_rate_is_a_share_of_the_step() -> None:
    engine = FakeEngine()
    batch, start = batch_of(engine), start_vector(engine).directions
    whole, part = made(engine), made(engine, warmup_steps=3)
    whole.update(batch)
    update = part.update(batch)
    assert torch.allclose(part.vector.directions - start, (whole.vector.directions - start) / 4)
    assert update.learning_rate == pytest.approx(0.3 / 8**0.5 / 4)


def test_strengths_alone_can_be_trained() -> None:
    engine = FakeEngine()
    one = made(engine, train=("coefficients",))
    one.update(batch_of(engine))
    before, after = start_vector(engine), one.vector
    cosine = torch.nn.functional.cosine_similarity(before.directions, after.directions, dim=1)
    assert torch.allclose(cosine, torch.ones(2), atol=1e-5)
    assert not torch.allclose(before.norms, after.norms)


def test_an_engine_that_computes_another_model_raises_the_parity_alarm() -> None:
    engine = FakeEngine()
    batch = batch_of(engine)
    assert made(engine).update(batch).alarms == ()
    other = FakeEngine(rudeness=4.0)
    update = made(other).update(batch)
    assert update.logprob_gap > 0.1
    assert any(alarm.startswith("parity:") for alarm in update.alarms)


def test_the_table_of_objectives_pairs_them_by_seed(tmp_path: Path) -> None:
    figures = {"rloo": (0.4, 0.2), "dpo": (0.5, 0.3), "Stage I": (0.7,)}
    rows = [
        {"objective": name, "seed": seed, "toxicity": value}
        for name, values in figures.items()
        for seed, value in enumerate(values)
    ]
    write_table(rows, tmp_path / "table.md", baseline="rloo")
    cells = {
        (row := [cell.strip() for cell in line.split("|")[1:-1]])[0]: (row[1], row[3], row[-1])
        for line in (tmp_path / "table.md").read_text().splitlines()[2:]
    }
    # Means that differ much from seed to seed, by the same in both.
    assert cells["dpo"] == ("2", "0.400 ± 0.141", "+0.100 [+0.100, +0.100]")
    assert cells["rloo"] == ("2", "0.300 ± 0.141", "")
    assert cells["Stage I"] == ("1", "0.700", "")
