"""YAML as text, by the rules of YAML 1.2: `1e-4` is a number and `no` is a word.

A settings file in which a key stands twice is refused: one of the two would count for nothing.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from spo.errors import ConfigError


def parse(text: str, what: str) -> Any:
    """The value of a YAML document.

    Args:
        text: the document.
        what: its name, for the message.

    Raises:
        ConfigError: it is not valid YAML; names the line.
    """
    try:
        reader = YAML(typ="safe", pure=True)
        reader.version = (1, 2)
        return reader.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None and "\n" in text else ""
        raise ConfigError(
            f"{what}{line} is not valid YAML: {error.problem or error.context}"
        ) from error
    except (YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{what} is not valid YAML: {reason}") from error


def dump(tree: Any) -> str:
    """A tree as a YAML document that readers of 1.1 and of 1.2 understand alike."""
    return str(yaml.dump(tree, Dumper=_Dumper, sort_keys=False))


class _Dumper(yaml.SafeDumper):
    """Quotes what either version takes for something else than text."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+"),
    list("-+.0123456789"),
)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?0o?[0-7_]+"), list("-+0"))
