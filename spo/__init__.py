"""SPO-VLM: safety steering of vision-language models on Ray.

    prompts + pictures --extract (Ray Data)--> pooled activations (Parquet)
      --estimate--> steering vector, Stage I: one direction a layer, from several sources
      --train: rollouts (engine actors) -> rewards (scorer actors) -> learner (Ray Train)-->
        the same vector, refined, Stage II
      --evaluate--> report: safety, utility, attacks, with intervals
      --export--> artifact

`spo.records` holds the nouns, `spo.vector` the conventions, `spo.pipeline` the order. The names
below are for notebooks and scripts: `spo.open_model("testbed")` is where to begin. Importing this
package loads nothing heavy: each name is fetched when it is first used (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spo.api import Model, Reading, open_model
    from spo.artifact import SteeringArtifact
    from spo.errors import SpoError, SteeringError
    from spo.hub import export, load, pull, push
    from spo.records import Operator, Positions, Rollout, Sampling, SteeringReceipt
    from spo.vector import SteeringVector

__all__ = [
    "Model",
    "Operator",
    "Positions",
    "Reading",
    "Rollout",
    "Sampling",
    "SpoError",
    "SteeringArtifact",
    "SteeringError",
    "SteeringReceipt",
    "SteeringVector",
    "export",
    "load",
    "open_model",
    "pull",
    "push",
]

_HOMES = {
    "spo.api": ("Model", "Reading", "open_model"),
    "spo.artifact": ("SteeringArtifact",),
    "spo.errors": ("SpoError", "SteeringError"),
    "spo.hub": ("export", "load", "pull", "push"),
    "spo.records": ("Operator", "Positions", "Rollout", "Sampling", "SteeringReceipt"),
    "spo.vector": ("SteeringVector",),
}


def __getattr__(name: str) -> object:
    home = next((module for module, held in _HOMES.items() if name in held), None)
    if home is None:
        raise AttributeError(f"module 'spo' has no attribute {name!r}; it has {__all__}")
    found: object = getattr(import_module(home), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
