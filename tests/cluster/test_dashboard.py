"""Every metric that the training dashboard shows is one that a training step sends to Ray."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from spo.config import RewardConfig
from spo.engines.fake import FakeEngine
from spo.records import Rollout
from spo.stage2.history import Recorder, open_sinks
from spo.stage2.learner import step_figures
from tests.unit.stage2.test_preference_loop import (
    coordinator,
    learner,
    start_vector,
)

BOARD = Path(__file__).parents[2] / "cluster" / "grafana" / "training.json"
WITH_PICTURES_ONLY = {"spo_reward_parts_alignment"}
WHEN_SOMETHING_IS_DROPPED = {r"spo_dropped_.+"}


class ThreeScores:
    """Toxicity, and the cross-check's."""

    def score(self, rollouts: Sequence[Rollout]) -> list[dict[str, float]]:
        return [{"toxicity": 0.5, "crosscheck": 0.5} for _ in rollouts]


def sent_by_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    names: set[str] = set()

    class Gauge:
        def __init__(self, name: str, **_: object) -> None:
            names.add(name)

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert tags == {"run": "r"}

    monkeypatch.setattr("ray.util.metrics.Gauge", Gauge)
    engine = FakeEngine()
    made = coordinator(engine, scorer=ThreeScores())
    made.inner.recorder = Recorder(RewardConfig(), sinks=open_sinks(["ray"], tmp_path, "r"))
    start = start_vector(engine)
    update = learner(engine).update(made.batch(0, start))
    made.record(step_figures(update, start, start))
    return names


def test_the_dashboard_shows_what_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = sent_by_a_step(tmp_path, monkeypatch)
    text = json.dumps(json.loads(BOARD.read_text()))
    shown = set(re.findall(r"ray_(spo_\w+)\{", text))
    patterns = set(re.findall(r'__name__=~\\"ray_(spo_[^"\\]+)\\"', text))
    assert shown
    assert patterns
    assert shown - sent - WITH_PICTURES_ONLY == set()
    unmatched = {p for p in patterns if not any(re.fullmatch(p, name) for name in sent)}
    assert unmatched - WHEN_SOMETHING_IS_DROPPED == set()
