"""The search space: what it refuses, and what its points become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from spo.config import RunConfig
from spo.config.load import validated
from spo.errors import ConfigError
from spo.sweep.settings import Parameter, SweepConfig, format_layers, load_sweep, parse_layers
from spo.sweep.space import Space

BASE = RunConfig()


def space(parameters: dict[str, Any], num_layers: int = 12) -> Space:
    sweep = validated(SweepConfig, {"space": parameters}, None)
    return Space(sweep.space, BASE, num_layers=num_layers)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "space is empty"),
        ({"steering.coefficent": {"uniform": [0, 1]}}, "not a configuration key"),
        ({"steering.coefficient": {"uniform": [2, 1]}}, "is empty"),
        ({"steering.coefficient": {"loguniform": [0, 1]}}, "low end above 0"),
        ({"steering.coefficient": {"uniform": [-1, 1]}}, "greater than 0"),
        ({"steering.operator": {"choices": []}}, "choices is empty"),
        ({"steering.operator": {"choices": ["add", "add"]}}, "names a value twice"),
        ({"steering.operator": {"choices": ["subtract"]}}, "cannot run"),
        ({"steering.coefficient": {}}, "exactly one of"),
        ({"steering.coefficient": {"uniform": [0, 1], "choices": [1]}}, "exactly one of"),
        ({"steering.coefficient": {"unform": [0, 1]}}, "Extra inputs"),
        ({"estimate.layers": {"choices": ["8-12"]}}, r"reaches blocks \[12\], .* blocks 0..11"),
        ({"estimate.layers": {"choices": ["8-x"]}}, "layers are written as"),
        ({"estimate.layers": {"window": {"first": [8, 11], "width": [1, 3]}}}, r"\[13\]"),
        ({"estimate.layers": {"subset": {"of": "10-14"}}}, r"\[12, 13, 14\]"),
        ({"estimate.num_layers": {"window": {"first": [1, 2], "width": [1, 1]}}}, "choose decoder"),
        ({"engine.replicas": {"choices": [1, 2]}}, "cannot be searched"),
        ({"reward.toxicity_model": {"choices": ["original"]}}, "cannot be searched"),
        ({"reward.parts": {"choices": [[]]}}, "cannot be searched"),
        ({"reward.parts.toxicity.model": {"choices": ["original"]}}, "only the weight"),
        ({"reward.parts.toxicity.weight": {"uniform": [-1, 0]}}, "not a configuration key"),
        ({"extract.sources.unknown.weight": {"uniform": [0, 1]}}, "not a configuration key"),
        (
            {"learn.beta": {"uniform": [0.1, 1], "when": {"learn.objective": "dpo"}}},
            "not a dimension above it",
        ),
        (
            {
                "learn.objective": {"choices": ["rloo"]},
                "learn.beta": {"uniform": [0.1, 1], "when": {"learn.objective": "dpo"}},
            },
            "can never apply",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space(parameters)


CONDITIONAL: dict[str, Any] = {
    "estimate.layers": {"window": {"first": [2, 8], "width": [1, 3], "step": 2}},
    "steering.coefficient": {"loguniform": [0.1, 1.0], "grid": 3},
    "learn.objective": {"choices": ["dpo", "rloo"]},
    "learn.beta": {"choices": [0.1, 0.2], "when": {"learn.objective": "dpo"}},
    "extract.sources.continuation.weight": {"uniform": [0.0, 1.0], "step": 0.5},
}


def test_a_point_becomes_a_configuration() -> None:
    made = space(CONDITIONAL)
    point = made.point(
        {
            "estimate.layers": "4-6",
            "steering.coefficient": 0.3,
            "learn.objective": "dpo",
            "learn.beta": 0.2,
            "extract.sources.continuation.weight": 0.5,
        }
    )
    config = made.config(point)
    assert config.estimate.layers == (4, 5, 6)
    assert config.learn.objective == "dpo"
    assert config.learn.beta == 0.2
    assert [source.weight for source in config.extract.sources] == [0.5, 1.0, 1.0]
    assert config.steering.coefficient == 0.3
    assert made.trains


def test_a_condition_that_does_not_hold_leaves_the_base_value() -> None:
    made = space(CONDITIONAL)
    for point in made.grid():
        beta = made.config(point).learn.beta
        if point["learn.objective"] == "rloo":
            assert "learn.beta" not in point
            assert beta == BASE.learn.beta
        else:
            assert beta in (0.1, 0.2)


def test_the_grid_holds_every_point_once() -> None:
    points = space(CONDITIONAL).grid()
    # Windows: 4 first blocks x 3 widths; 3 coefficients; dpo with 2 betas or rloo; 3 weights.
    assert len(points) == 4 * 3 * 3 * (2 + 1) * 3
    assert len({str(sorted(point.items())) for point in points}) == len(points)
    coefficients = sorted({round(float(p["steering.coefficient"]), 6) for p in points})
    assert coefficients == [0.1, round(0.1**0.5, 6), 1.0]


def test_optuna_samples_only_points_that_run() -> None:
    made = space(
        {
            **CONDITIONAL,
            "estimate.layers": {"subset": {"of": "2-6", "at_most": 2}},
            "estimate.depth_window": {"choices": [[0.1, 0.5], [0.2, 0.9]]},
        }
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(40):
        config = made.config(made.assign(study.ask()))
        assert config.estimate.layers
        assert len(config.estimate.layers) <= 2
        assert config.estimate.depth_window in ((0.1, 0.5), (0.2, 0.9))


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"steering.coefficient": 0.3}, "must name estimate.layers"),
        ({"estimate.layers": "4-6", "steering.coefficient": 7}, "outside"),
        ({"estimate.layers": "4,6", "steering.coefficient": 1}, "neighbouring"),
        ({"estimate.layers": "4-6", "steering.coefficient": "much"}, "must be a number"),
        ({"estimate.layers": "4", "steering.coefficient": 1, "seed": 3}, "does not search"),
    ],
)
def test_points_to_evaluate_first_are_checked(point: dict[str, Any], message: str) -> None:
    made = space({k: CONDITIONAL[k] for k in ("estimate.layers", "steering.coefficient")})
    with pytest.raises(ConfigError, match=message):
        made.point(point)


@pytest.mark.parametrize("text", ["3", "3-5", "1,4", "1,4-6,9"])
def test_layers_are_written_and_read_alike(text: str) -> None:
    assert format_layers(parse_layers(text)) == text


@pytest.mark.parametrize("name", ["sweep_layers", "sweep_coefficients", "sweep_spo"])
def test_shipped_sweeps_fit_the_embedded_model(name: str, repository: Path) -> None:
    sweep, base = load_sweep(repository / "tune_configs" / f"{name}.yaml", ["search.trials=3"])
    made = Space(sweep.space, base, num_layers=30)
    assert sweep.search.trials == 3
    assert base.name == sweep.name
    assert made.trains == (name == "sweep_spo")
    for point in sweep.first:
        made.point(point)


def test_overrides_change_the_sweep_or_its_base(repository: Path) -> None:
    file = repository / "tune_configs" / "sweep_layers.yaml"
    sweep, base = load_sweep(file, ["pool.mode=isolated", "learn.steps=3", "engine.backend=fake"])
    assert (sweep.pool.mode, base.learn.steps, base.engine.backend) == ("isolated", 3, "fake")
    with pytest.raises(ConfigError, match=r"pool\.mod"):
        load_sweep(file, ["pool.mod=isolated"])


def test_weights_of_named_reward_parts_are_searched() -> None:
    parts = [
        {"kind": "toxicity", "weight": -1},
        {"kind": "refusal", "name": "twin", "weight": -1, "prompts": "benign"},
    ]
    base = RunConfig.model_validate({"reward": {"parts": parts}})
    key = "reward.parts.twin.weight"
    space = Space({key: Parameter(uniform=(-2, 0))}, base, num_layers=12)
    assert space.trains
    assert [part.weight for part in space.config({key: -1.5}).reward.counted] == [-1.0, -1.5]
