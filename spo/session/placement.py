"""Is there room? Roles of a job against the nodes of a cluster, before anything has to wait."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spo.config import (
    AttackConfig,
    EngineConfig,
    ExtractConfig,
    LearnConfig,
    PgdConfig,
    RewardConfig,
)
from spo.config.place import AttackPlace, PlaceConfig
from spo.errors import StageError

_SLACK = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """Processes of one kind that work at the same time."""

    name: str
    count: int
    cpus: float
    gpus: float
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels that its node must have."""
    setting: str
    """What to lower when there is no room."""

    @classmethod
    def of(
        cls,
        place: PlaceConfig,
        name: str,
        *,
        count: int,
        key: str,
        cpus: float = 1,
        counted: str = "",
    ) -> Role:
        """The role of `count` processes at one place.

        Args:
            place: where each of them runs.
            name: what they are.
            count: how many there are.
            key: section of the configuration that says where.
            cpus: of each.
            counted: setting behind their number; "" is `key`'s `replicas`.
        """
        return cls(
            name=name,
            count=count,
            cpus=cpus,
            gpus=place.gpus,
            labels=place.labels,
            setting=f"{counted or f'{key}.replicas'} or {key}.num_gpus",
        )

    def __str__(self) -> str:
        where = "".join(f", {key}={value}" for key, value in self.labels.items())
        return f"{self.count} x {self.name} ({self.cpus:g} CPU, {self.gpus:g} GPU{where})"


@dataclass(slots=True, kw_only=True)
class Room:
    """What one node offers."""

    node: str
    cpus: float
    gpus: float
    labels: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> Room:
        """From an entry of `ray.nodes()`."""
        return cls(
            node=node["NodeManagerHostname"],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
            labels=node.get("Labels") or {},
        )

    def __str__(self) -> str:
        role = self.labels.get("role")
        return (
            f"{self.node} ({self.cpus:g} CPU, {self.gpus:g} GPU{f', role={role}' if role else ''})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The slices of a configuration that say which processes it starts."""

    extract: ExtractConfig
    engine: EngineConfig
    reward: RewardConfig
    learn: LearnConfig
    attack: AttackPlace
    loop_attacks: Sequence[AttackConfig]
    """`data.attacks`."""
    attacks: Sequence[AttackConfig]
    """`evaluate.attacks`."""


def phases_of(config: Workload, stages: Sequence[str]) -> dict[str, list[Role]]:
    """Roles that work at the same time, for each of the stages "extract", "train", "evaluate"."""
    extract, engine, learn = config.extract, config.engine, config.learn
    engines = Role.of(engine, "engine", count=engine.replicas, key="engine")
    scorers = Role.of(config.reward, "scorer", count=config.reward.replicas, cpus=0.5, key="reward")
    learners = Role.of(
        learn, "learner", count=learn.workers, cpus=0.1, key="learn", counted="learn.workers"
    )
    readers = Role.of(PlaceConfig(), "reader", count=1, key="extract", counted="extract.workers")

    def attacks(where: str, listed: Sequence[AttackConfig]) -> Role:
        return Role.of(
            config.attack.beside(learn),
            "picture attack",
            count=min(1, sum(isinstance(attack, PgdConfig) for attack in listed)),
            key="learn" if config.attack.num_gpus is None else "attack",
            counted=f"{where}.attacks",
        )

    known = {
        "extract": [
            Role.of(
                extract,
                "extraction worker",
                count=extract.workers,
                key="extract",
                counted="extract.workers",
            ),
            readers,
        ],
        "train": [engines, scorers, learners, attacks("data", config.loop_attacks)],
        "evaluate": [
            engines,
            attacks("evaluate", config.attacks),
            *([scorers] if "train" in stages else []),
        ],
    }
    return {stage: known[stage] for stage in stages}


def place(roles: Sequence[Role], rooms: Sequence[Room]) -> tuple[list[str], list[str]]:
    """First fit, largest first: lines of the plan, and lines of what found no room."""
    left = [Room(node=r.node, cpus=r.cpus, gpus=r.gpus, labels=r.labels) for r in rooms]
    plan, missing = [], []
    for role in sorted(roles, key=lambda role: (role.gpus, role.cpus), reverse=True):
        placed: dict[str, int] = {}
        for _ in range(role.count):
            room = next((room for room in left if _fits(role, room)), None)
            if room is None:
                break
            room.cpus -= role.cpus
            room.gpus -= role.gpus
            placed[room.node] = placed.get(room.node, 0) + 1
        plan += [f"{n} x {role.name} on {node}" for node, n in placed.items()]
        lacking = role.count - sum(placed.values())
        if lacking:
            missing.append(f"no room for {lacking} of {role}: lower {role.setting}")
    return plan, missing


def _fits(role: Role, room: Room) -> bool:
    labelled = all(room.labels.get(key) == value for key, value in role.labels.items())
    return labelled and role.cpus <= room.cpus + _SLACK and role.gpus <= room.gpus + _SLACK


def check_room(phases: Mapping[str, Sequence[Role]], rooms: Sequence[Room]) -> dict[str, list[str]]:
    """The plan of each phase.

    Raises:
        StageError: a phase does not fit; holds the plan, the nodes and what is missing.
    """
    plans = {}
    for stage, roles in phases.items():
        plan, missing = place(roles, rooms)
        if missing:
            lines = [
                f"the cluster has no room for {stage}, and would wait for it without end:",
                *(f"  needs   {role}" for role in roles),
                *(f"  node    {room}" for room in rooms),
                *(f"  plan    {line}" for line in plan),
                *(f"  missing {line}, or add nodes" for line in missing),
            ]
            if not rooms:
                lines.append("  the cluster has no living node")
            raise StageError("\n".join(lines))
        plans[stage] = plan
    return plans


def bundles_of(
    phases: Mapping[str, Sequence[Role]],
) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
    """Resources and labels of every process, stage by stage, as the autoscaler wants them."""
    roles = [role for stage in phases.values() for role in stage for _ in range(role.count)]
    resources = [{"CPU": role.cpus} | ({"GPU": role.gpus} if role.gpus else {}) for role in roles]
    return resources, [dict(role.labels) for role in roles]
