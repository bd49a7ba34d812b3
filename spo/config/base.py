"""What every section of the configuration is made of; importable without torch and Ray."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Location = Annotated[str, BeforeValidator(lambda value: str(value) if value else value)]
"""A folder, or a URL that pyarrow knows, such as s3://bucket/prefix."""
Labels = dict[str, str]
"""Labels that a Ray node must have to hold a role, e.g. {role: rollout}."""


class Slice(BaseModel):
    """One section: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")
