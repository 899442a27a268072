"""What a caller did wrong. What the mathematics found is a `Status`, never an exception."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SolverError(Exception):
    """Root of everything this package raises."""


class PaletteError(SolverError):
    """A palette that cannot be read.

    Parameters
    ----------
    message : str
        Names the quantity, its limit and the remedy.
    param : str, optional
        Path of the offending field, such as ``"targets.harmless.quantile"``.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownValueError(PaletteError):
    """A palette names a value that nobody measures."""

    @classmethod
    def of(cls, name: str, known: Iterable[str], param: str) -> UnknownValueError:
        """Return the error for one unknown name, with the known ones and the nearest of them."""
        known = list(known)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return cls(
            f"{param}: unknown value {name!r}; the known values are {', '.join(known)}.{hint}",
            param,
        )


class PilotError(SolverError):
    """A pilot set that cannot be used: unreadable, ragged, not finite, or too small."""
