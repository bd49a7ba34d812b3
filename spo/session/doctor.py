"""What is wrong with an installation, a cluster or a configuration, and how to mend it.

`examine` judges facts and touches nothing; `jobs/doctor.py` gathers the facts. Each finding names a
check, what was found, and the mend.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from spo.errors import StageError
from spo.session.nodes import NO_PLUGIN, Answers, NodeFacts, Question, differences
from spo.session.placement import Room, Workload, check_room, phases_of

STAGES = ("extract", "train", "evaluate")
_MIN_SHARED_GIB = 1.0
_MIN_FREE_GIB = 5.0
_BASE_MEMORY_GIB = 4.0


class State(StrEnum):
    """How bad a finding is."""

    GOOD = "good"
    WARNING = "warning"
    """It can work, but look at it."""
    PROBLEM = "problem"
    """A job would fail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of one check."""

    check: str
    state: State
    found: str
    mend: str = ""
    """What to do; empty when it is good."""


def good(check: str, found: str) -> Finding:
    """A check that passed."""
    return Finding(check=check, state=State.GOOD, found=found)


def problem(check: str, found: str, mend: str) -> Finding:
    """A check that failed."""
    return Finding(check=check, state=State.PROBLEM, found=found, mend=mend)


def warning(check: str, found: str, mend: str) -> Finding:
    """A check that passed, but barely."""
    return Finding(check=check, state=State.WARNING, found=found, mend=mend)


def examine(
    config: Workload,
    question: Question,
    here: NodeFacts,
    answers: Answers,
    rooms: Sequence[Room],
) -> list[Finding]:
    """Judge the facts of this process's machine and of the nodes of the cluster.

    Args:
        config: the run that is to work.
        question: what the nodes were asked.
        here: facts of the driver.
        answers: what the nodes said.
        rooms: what Ray says each node offers.
    """
    others = answers.facts
    silent = {**answers.failed, **dict.fromkeys(answers.late, "no answer in time")}
    findings = [
        problem(
            "nodes",
            f"{node}: {reason}",
            "see that node's log (`ray logs cluster`), and that its image has spo-vlm installed",
        )
        for node, reason in silent.items()
    ]
    findings += _versions(here, others)
    for facts in others or [here]:
        findings += _engine(config, facts)
        findings += _gpus(config, facts)
        findings += _memory(config, facts)
        findings += _places(question, facts, alone=len(others) <= 1)
    return [*findings, *_room(config, rooms)]


def _versions(here: NodeFacts, others: Sequence[NodeFacts]) -> list[Finding]:
    mend = "use one image, the same on head and workers, and the same versions where jobs start"
    wrong = [
        problem("versions", f"{facts.node}: {line}", mend)
        for facts in others
        for line in differences(here, facts)
    ]
    ours = ", ".join(f"{name} {value}" for name, value in here.versions.items() if value)
    return wrong or [good("versions", f"python {here.python}, {ours}, vllm {here.engine or '-'}")]


def _engine(config: Workload, facts: NodeFacts) -> list[Finding]:
    if config.engine.backend != "vllm":
        return []
    if not facts.engine or not facts.plugin:
        return [
            problem(
                "steering plugin",
                f"{facts.node}: {NO_PLUGIN}",
                "in the image: uv pip install 'spo-vlm[gpu]' (or [cpu]); cluster/Dockerfile does",
            )
        ]
    if facts.plugin_error:
        return [
            problem(
                "steering plugin",
                f"{facts.node}: it cannot hook into vLLM {facts.engine}: {facts.plugin_error}",
                "install vllm==0.32.*; then python -m spo.engines.vllm.self_test MODEL",
            )
        ]
    return [good("steering plugin", f"{facts.node}: hooks into vLLM {facts.engine}")]


def _gpus(config: Workload, facts: NodeFacts) -> list[Finding]:
    if facts.reported_gpus > len(facts.gpus):
        return [
            problem(
                "GPUs",
                f"{facts.node}: Ray was told of {facts.reported_gpus:g}, the driver shows "
                f"{len(facts.gpus)}",
                "give the container its GPUs (nvidia.com/gpu limits, --gpus all) and look at "
                "nvidia-smi, or start the node with the true --num-gpus",
            )
        ]
    wants = config.engine.gpus or config.extract.gpus or config.learn.gpus
    if facts.gpus and not wants:
        return [
            warning(
                "GPUs",
                f"{facts.node}: {len(facts.gpus)} x {facts.gpus[0]}, and no role uses one",
                "set engine.num_gpus=1 extract.num_gpus=1 learn.use_gpu=true",
            )
        ]
    return [good("GPUs", f"{facts.node}: {', '.join(facts.gpus) or 'none'}")]


def _memory(config: Workload, facts: NodeFacts) -> list[Finding]:
    findings = []
    needed = _BASE_MEMORY_GIB + (0.0 if config.engine.gpus else config.engine.memory_gib)
    if facts.memory_gib < needed:
        findings.append(
            problem(
                "memory",
                f"{facts.node}: {facts.memory_gib:.1f} GiB, the roles need about {needed:.0f}",
                "raise the container's memory limit, or lower engine.memory_gib",
            )
        )
    if facts.shared_memory_gib < _MIN_SHARED_GIB:
        findings.append(
            problem(
                "memory",
                f"{facts.node}: {facts.shared_memory_gib:.2f} GiB free in /dev/shm; Ray would keep "
                "its objects on disk, and NCCL fail",
                "docker run --shm-size=8g; in Kubernetes an emptyDir with medium: Memory there",
            )
        )
    return findings or [good("memory", f"{facts.node}: {facts.memory_gib:.0f} GiB")]


def _places(question: Question, facts: NodeFacts, *, alone: bool) -> list[Finding]:
    """Storage, cache, models and files as this node sees them."""
    found = []
    if facts.storage_error:
        found.append(
            problem(
                "storage",
                f"{facts.node}: {facts.storage_error}",
                "mount the same volume on every node, or set output_dir=s3://bucket/prefix and "
                "give every node the AWS_ variables",
            )
        )
    if facts.cache_error:
        found.append(
            problem(
                "cache", f"{facts.node}: {facts.cache_error}", "set cache_dir to a writable folder"
            )
        )
    elif not facts.sees_marker and not alone:
        found.append(
            problem(
                "cache",
                f"{facts.node}: {question.cache} is another folder there than here, so it lacks "
                "the pictures and the embedded models, which travel as paths",
                "put cache_dir on a volume that all nodes mount (ReadWriteMany)",
            )
        )
    elif facts.cache_free_gib < _MIN_FREE_GIB:
        found.append(
            warning(
                "cache",
                f"{facts.node}: {facts.cache_free_gib:.1f} GiB free at {question.cache}",
                "free space, or set cache_dir and HF_HOME to a larger volume",
            )
        )
    mend = "mount it at the same path on every node, or correct the setting"
    found += [problem("files", f"{facts.node}: {p} is missing", mend) for p in facts.missing_paths]
    found += [
        problem(
            "model",
            f"{facts.node}: {name} is not in the hub cache, and HF_HUB_OFFLINE is set",
            f"download it once into the shared HF_HOME (`hf download {name}`), or set model.id "
            "to a folder",
        )
        for name in facts.missing_models
    ]
    return found or [good("storage and files", f"{facts.node}: {question.storage} is writable")]


def _room(config: Workload, rooms: Sequence[Room]) -> list[Finding]:
    try:
        plans = check_room(phases_of(config, STAGES), rooms)
    except StageError as error:
        return [
            problem("room", str(error), "add nodes or lower what it names (ray.node_wait_s: wait)")
        ]
    return [good("room", f"{stage}: {', '.join(plan)}") for stage, plan in plans.items()]


def worst(findings: Iterable[Finding]) -> State:
    """The worst state among the findings."""
    order = [State.GOOD, State.WARNING, State.PROBLEM]
    return max((finding.state for finding in findings), key=order.index, default=State.GOOD)
