"""Where a model runs: one slice for every stage."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from jobs.command import workload
from spo.config import RunConfig, load_config
from spo.config.place import ModelPlace, PlaceConfig
from spo.errors import ConfigError, StageError
from spo.session.placement import Room, check_room, phases_of

TWO_CARDS = [
    "extract.num_gpus=2",
    "extract.tensor_parallel_size=2",
    "engine.num_gpus=2",
    "engine.tensor_parallel_size=2",
    "learn.use_gpu=true",
    "learn.num_gpus=2",
    "learn.tensor_parallel_size=2",
]
PLACES: dict[str, Callable[[RunConfig], PlaceConfig]] = {
    "extract": lambda config: config.extract,
    "engine": lambda config: config.engine,
    "reward": lambda config: config.reward,
    "learn": lambda config: config.learn,
    "attack": lambda config: config.attack_place,
}


@pytest.mark.parametrize("stage", PLACES)
def test_every_stage_says_where_it_runs_in_the_same_words(stage: str) -> None:
    place = PLACES[stage]
    assert place(RunConfig()).ray_options() == {"num_gpus": 0, "label_selector": {}}
    assert place(RunConfig()).device == "cpu"
    gpu = [f"{stage}.num_gpus=0.5", f"{stage}.labels={{role: own}}"]
    on_card = place(load_config(None, [*gpu, *(["learn.use_gpu=true"] * (stage == "learn"))]))
    assert on_card.ray_options() == {"num_gpus": 0.5, "label_selector": {"role": "own"}}
    assert on_card.device == "cuda"


@pytest.mark.parametrize("stage", ["extract", "engine", "learn", "attack"])
def test_a_model_takes_two_cards_in_every_stage(stage: str) -> None:
    place = PLACES[stage](load_config(None, TWO_CARDS))
    assert isinstance(place, ModelPlace)
    assert place.gpus == 2
    assert place.torch_devices == ("cuda:0", "cuda:1")


def test_vllm_is_told_of_the_ranks() -> None:
    config = load_config(None, TWO_CARDS)
    for place in (config.engine, config.extract):
        arguments = place.engine_arguments()
        assert arguments["tensor_parallel_size"] == 2
        assert arguments["kv_cache_gib"] is None
    ranks = load_config(None, ["engine.tensor_parallel_size=2"]).engine  # two processes on the CPU
    assert ranks.engine_arguments()["kv_cache_gib"] == ranks.memory_gib
    assert (ranks.gpus, ranks.device) == (0, "cpu")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["engine.tensor_parallel_size=2", "engine.num_gpus=1"], "2 whole cards .* got 1: set num"),
        (["engine.tensor_parallel_size=2", "engine.backend=hf"], "got 0: set num_gpus=2"),
        (["extract.tensor_parallel_size=2"], "got 0: set num_gpus=2"),
        (["learn.tensor_parallel_size=2"], "set use_gpu=true and num_gpus=2"),
        (["attack.tensor_parallel_size=2"], "'attack', filled up from 'learn': .* got 0"),
        (["engine.tensor_parallel_size=2", "engine.in_process=true"], "leave in_process out"),
    ],
)
def test_ranks_without_their_cards_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(None, overrides)


def test_attacks_run_where_the_learner_does_unless_they_are_told() -> None:
    learner = ["learn.use_gpu=true", "learn.num_gpus=0.25", "learn.labels={role: learner}"]
    place = load_config(None, learner).attack_place
    assert (place.gpus, place.dtype, place.labels) == (0.25, "bfloat16", {})
    own = ["attack.num_gpus=1", "attack.dtype=float32", "attack.labels={role: attacker}"]
    place = load_config(None, [*TWO_CARDS, *own]).attack_place
    assert (place.gpus, place.dtype, place.labels) == (1, "float32", {"role": "attacker"})
    assert place.torch_devices == ("cuda",)
    assert load_config(None, [*TWO_CARDS, "attack.num_gpus=0"]).attack_place.device == "cpu"


def test_the_plan_counts_every_card() -> None:
    phases = phases_of(workload(load_config(None, [*TWO_CARDS, "reward.num_gpus=0.5"])), ("train",))
    cards = {role.name: role.gpus for role in phases["train"]}
    assert cards == {"engine": 2, "scorer": 0.5, "learner": 2, "picture attack": 2}
    wide = [Room(node="wide", cpus=16, gpus=5)]
    plan = check_room(phases, wide)["train"]
    assert sorted(plan) == ["1 x engine on wide", "1 x learner on wide", "1 x scorer on wide"]
    # Two cards of one copy lie on one node.
    apart = [Room(node=f"n{i}", cpus=16, gpus=1) for i in range(8)]
    with pytest.raises(StageError, match=r"no room for 1 of 1 x learner .* lower learn.workers"):
        check_room(phases, apart)


def test_where_a_model_runs_changes_no_digest() -> None:
    """The first ones are those of version 0.1: runs and trials of it go on."""
    config = RunConfig()
    assert config.digest_of("extract", "engine", "learn") == "a646911196804992"
    ranks = load_config(None, ["engine.tensor_parallel_size=2", "attack.num_gpus=1"])
    assert ranks.digest == config.digest
    assert ranks.digest_of("engine") == config.digest_of("engine")
    assert load_config(None, ["attack.dtype=float32"]).digest != config.digest
