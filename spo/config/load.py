"""How files and overrides become one validated configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from spo.config.run import RunConfig
from spo.config.text import parse
from spo.errors import ConfigError


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `key.sub=value` overrides, validate.

    A file may begin with `base: FILE`, another one beside it: its own keys are laid over that.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown or out of range; names the key.
    """
    tree, files = ({}, "") if path is None else read_run(path)
    for override in overrides:
        assign_override(tree, *split_override(override), override)
    return validated(RunConfig, tree, files)


_Model = TypeVar("_Model", bound=BaseModel)


def validated(kind: type[_Model], tree: dict[str, Any], path: Path | str | None) -> _Model:
    """Settings of one kind out of a tree; ConfigError names every key that cannot be used."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = [
            f"  {_key(item['loc'])}: {item['msg']} (got {item['input']!r})"
            for item in error.errors()
        ]
        where = f" in {path}" if path else ""
        raise ConfigError(
            f"{len(lines)} setting(s){where} cannot be used:\n"
            + "\n".join(lines)
            + "\n`--dry-run` without overrides prints every key with its default"
        ) from error


def _key(place: Sequence[str | int]) -> str:
    """The key as it is written: without the marks of a union of ours and other packages' kinds."""
    kept = [
        part
        for before, part in zip(("", *place), place, strict=False)
        if not (isinstance(before, int) and part in ("own", "added")) and before != "own"
    ]
    return ".".join(map(str, kept))


def split_override(override: str) -> tuple[list[str], Any]:
    """Keys and value of `key.sub=value`."""
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"expected key.sub=value, got {override!r}, e.g. learn.steps=10")
    return key.split("."), parse(value, f"the value of the override {override!r}")


def read_run(path: Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], str]:
    """The keys of a run's file over those of its `base`, and the files' names for messages.

    Raises:
        ConfigError: a file cannot be read, or bases go in a circle.
    """
    if path.resolve() in above:
        raise ConfigError(f"{path} is a base of itself: {' -> '.join(map(str, above))}")
    tree = read_yaml(path)
    base = tree.pop("base", None)
    if base is None:
        return tree, str(path)
    if not isinstance(base, str):
        raise ConfigError(f"{path}: 'base' names a file beside it, got {base!r}")
    whole, files = read_run(path.parent / base, (*above, path.resolve()))
    merge(whole, tree)
    return whole, f"{path} with its base {files}"


def merge(tree: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Lay changes over a tree in place; groups of settings join, values and lists replace."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            merge(tree[key], value)
        else:
            tree[key] = value


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a YAML file; ConfigError when it cannot be read."""
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"cannot read configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: it is not UTF-8 text ({error})") from error
    tree = parse(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys at the top level, got {type(tree).__name__}")
    return tree


def assign_override(tree: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    """Set one key of a tree in place; `override` is the text for the message."""
    for key in keys[:-1]:
        branch = tree.setdefault(key, {})
        if not isinstance(branch, dict):
            raise ConfigError(f"override {override!r}: {key!r} is a value, not a group of settings")
        tree = branch
    tree[keys[-1]] = value
