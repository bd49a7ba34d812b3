"""What other packages add by entry point: estimators, objectives, rewards and attacks.

A package names what it adds, and installing it is all that is needed:

    [project.entry-points."spo.objectives"]
    mine = "my_package:MINE"

Names are read without importing anything, so the configuration can refuse an unknown one on a
laptop without torch; the module behind a name is imported when that name is asked for. What is
added has the form of the built-in ones: see the dict that `HOMES` names for each group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import FunctionType
from typing import Any

from spo.errors import ConfigError

ESTIMATORS, OBJECTIVES = "spo.estimators", "spo.objectives"
REWARDS, ATTACKS = "spo.rewards", "spo.attacks"
HOMES = {
    ESTIMATORS: "spo.algorithms.estimators:ESTIMATORS",
    OBJECTIVES: "spo.algorithms.objectives:OBJECTIVES",
    REWARDS: "spo.algorithms.rewards:REWARDS",
    ATTACKS: "spo.attacks.prompts:ATTACKS",
}
"""Where the built-in ones of each group are, a dict by name; written as entry points are."""
_OURSELVES = "spo-vlm"


def built_in(group: str) -> Mapping[str, Any]:
    """What this project has itself."""
    module, _, attribute = HOMES[group].partition(":")
    found: Mapping[str, Any] = getattr(import_module(module), attribute)
    return found


def names(group: str) -> tuple[str, ...]:
    """Every name that the configuration accepts, built-in ones first.

    Raises:
        ConfigError: two distributions use one name.
    """
    return (*built_in(group), *sorted(_added(group)))


def find(group: str, name: str) -> Any:
    """What a name stands for.

    Raises:
        ConfigError: the name is unknown or used twice, or what another package put under it does
            not load or has another form than the built-in ones.
    """
    own, added = built_in(group), _added(group)
    if name in own:
        return own[name]
    if name not in added:
        kind = group.removeprefix("spo.")
        raise ConfigError(
            f"expected one of the {kind} {list(names(group))}, got {name!r}; install the package "
            f"that adds it as an entry point of group {group!r}, or choose one of these"
        )
    return _loaded(group, added[name], next(iter(own.values())))


def checked(group: str) -> Callable[[str], str]:
    """A pydantic validator: the name of something that is there and loads."""

    def check(name: str) -> str:
        find(group, name)
        return name

    return check


@cache
def _added(group: str) -> Mapping[str, EntryPoint]:
    """Entry points of a group by name; an installation does not change while a process runs."""
    owners = dict.fromkeys(built_in(group), _OURSELVES)
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        owner = _owner(point)
        if point.name in owners:
            raise ConfigError(
                f"{group} {point.name!r} is there twice: from {owners[point.name]} and from "
                f"{owner}; uninstall one of the two, or rename it in its pyproject.toml"
            )
        owners[point.name] = owner
        found[point.name] = point
    return found


def _loaded(group: str, point: EntryPoint, example: object) -> Any:
    where = f"{group} {point.name!r} of {_owner(point)} ({point.value})"
    try:
        found = point.load()
    except Exception as error:
        raise ConfigError(
            f"{where} does not load: {type(error).__name__}: {error}; mend or uninstall that "
            "package"
        ) from error
    fits = callable(found) if isinstance(example, FunctionType) else type(found) is type(example)
    if not fits:
        wanted = "a function" if isinstance(example, FunctionType) else type(example).__name__
        raise ConfigError(
            f"{where} must be {wanted} like those of {HOMES[group]}, got {type(found).__name__}"
        )
    return found


def _owner(point: EntryPoint) -> str:
    return "an unknown distribution" if point.dist is None else str(point.dist.name)
