"""What every section of the configuration is made of; importable without torch and Ray."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Slice(BaseModel):
    """One section: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")
