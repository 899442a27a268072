"""What every section of a rewards file has in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints

from rewards.base import SCORE

# Names are shown in clients, metric labels and command lines: letters, digits and _ - . only.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,63}$")]


class Section(BaseModel):
    """A section: no unknown fields, no conversions, never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Scored(Section):
    """The section of a scorer."""

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of its outputs."""
        return (SCORE,)
