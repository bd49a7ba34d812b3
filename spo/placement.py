"""What will run where, checked against the cluster before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from spo.config import RunConfig
from spo.errors import StageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """One kind of process of Stage II."""

    name: str
    count: int
    cpus: float
    gpus: float
    """Share of a card that each takes."""
    memory: str
    """What keeps it within its share."""


def plan(config: RunConfig) -> tuple[Role, ...]:
    """The processes that a configuration asks for."""
    learn, engine, reward = config.learn, config.engine, config.reward
    cache = (
        f"{engine.gpu_memory_utilization:.0%} of a card"
        if engine.num_gpus
        else f"{engine.memory_gib:g} GiB cache"
    )
    return (
        Role(name="engine", count=engine.replicas, cpus=1, gpus=engine.num_gpus, memory=cache),
        Role(name="scorer", count=reward.replicas, cpus=0.5, gpus=reward.num_gpus, memory="model"),
        Role(
            name="learner",
            count=learn.min_workers or learn.workers,
            cpus=0.1,
            gpus=learn.num_gpus if learn.use_gpu else 0.0,
            memory=f"model and {learn.micro_batch} answers",
        ),
    )


def check(
    roles: tuple[Role, ...], cluster: Mapping[str, float], nodes: list[Mapping[str, float]]
) -> str:
    """The plan as a table.

    Args:
        roles: what is to run.
        cluster: resources of the whole cluster, as Ray counts them.
        nodes: resources of each node.

    Raises:
        StageError: it does not fit; says what is asked for, what there is, and what to change.
    """
    table = "\n".join(
        f"  {r.name:<8} {r.count} x ({r.cpus:g} CPU, {r.gpus:g} GPU, {r.memory})" for r in roles
    )
    problems = []
    for resource, asked in (
        ("CPU", sum(role.count * role.cpus for role in roles)),
        ("GPU", sum(role.count * role.gpus for role in roles)),
    ):
        there = cluster.get(resource, 0.0)
        if asked > there:
            problems.append(f"{asked:g} {resource} are asked for and the cluster has {there:g}")
    for role in roles:
        if not any(
            node.get("CPU", 0.0) >= role.cpus and node.get("GPU", 0.0) >= role.gpus
            for node in nodes
        ):
            problems.append(
                f"no node has the {role.cpus:g} CPU and {role.gpus:g} GPU of one {role.name}"
            )
    if not problems and not _cards_fit(roles, sum(node.get("GPU", 0.0) for node in nodes)):
        problems.append("the shares of a card do not pack into the cards that there are")
    if problems:
        raise StageError(
            "this does not fit the cluster: " + "; ".join(problems) + f".\n{table}\n"
            "Add nodes, or lower engine.replicas, engine.num_gpus, learn.workers, learn.num_gpus "
            "or reward.replicas"
        )
    return table


def _cards_fit(roles: tuple[Role, ...], cards: float) -> bool:
    """First-fit decreasing of the shares; Ray puts a share on one card, and whole cards apart."""
    free = [1.0] * int(cards)
    for share in sorted((r.gpus for r in roles for _ in range(r.count) if r.gpus), reverse=True):
        for _ in range(max(1, round(share))):
            part = min(share, 1.0)
            place = next((i for i, left in enumerate(free) if left >= part - 1e-9), None)
            if place is None:
                return False
            free[place] -= part
    return True
