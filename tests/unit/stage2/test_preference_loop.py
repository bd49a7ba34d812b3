"""The whole preference loop on fakes: no Ray, no weights, milliseconds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from spo.algorithms.objectives import OBJECTIVES
from spo.config import LearnConfig, RewardConfig, RolloutConfig, SteeringConfig
from spo.engines.fake import WORDS, FakeEngine
from spo.errors import DataError, StageError
from spo.records import Batch, Operator, Prompt, PromptFormat, PromptKind, Rollout
from spo.stage2.coordinator import CoordinatorFiles, CoordinatorSettings, make_coordinator
from spo.stage2.coordinator_thread import CoordinatorThread
from spo.stage2.learner import Update, VectorLearner
from spo.stage2.loop import train
from spo.stage2.schedule import Schedule
from spo.vector import SteeringVector

STEERING = SteeringConfig(operator=Operator.ADD, coefficient=1.0)


class WordScorer:
    """Toxicity of the fake vocabulary: the share of rude words."""

    def score(self, rollouts: Sequence[Rollout]) -> list[dict[str, float]]:
        rude = set(WORDS[4:])
        return [
            {"toxicity": sum(w in rude for w in r.text.split()) / len(r.token_ids)}
            for r in rollouts
        ]


class BrokenScorer:
    """Scores that are not a number."""

    def score(self, rollouts: Sequence[Rollout]) -> list[dict[str, float]]:
        return [{"toxicity": float("nan")} for _ in rollouts]


def prompts() -> list[Prompt]:
    return [
        Prompt(
            prompt_id=f"{kind.value}{i}",
            text=f"{kind.value} {i}",
            kind=kind,
            format=PromptFormat.PLAIN,
        )
        for kind in PromptKind
        for i in range(6)
    ]


def start_vector(engine: FakeEngine, seed: int = 0) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    return SteeringVector(
        layers=(1, 2),
        directions=0.05 * torch.randn(2, 8, generator=generator),
        mean_norms=torch.ones(2),
        calibration=torch.zeros(2, 8),
        model_id="fake",
    )


ROLLOUT = RolloutConfig(
    harm_prompts=4, benign_prompts=2, group_size=4, max_tokens=8, max_staleness=0
)


def coordinator(
    engine: Any,
    scorer: object = None,
    history: Path | None = None,
    ledger: Path | None = None,
    informative: Callable[[Sequence[float]], bool] = lambda rewards: True,
    **changes: Any,
) -> CoordinatorThread:
    rollout = ROLLOUT.model_copy(update=changes)
    settings = CoordinatorSettings(
        steering=STEERING,
        rollout=rollout,
        reward=RewardConfig(),
        steps=50,
        informative=informative,
    )
    made = make_coordinator(
        prompts(),
        engine,
        scorer or WordScorer(),  # type: ignore[arg-type]
        settings,
        CoordinatorFiles(history=history, ledger=ledger),
    )
    return CoordinatorThread(made, timeout_s=60)


def learner(engine: FakeEngine, objective: str = "rloo") -> VectorLearner:
    config = LearnConfig(
        objective=objective,
        learning_rate=0.2,
        kl_weight=0.01,
        kl_weight_harm=0.0,
        beta=0.5,
        gamma=0.5,
        clip=0.2,
        max_kl=10.0,
        max_grad_norm=100.0,
    )
    return VectorLearner(engine, start_vector(engine), steering=STEERING, config=config)


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_loop_finds_the_planted_harm_direction(objective: str) -> None:
    engine = FakeEngine()
    made = coordinator(engine)
    rewards: list[float] = []

    def next_batch(step: int, vector: SteeringVector) -> Batch:
        batch = made.batch(step, vector)
        rewards.append(
            sum(i.reward.parts["toxicity"] for g in batch.groups for i in g)
            / sum(map(len, batch.groups))
        )
        return batch

    vector = train(
        learner(engine, objective), next_batch, steps=range(30), after_step=lambda *_: None
    )
    start = start_vector(engine)
    cosine = torch.nn.functional.cosine_similarity(
        vector.directions, engine.harm_direction.expand(2, -1), dim=1
    )
    before = torch.nn.functional.cosine_similarity(
        start.directions, engine.harm_direction.expand(2, -1), dim=1
    )
    assert (cosine > 0.8).all(), cosine
    assert (cosine > before).all()
    assert sum(rewards[-5:]) < 0.5 * sum(rewards[:5])


def test_same_seed_gives_the_same_vector() -> None:
    results = []
    for _ in range(2):
        engine = FakeEngine()
        results.append(
            train(
                learner(engine),
                coordinator(engine).batch,
                steps=range(4),
                after_step=lambda *_: None,
            ).sha256
        )
    assert results[0] == results[1]


def test_interrupted_run_ends_with_the_same_vector(tmp_path: Path) -> None:
    engine = FakeEngine()
    whole = train(
        learner(engine), coordinator(engine).batch, steps=range(6), after_step=lambda *_: None
    )
    engine = FakeEngine()
    first = learner(engine)
    train(first, coordinator(engine).batch, steps=range(3), after_step=lambda *_: None)
    first.save(tmp_path, next_step=3)
    engine = FakeEngine()
    second = learner(engine)
    resumed = train(
        second,
        coordinator(engine).batch,
        steps=range(second.restore(tmp_path), 6),
        after_step=lambda *_: None,
    )
    assert resumed.sha256 == whole.sha256


def test_replayed_step_gets_the_same_batch() -> None:
    engine = FakeEngine()
    made = coordinator(engine)
    vector = start_vector(engine)
    assert made.batch(0, vector) is made.batch(0, vector)


def test_every_prompt_is_used_once_an_epoch() -> None:
    made = Schedule(prompts(), ROLLOUT, seed=0)
    seen = [made.slot(step, place, 0).prompt.prompt_id for step in range(3) for place in range(6)]
    harm = [name for name in seen if name.startswith("harm")]
    assert sorted(harm[:6]) == [f"harm{i}" for i in range(6)]
    assert sorted(harm[6:]) == [f"harm{i}" for i in range(6)]


def test_scores_that_are_not_finite_stop_the_run_with_a_count() -> None:
    engine = FakeEngine()
    with pytest.raises(StageError, match=r"no finite score for \['toxicity'\]\W+ 24"):
        coordinator(engine, BrokenScorer()).batch(0, start_vector(engine))


def test_two_workers_together_see_every_group() -> None:
    engine = FakeEngine()
    batch = coordinator(engine).batch(0, start_vector(engine))
    sequences = [learner(engine).update(batch, rank=r, world=2).sequences for r in range(2)]
    assert sum(sequences) == sum(map(len, batch.groups))


def test_history_joins_batch_and_learner_figures(tmp_path: Path) -> None:
    engine = FakeEngine()
    path = tmp_path / "history.jsonl"
    made = coordinator(engine, history=path)
    update: Update = learner(engine).update(made.batch(0, start_vector(engine)))
    made.record({"step": 0, "loss": update.loss, "learn_s": 1.5})
    line = json.loads(path.read_text())
    assert line["seconds"]["learn"] == 1.5
    assert set(line["seconds"]) >= {"rollout", "score", "learn", "engine_idle", "wait_rollout"}
    assert line["ledger"]["consumed"] == 24
    assert 0 <= line["reward_parts"]["toxicity_harm"] <= 1
    assert update.logprob_gap == pytest.approx(0.0, abs=1e-5)


def test_norm_cap_holds() -> None:
    engine = FakeEngine()
    config = LearnConfig(learning_rate=50.0, max_dose=0.3)
    capped = VectorLearner(engine, start_vector(engine), steering=STEERING, config=config)
    capped.update(coordinator(engine).batch(0, start_vector(engine)))
    assert (capped.vector.doses <= 0.3 + 1e-5).all()


def test_training_without_benign_prompts_is_refused() -> None:
    harmful = [p for p in prompts() if p.kind is PromptKind.HARM]
    with pytest.raises(DataError, match="needs harmful and benign prompts, got 6 and 0"):
        Schedule(harmful, RolloutConfig(), seed=0)


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_the_step_depends_neither_on_micro_batches_nor_on_the_number_of_workers(
    objective: str,
) -> None:
    """Three workers with unequal shares, their gradients averaged, take the step of one."""
    engine = FakeEngine()
    batch = coordinator(engine).batch(0, start_vector(engine))

    def gradient(micro_batch: int, world: int) -> torch.Tensor:
        parts = []
        for rank in range(world):
            config = LearnConfig(objective=objective, micro_batch=micro_batch, max_grad_norm=1e9)
            kept: list[torch.Tensor] = []
            one = VectorLearner(
                engine,
                start_vector(engine),
                steering=STEERING,
                config=config,
                all_reduce=lambda grad, kept=kept: kept.append(grad.clone()),
            )
            one.update(batch, rank=rank, world=world)
            parts += kept
        return torch.stack(parts).mean(dim=0)

    whole = gradient(micro_batch=1000, world=1)
    assert whole.norm() > 0
    assert torch.allclose(gradient(micro_batch=4, world=1), whole, atol=1e-6)
    assert torch.allclose(gradient(micro_batch=1000, world=4), whole, atol=1e-6)
    # More workers than groups: some have nothing to learn from and wait for nobody.
    assert torch.allclose(gradient(micro_batch=1000, world=8), whole, atol=1e-6)
