"""Entry points of other packages: a tiny one is put on the path, used, and refused when it is bad.

Each test runs in processes of its own: an installation does not change while a process runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = '''
"""A package that knows nothing of SPO-VLM's sources but their public forms."""
import numpy as np
from dataclasses import replace

from spo.algorithms.estimators import moments, unit_rows
from spo.algorithms.objectives import Objective
from spo.attacks.prompts import Attack


def medians(contrast, keep, config):
    sides = {True: [], False: []}
    for block in contrast.blocks():
        for row_id, harm, values in zip(block.ids, block.harm, block.values):
            if keep(row_id):
                sides[bool(harm)].append(values)
    return unit_rows(np.median(sides[True], axis=0) - np.median(sides[False], axis=0))


def push_best(groups, config):
    best = groups.rewards.argmax(dim=1, keepdim=True)
    return -groups.policy.gather(1, best).sum()


BEST = Objective(loss=push_best, on_policy=True, smallest_gap=0.25)


def shouted(prompts, material):
    return [replace(prompt, text=prompt.text.upper()) for prompt in prompts]


SHOUT = Attack(rewrite=shouted)


def short(rollout):
    return 1.0 / (1 + len(rollout.text))
'''
SOUND = {
    "spo.estimators": {"medians": "tiny_plugin:medians"},
    "spo.objectives": {"best": "tiny_plugin:BEST"},
    "spo.rewards": {"short": "tiny_plugin:short"},
    "spo.attacks": {"shout": "tiny_plugin:SHOUT"},
}


def install(folder: Path, name: str, points: dict[str, dict[str, str]], module: str = "") -> None:
    """What an installer leaves behind: the module and its metadata."""
    about = folder / f"{name.replace('-', '_')}-0.1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    lines = []
    for group, entries in points.items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n")
    if module:
        (folder / "tiny_plugin.py").write_text(module)


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


USE = """
from dataclasses import replace
import torch
from spo.algorithms.rewards import reward_of
from spo.api import Model
from spo.attacks.prompts import Material, attack_of
from spo.config import load_config
from spo.engines.fake import WORDS, FakeEngine
from spo.records import Batch, Prompt, PromptKind, GenerateRequest, Sampling, ScoredRollout
from spo.stage2.learner import VectorLearner

config = load_config(None, [
    "estimate.method=medians", "learn.objective=best", "reward.also={short: -2}",
    "evaluate.attacks=[{kind: shout}]", "learn.learning_rate=0.2", "learn.kl_weight_harm=0",
    "learn.max_kl=10", "learn.max_grad_norm=100", "steering.coefficient=1",
])
engine = FakeEngine()
model = Model(engine)
rude = [f"rude {i}" for i in range(120)]
made = model.make_vector(rude, [f"kind {i}" for i in range(120)], method="medians")
units = made.vector.directions / made.vector.norms[:, None]
print("cosine", float((units @ engine.harm_direction).min()))

prompts = [Prompt(prompt_id=f"p{i}", text="x", kind=PromptKind.HARM) for i in range(16)]
def rudeness(vector, version):
    engine.publish("v", vector, version)
    spec = replace(made.spec("v", version), coefficient=1.0)
    groups = []
    for prompt in prompts:
        asked = [GenerateRequest(request_id=f"{prompt.prompt_id}/{k}", prompt=prompt,
                 sampling=Sampling(max_tokens=8, seed=k), steering=spec) for k in range(4)]
        answers = engine.generate(asked)
        groups.append(tuple(ScoredRollout(rollout=a, reward=reward_of(a, {"toxicity": sum(
            w in WORDS[4:] for w in a.text.split()) / 8}, config.reward)) for a in answers))
    parts = [item.reward.parts for group in groups for item in group]
    return sum(p["toxicity"] for p in parts) / len(parts), groups
start = made.vector * 0.01
learner = VectorLearner(engine, start, steering=config.steering, config=config.learn)
before, groups = rudeness(start, 0)
for step in range(12):
    learner.update(Batch(step=step, groups=tuple(groups)))
    after, groups = rudeness(learner.vector, step + 1)
first = groups[0][0]
print("rudeness", before, after)
print("reward", first.reward.parts["also short"] == 1 / (1 + len(first.rollout.text)))
print("attack", attack_of(config.evaluate.attacks[0].kind).rewrite(prompts, None)[0].text,
      config.evaluate.attacks[0].name)
from spo.algorithms.objectives import is_informative
print("gaps", is_informative([0.1, 0.3], config.learn), is_informative([0.1, 0.4], config.learn))
"""


def test_an_installed_package_adds_all_four_kinds(tmp_path: Path) -> None:
    install(tmp_path, "tiny-plugin", SOUND, MODULE)
    done = run(tmp_path, "-c", USE)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert float(said["cosine"]) > 0.95
    before, after = map(float, said["rudeness"].split())
    assert after < 0.8 * before
    assert said["reward"] == "True"
    assert said["attack"] == "X shout"
    assert said["gaps"] == "False True"


def test_facts_of_an_added_objective_are_heeded_and_a_job_takes_it(tmp_path: Path) -> None:
    install(tmp_path, "tiny-plugin", SOUND, MODULE)
    shown = run(tmp_path, "-m", "jobs.train", "--dry-run", "learn.objective=best")
    assert shown.returncode == 0, shown.stderr
    assert "objective: best" in shown.stdout
    refused = run(
        tmp_path, "-m", "jobs.train", "--dry-run", "learn.objective=best", "rollout.static=true"
    )
    assert refused.returncode == 1
    assert "set learn.objective to dpo, simpo, bipo or reps" in refused.stderr


BAD = {
    "no such module": ({"spo.objectives": {"best": "tiny_plugin_missing:BEST"}}, "does not load"),
    "no such attribute": ({"spo.objectives": {"best": "tiny_plugin:WORST"}}, "does not load"),
    "another form": ({"spo.objectives": {"best": "tiny_plugin:short"}}, "must be Objective"),
    "of no function": ({"spo.estimators": {"best": "tiny_plugin:BEST"}}, "must be a function"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_one_that_does_not_load_is_one_clear_error(tmp_path: Path, case: str) -> None:
    points, said = BAD[case]
    install(tmp_path, "tiny-plugin", points, MODULE)
    key = "estimate.method" if "spo.estimators" in points else "learn.objective"
    done = run(tmp_path, "-m", "jobs.train", "--dry-run", f"{key}=best")
    assert done.returncode == 1
    assert said in done.stderr
    assert "tiny-plugin" in done.stderr
    assert "Traceback" not in done.stderr
    untouched = run(tmp_path, "-m", "jobs.train", "--dry-run")
    assert untouched.returncode == 0, "one that nobody asks for harms nobody"


@pytest.mark.parametrize(
    ("first", "second", "owners"),
    [
        ("best", "best", {"tiny-plugin", "other-plugin"}),
        ("rloo", "best", {"tiny-plugin", "spo-vlm"}),
    ],
    ids=["two packages", "ours"],
)
def test_two_of_one_name_are_refused_whatever_is_chosen(
    tmp_path: Path, first: str, second: str, owners: set[str]
) -> None:
    install(tmp_path, "tiny-plugin", {"spo.objectives": {first: "tiny_plugin:BEST"}}, MODULE)
    install(tmp_path, "other-plugin", {"spo.objectives": {second: "tiny_plugin:BEST"}})
    done = run(tmp_path, "-m", "jobs.train", "--dry-run")
    assert done.returncode == 1
    assert "is there twice" in done.stderr
    assert "Traceback" not in done.stderr
    for owner in owners:
        assert owner in done.stderr


def test_an_unknown_name_is_refused_with_the_list(tmp_path: Path) -> None:
    install(tmp_path, "tiny-plugin", SOUND, MODULE)
    done = run(tmp_path, "-m", "jobs.train", "--dry-run", "learn.objective=ppo")
    assert done.returncode == 1
    assert "'rloo', 'gspo', 'best'], got 'ppo'" in done.stderr
