"""The search space: from dimensions in a file to values, and from values to a run configuration.

`Space.assign` walks the dimensions in order and asks a chooser for each value. An Optuna trial is a
chooser; so are the ones here that enumerate a grid, visit the corners of the space, and replay a
point that a person wrote down. Optuna and TensorBoard want scalars, so a window is two integers
(`estimate.layers:first`, `:width`), a subset one switch a block, and a list among choices its text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from spo.config import RunConfig
from spo.config.load import validated
from spo.errors import ConfigError
from spo.sweep.settings import Parameter, Scalar, parse_layers

LAYERS = "estimate.layers"
# What a trial may change without an engine or an extraction of its own.
_SECTIONS = {"estimate", "steering", "learn", "rollout", "reward"}
TRAINING = {"learn", "rollout", "reward"}
"""Sections whose keys only matter to trials that train."""
_POOL_KEYS = {
    "reward.toxicity_model",
    "reward.alignment_model",
    "reward.replicas",
    "reward.timeout_s",
    "learn.workers",
    "learn.use_gpu",
    "learn.num_gpus",
    "learn.tensor_parallel_size",
    "learn.max_failures",
}
_CORNERS = 600


class Chooser(Protocol):
    """What picks values; the part of `optuna.Trial` that is used here."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1) -> int: ...


class Space:
    """Dimensions over a base configuration.

    Args:
        parameters: configuration key to dimension, in order.
        base: what every value that is not searched is taken from.
        num_layers: decoder blocks of the model.
        check: False where the same space was checked before, in another process.

    Raises:
        ConfigError: a key cannot be searched, a condition cannot hold, a block is outside the
            model, or values of the space contradict each other or the configuration's rules.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        base: RunConfig,
        *,
        num_layers: int,
        check: bool = True,
    ) -> None:
        self.parameters = dict(parameters)
        self.num_layers = num_layers
        self._base = base
        self._tree = base.model_dump(mode="json")
        if not check:
            return
        for key, parameter in self.parameters.items():
            self._check_key(key)
            self._check_blocks(key, parameter)
            self._check_condition(key, parameter)
        for point in self._enumerate(ends_only=True, limit=_CORNERS):
            self.config(point)

    @property
    def trains(self) -> bool:
        """Whether a key only matters to trials that train."""
        return any(key.split(".")[0] in TRAINING for key in self.parameters)

    def assign(self, chooser: Chooser) -> dict[str, Scalar]:
        """Scalar values of every dimension that applies, by name."""
        values: dict[str, Scalar] = {}
        for key, parameter in self.parameters.items():
            if all(_meets(values.get(other), wanted) for other, wanted in parameter.when.items()):
                values.update(_choose(key, parameter, chooser))
        return values

    def config(self, values: Mapping[str, Scalar]) -> RunConfig:
        """The run configuration of a point; ConfigError when its values contradict each other."""
        tree = json.loads(json.dumps(self._tree))
        for key, value in self.settings(values).items():
            _set(tree, key, value)
        try:
            return validated(RunConfig, tree, None)
        except ConfigError as error:
            raise ConfigError(f"the space holds a point that cannot run, {values}: {error}") from (
                error
            )

    def settings(self, values: Mapping[str, Scalar]) -> dict[str, Any]:
        """Configuration key to value of a point."""
        settings: dict[str, Any] = {}
        for key, parameter in self.parameters.items():
            if parameter.window is not None and f"{key}:first" in values:
                first, width = int(values[f"{key}:first"]), int(values[f"{key}:width"])
                settings[key] = list(range(first, first + width))
            elif parameter.subset is not None:
                blocks = parse_layers(parameter.subset.of)
                chosen = [layer for layer in blocks if values.get(f"{key}:{layer}")]
                if chosen:
                    settings[key] = chosen
                elif f"{key}:{blocks[0]}" in values:
                    settings[key] = [blocks[len(blocks) // 2]]  # an empty set steers nothing
            elif key in values:
                value = _decoded(parameter, values[key])
                settings[key] = list(parse_layers(value)) if _is_layer_set(key, value) else value
        return settings

    def point(self, settings: Mapping[str, Any]) -> dict[str, Scalar]:
        """A point that a person wrote down, as scalar values.

        Raises:
            ConfigError: a key is missing or not searched, or a value lies outside the space.
        """
        unknown = sorted(set(settings) - set(self.parameters))
        if unknown:
            raise ConfigError(
                f"a point to evaluate first names {unknown}, which the space does not search; it "
                f"has {sorted(self.parameters)}"
            )
        values = self.assign(_Written(settings, self.parameters))
        self.config(values)
        return values

    def grid(self, limit: int = 10_000) -> list[dict[str, Scalar]]:
        """Every point of a grid; ConfigError when there are more than `limit`."""
        points = list(self._enumerate(ends_only=False, limit=limit + 1))
        if len(points) > limit:
            raise ConfigError(
                f"the grid has more than {limit} points; lower `grid` of a range, give it a "
                "`step`, or search with tpe"
            )
        return points

    def _enumerate(self, *, ends_only: bool, limit: int) -> Iterator[dict[str, Scalar]]:
        path: list[int] = []
        for _ in range(limit):
            walker = _Walker(path, self.parameters, ends_only=ends_only)
            yield self.assign(walker)
            path = walker.next_path()
            if not path:
                return

    def _check_key(self, key: str) -> None:
        section = key.split(".")[0]
        source_weight = key.startswith("extract.sources.") and key.endswith(".weight")
        parts = key.startswith("reward.parts") and not key.endswith(".weight")
        if key in _POOL_KEYS or parts or (section not in _SECTIONS and not source_weight):
            raise ConfigError(
                f"{key} cannot be searched: trials share engines, reward models and activations. "
                f"Keys of {', '.join(sorted(_SECTIONS))} and extract.sources.NAME.weight can, "
                f"except {', '.join(sorted(_POOL_KEYS))}, and of reward.parts.NAME only the weight"
            )
        _set(json.loads(json.dumps(self._tree)), key, None)

    def _check_blocks(self, key: str, parameter: Parameter) -> None:
        sets: list[tuple[int, ...]] = []
        if parameter.window is not None:
            sets.append((parameter.window.first[0],))
            sets.append((parameter.window.first[1] + parameter.window.width[1] - 1,))
        if parameter.subset is not None:
            sets.append(parse_layers(parameter.subset.of))
        if (parameter.window or parameter.subset) and key != LAYERS:
            raise ConfigError(f"{key}: window and subset choose decoder blocks, use {LAYERS}")
        if key == LAYERS and parameter.choices:
            sets += [parse_layers(c) for c in parameter.choices if _is_layer_set(key, c)]
        named = {layer for one in sets for layer in one}
        outside = sorted(layer for layer in named if not 0 <= layer < self.num_layers)
        if outside:
            raise ConfigError(
                f"{key} reaches blocks {outside}, the model has blocks 0..{self.num_layers - 1}; "
                "narrow the space"
            )

    def _check_condition(self, key: str, parameter: Parameter) -> None:
        earlier = list(self.parameters)[: list(self.parameters).index(key)]
        for other, wanted in parameter.when.items():
            if other not in earlier:
                raise ConfigError(
                    f"{key}: 'when' names {other!r}, which is not a dimension above it; above it "
                    f"are {earlier}"
                )
            choices = self.parameters[other].choices
            wants = wanted if isinstance(wanted, tuple) else (wanted,)
            if choices is not None and not set(map(str, wants)) & set(map(str, choices)):
                raise ConfigError(
                    f"{key} can never apply: it wants {other} in {list(wants)}, which takes only "
                    f"{list(choices)}"
                )


def _choose(key: str, parameter: Parameter, chooser: Chooser) -> dict[str, Scalar]:
    if parameter.choices is not None:
        return {key: chooser.suggest_categorical(key, [_encoded(c) for c in parameter.choices])}
    if parameter.uniform is not None:
        return {key: chooser.suggest_float(key, *parameter.uniform, step=parameter.step)}
    if parameter.loguniform is not None:
        return {key: chooser.suggest_float(key, *parameter.loguniform, log=True)}
    if parameter.integer is not None:
        step = int(parameter.step or 1)
        return {key: chooser.suggest_int(key, *parameter.integer, step=step)}
    if parameter.window is not None:
        window = parameter.window
        low, high = window.first
        high = low + (high - low) // window.step * window.step
        return {
            f"{key}:first": chooser.suggest_int(f"{key}:first", low, high, step=window.step),
            f"{key}:width": chooser.suggest_int(f"{key}:width", *window.width),
        }
    assert parameter.subset is not None
    values: dict[str, Scalar] = {}
    room = parameter.subset.at_most or math.inf
    for layer in parse_layers(parameter.subset.of):
        chosen = room > 0 and chooser.suggest_categorical(f"{key}:{layer}", [False, True])
        values[f"{key}:{layer}"] = chosen
        room -= bool(chosen)
    return values


class _Walker:
    """A chooser that enumerates: takes the option at each place of a path, the first beyond it."""

    def __init__(
        self, path: list[int], parameters: Mapping[str, Parameter], *, ends_only: bool
    ) -> None:
        self._path = path
        self._parameters = parameters
        self._ends_only = ends_only
        self._taken: list[tuple[int, int]] = []

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._take(list(choices))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        count = 2 if self._ends_only else self._parameters[name].grid
        if step and not self._ends_only:
            count = int((high - low) / step + 1e-9) + 1
            return float(self._take([low + i * step for i in range(count)]))
        shares = [i / (count - 1) for i in range(count)]
        if log:
            return float(self._take([low * (high / low) ** share for share in shares]))
        return float(self._take([low + (high - low) * share for share in shares]))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1) -> int:
        every = list(range(low, high + 1, step))
        return int(self._take([every[0], every[-1]] if self._ends_only else every))

    def _take(self, options: list[Any]) -> Any:
        options = list(dict.fromkeys(options))
        place = len(self._taken)
        index = self._path[place] if place < len(self._path) else 0
        self._taken.append((index, len(options)))
        return options[index]

    def next_path(self) -> list[int]:
        """The path after this one in order; empty after the last."""
        taken = list(self._taken)
        while taken and taken[-1][0] == taken[-1][1] - 1:
            taken.pop()
        return [index for index, _ in taken[:-1]] + [taken[-1][0] + 1] if taken else []


class _Written:
    """A chooser that replays settings that a person wrote, and checks that they lie inside."""

    def __init__(self, settings: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> None:
        self._settings = settings
        self._parameters = parameters

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        key, sign, layer = name.partition(":")
        if sign:
            return int(layer) in parse_layers(self._value(key))
        value = _encoded(self._value(key))
        same = [choice for choice in choices if str(choice) == str(value)]
        if not same:
            raise ConfigError(f"{key} takes {list(choices)}, a point to evaluate first has {value}")
        return same[0]

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        return float(self._inside(name, self._number(name, self._value(name)), low, high))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1) -> int:
        key, sign, part = name.partition(":")
        value = self._value(key)
        if sign:
            layers = parse_layers(value)
            if layers != tuple(range(layers[0], layers[-1] + 1)):
                raise ConfigError(f"{key} is a window of neighbouring blocks, got {value!r}")
            value = layers[0] if part == "first" else len(layers)
        return int(self._inside(name, self._number(name, value), low, high))

    def _value(self, key: str) -> Any:
        if key not in self._settings:
            raise ConfigError(
                f"a point to evaluate first must name {key}; it names {sorted(self._settings)}"
            )
        return self._settings[key]

    @staticmethod
    def _number(name: str, value: Any) -> float:
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{name} must be a number, got {value!r}") from error

    @staticmethod
    def _inside(name: str, value: float, low: float, high: float) -> float:
        if not low <= value <= high:
            raise ConfigError(
                f"a point to evaluate first has {name}={value}, outside [{low}, {high}]"
            )
        return value


def _encoded(choice: Any) -> Scalar | None:
    """A choice as a scalar: Optuna stores nothing else."""
    return choice if choice is None or isinstance(choice, Scalar) else json.dumps(choice)


def _decoded(parameter: Parameter, value: Scalar) -> Any:
    if parameter.choices is None:
        return value
    return next(choice for choice in parameter.choices if _encoded(choice) == value)


def _is_layer_set(key: str, value: Any) -> bool:
    return key == LAYERS and isinstance(value, str | int) and not isinstance(value, bool)


def _meets(value: Scalar | None, wanted: Scalar | tuple[Scalar, ...]) -> bool:
    wants = wanted if isinstance(wanted, tuple) else (wanted,)
    return value is not None and any(str(value) == str(want) for want in wants)


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a key of a configuration tree; entries of a list go by name or kind."""
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        if isinstance(node, list):
            named = [item for item in node if part in (item["name"], item["kind"])]
            node = named[0] if len(named) == 1 else None
        else:
            node = node.get(part) if isinstance(node, dict) else None
        if node is None:
            break
    if not isinstance(node, dict) or last not in node:
        raise ConfigError(
            f"the space names {key}, which is not a configuration key; `python -m jobs.pipeline "
            "--dry-run` prints every key"
        )
    node[last] = value
