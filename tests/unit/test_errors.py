"""Errors cross Ray actors: they must survive pickling with type and message."""

from __future__ import annotations

import inspect
import pickle

import pytest

from spo import errors

CLASSES = [
    item
    for _, item in inspect.getmembers(errors, inspect.isclass)
    if issubclass(item, errors.SpoError)
]


def test_every_kind_is_found() -> None:
    assert {c.__name__ for c in CLASSES} >= {
        "SpoError",
        "ConfigError",
        "DataError",
        "ArtifactError",
        "EngineError",
        "SteeringError",
        "ScorerError",
        "StageError",
    }


@pytest.mark.parametrize("kind", CLASSES)
def test_one_message_survives_pickling(kind: type[errors.SpoError]) -> None:
    error = kind("expected a picture, got 'x.txt'; choose another file")
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is kind
    assert str(arrived) == str(error)
    assert arrived.args == error.args


@pytest.mark.parametrize("kind", CLASSES)
def test_no_constructor_of_its_own(kind: type[errors.SpoError]) -> None:
    assert "__init__" not in vars(kind)
    assert "__reduce__" not in vars(kind)
    assert kind.__doc__


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.DataError, ValueError),
        (errors.ArtifactError, ValueError),
        (errors.EngineError, RuntimeError),
        (errors.SteeringError, errors.EngineError),
        (errors.ScorerError, RuntimeError),
        (errors.StageError, RuntimeError),
    ],
)
def test_families(kind: type[errors.SpoError], builtin: type[Exception]) -> None:
    assert issubclass(kind, builtin)
    assert issubclass(kind, errors.SpoError)
