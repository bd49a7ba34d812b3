"""The errors of SPO-VLM: one base, one child for each kind of cause.

Each takes one message and has no constructor of its own, because an exception with required
constructor arguments arrives from a Ray actor as an unserialisable stand-in that nobody can
catch by type. A message says what was expected, what came, and what to do.
"""


class SpoError(Exception):
    """Base of every error that this project raises on purpose."""


class ConfigError(SpoError, ValueError):
    """A setting is unknown, out of range, or contradicts another."""


class DataError(SpoError, ValueError):
    """A prompt, picture or activation file cannot be used as it is."""


class ArtifactError(SpoError, ValueError):
    """A steering vector or artifact is damaged, or belongs to another model."""


class EngineError(SpoError, RuntimeError):
    """A model cannot be loaded, or an engine failed to generate, score or capture."""


class SteeringError(EngineError):
    """Steering was asked for and cannot be shown to be on: never answer unsteered instead."""


class UnpublishedError(SteeringError):
    """The engine does not hold the named version of a vector; publishing it heals that."""


class ScorerError(SpoError, RuntimeError):
    """A reward model or a judge gave no usable score."""


class StageError(SpoError, RuntimeError):
    """A distributed stage (Ray) could not start, finish in time, or lost too many parts."""
