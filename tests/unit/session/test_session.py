"""Is there room, do nodes fit, what does the doctor say: facts in, findings out, no cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from jobs.command import workload
from jobs.doctor import question_of
from spo.config import RunConfig, load_config
from spo.errors import StageError
from spo.session.doctor import Finding, State, examine, worst
from spo.session.nodes import Answers, NodeFacts, Question, ask_here, check_nodes, marker_in
from spo.session.placement import Role, Room, bundles_of, check_room, phases_of, place

VERSIONS = {"ray": "2.60.0", "torch": "2.13.0", "transformers": "5.19.0", "spo-vlm": "0.1.0"}
WELL = NodeFacts(
    node="gpu-1",
    python="3.11.7",
    versions=VERSIONS,
    engine="0.32.0",
    plugin=True,
    reported_gpus=1.0,
    gpus=("NVIDIA H200, 143771 MiB",),
    memory_gib=256.0,
    shared_memory_gib=8.0,
    cache_free_gib=500.0,
)
ROOM = Room(node="gpu-1", cpus=8, gpus=1)
ON_GPU = ["engine.num_gpus=0.5", "learn.use_gpu=true", "learn.num_gpus=0.5", "extract.num_gpus=1"]


def change(**facts: object) -> NodeFacts:
    return dataclasses.replace(WELL, **facts)  # type: ignore[arg-type]


def said(*facts: NodeFacts, late: tuple[str, ...] = (), **failed: str) -> Answers:
    return Answers(facts=facts, failed=failed, late=late)


def examined(config: RunConfig, answers: Answers, rooms: Sequence[Room]) -> list[Finding]:
    return examine(workload(config), question_of(config, ""), WELL, answers, rooms)


def problems(
    config: RunConfig, *facts: NodeFacts, rooms: tuple[Room, ...] = (ROOM,)
) -> list[Finding]:
    found = examined(config, said(*facts), rooms)
    return [finding for finding in found if finding.state is State.PROBLEM]


def test_a_well_cluster_has_no_problem() -> None:
    config = load_config(None, ON_GPU)
    assert problems(config, WELL, change(node="gpu-2")) == []
    assert worst(examined(config, said(WELL), [ROOM])) is State.GOOD


@pytest.mark.parametrize(
    ("facts", "check", "words"),
    [
        (change(versions=VERSIONS | {"ray": "2.59.0"}), "versions", "ray is 2.59.0"),
        (change(python="3.12.1"), "versions", "python is 3.12, this job has 3.11"),
        (change(versions=VERSIONS | {"spo-vlm": ""}), "versions", "spo-vlm is not installed"),
        (change(engine="0.30.0"), "versions", "vllm is 0.30.0"),
        (change(plugin=False), "steering plugin", "not registered"),
        (change(plugin_error="no WorkerWrapperBase"), "steering plugin", "cannot hook into vLLM"),
        (change(gpus=()), "GPUs", "Ray was told of 1, the driver shows 0"),
        (change(memory_gib=2.0), "memory", "2.0 GiB, the roles need about 4"),
        (change(shared_memory_gib=0.06), "memory", "0.06 GiB free in /dev/shm"),
        (change(storage_error="storage s3://b cannot be written"), "storage", "cannot be written"),
        (change(cache_error="read-only"), "cache", "read-only"),
        (change(sees_marker=False), "cache", "another folder there than here"),
        (change(missing_paths=("/models/x",)), "files", "/models/x is missing"),
        (change(missing_models=("org/model",)), "model", "org/model is not in the hub cache"),
    ],
)
def test_a_planted_fault_is_found_alone_and_has_a_mend(
    facts: NodeFacts, check: str, words: str
) -> None:
    config = load_config(None, ON_GPU)
    (finding,) = problems(config, facts, change(node="gpu-2"))
    assert finding.check == check
    assert words in finding.found
    assert "gpu-1" in finding.found
    assert finding.mend


def test_a_silent_node_and_missing_room_are_problems() -> None:
    config = load_config(None, ["engine.num_gpus=2"])
    found = examine(
        workload(config), question_of(config, ""), WELL, said(WELL, late=("gpu-9",)), [ROOM]
    )
    bad = {finding.check: finding for finding in found if finding.state is State.PROBLEM}
    assert bad.keys() == {"nodes", "room"}
    assert "gpu-9: no answer in time" in bad["nodes"].found
    assert "lower engine.replicas or engine.num_gpus" in bad["room"].found


def test_a_card_that_nobody_uses_is_worth_a_look() -> None:
    found = examined(RunConfig(), said(WELL), [ROOM])
    (finding,) = [finding for finding in found if finding.state is State.WARNING]
    assert finding.mend == "set engine.num_gpus=1 extract.num_gpus=1 learn.use_gpu=true"


def test_what_the_nodes_are_asked_for() -> None:
    config = load_config(
        None,
        [
            "model.id=org/model",
            "data.train=/data/train.jsonl",
            "reward.toxicity_model=original",
            "evaluate.judge=./judge",
            "extract.calibration=benign.jsonl",
            "output_dir=s3://bucket/runs",
        ],
    )
    question = question_of(config, "/cache/.probe")
    assert question.hub_models == ("org/model",)
    assert question.paths == ("./judge", "/data/train.jsonl", "benign.jsonl")
    assert question.storage == "s3://bucket/runs/testbed"
    local = question_of(load_config(None, ["model.id=/models/llava"]), "")
    assert local.hub_models == ()
    assert local.paths == ("/models/llava",)


def test_this_machine_answers_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "file").touch()
    with marker_in(tmp_path / "cache") as marker:
        facts = ask_here(
            Question(
                cache=str(tmp_path / "cache"),
                marker=marker,
                storage=str(tmp_path / "file" / "run"),
                paths=(str(tmp_path), str(tmp_path / "gone")),
                hub_models=("org/model",),
            ),
            "here",
            0.0,
        )
        assert facts.sees_marker
    assert not Path(marker).exists()
    assert facts.plugin
    assert facts.versions["ray"]
    assert facts.cache_error == ""
    assert "cannot be written" in facts.storage_error
    assert facts.missing_paths == (str(tmp_path / "gone"),)
    assert facts.missing_models == ("org/model",)
    assert facts.memory_gib > 0
    assert not ask_here(Question(marker=marker), "here", 0.0).sees_marker


def test_nodes_that_do_not_fit_are_named() -> None:
    patch = change(node="gpu-2", python="3.11.9")
    check_nodes(WELL, said(WELL, patch, late=("busy",)), needs_plugin=True)
    check_nodes(WELL, said(change(plugin=False)), needs_plugin=False)
    bad = [
        change(node="a", versions=VERSIONS | {"torch": "2.11.0"}),
        change(node="b", plugin=False),
        change(node="c", sees_marker=False),
    ]
    with pytest.raises(StageError) as caught:
        check_nodes(WELL, said(*bad, d="No module named 'spo'"), needs_plugin=True)
    text = str(caught.value)
    for words in (
        "a: torch is 2.11.0, this job has 2.13.0",
        "b: vLLM is not installed, or the steering plugin is not registered",
        "c: it does not see the run folder",
        "d: No module named 'spo'",
        "jobs.doctor",
    ):
        assert words in text


def role(**changes: object) -> Role:
    made = Role(name="engine", count=1, cpus=1, gpus=0, setting="engine.replicas")
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def test_roles_share_cards_but_not_more_than_there_are() -> None:
    halves = [role(count=2, gpus=0.5), role(name="learner", gpus=0.5, setting="learn.num_gpus")]
    plan, missing = place(halves, [Room(node="a", cpus=8, gpus=1)])
    assert plan == ["2 x engine on a"]
    assert missing == ["no room for 1 of 1 x learner (1 CPU, 0.5 GPU): lower learn.num_gpus"]
    plan, missing = place(halves, [Room(node="a", cpus=8, gpus=1), Room(node="b", cpus=2, gpus=1)])
    assert missing == []
    assert plan == ["2 x engine on a", "1 x learner on b"]


def test_a_whole_card_is_not_made_of_two_halves() -> None:
    rooms = [Room(node="a", cpus=8, gpus=0.5), Room(node="b", cpus=8, gpus=0.5)]
    assert place([role(gpus=1)], rooms)[1]


def test_labels_are_kept() -> None:
    labelled = role(labels={"role": "rollout"})
    assert place([labelled], [Room(node="a", cpus=8, gpus=0, labels={"role": "learner"})])[1]
    assert not place([labelled], [Room(node="a", cpus=8, gpus=0, labels={"role": "rollout"})])[1]


def test_the_refusal_holds_the_plan_the_nodes_and_what_is_missing() -> None:
    config = load_config(None, ["engine.replicas=3", "extract.workers=9"])
    rooms = [Room(node="small", cpus=2, gpus=0)]
    with pytest.raises(StageError) as caught:
        check_room(phases_of(workload(config), ("train",)), rooms)
    text = str(caught.value)
    assert "needs   3 x engine (1 CPU, 0 GPU)" in text
    assert "node    small (2 CPU, 0 GPU)" in text
    assert "plan    2 x engine on small" in text
    assert "missing no room for 1 of 3 x engine" in text
    with pytest.raises(StageError, match="no room for extract"):
        check_room(phases_of(workload(config), ("extract",)), rooms)
    with pytest.raises(StageError, match="no living node"):
        check_room(phases_of(workload(config), ("train",)), [])


def test_the_autoscaler_is_asked_for_every_process() -> None:
    config = load_config(
        None, ["engine.replicas=2", "engine.num_gpus=1", "engine.labels={role: r}"]
    )
    resources, labels = bundles_of(phases_of(workload(config), ("evaluate",)))
    assert resources == [{"CPU": 1, "GPU": 1.0}, {"CPU": 1, "GPU": 1.0}, {"CPU": 1}]
    assert labels == [{"role": "r"}, {"role": "r"}, {}]
    together, _ = bundles_of(phases_of(workload(config), ("train", "evaluate")))
    assert {"CPU": 0.5} in together
