"""Base of the recipe sections."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every recipe section: immutable, and strict about keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
