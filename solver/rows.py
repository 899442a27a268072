"""The constraints of a palette as rows: one a bound, each with its side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from solver.dual import ServedDual

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Rows:
    """Constraints side·level >= bound on the solved values; every array has shape (n_rows,).

    Attributes
    ----------
    column : ndarray of int
        Which of the k solved values.
    side : ndarray
        +1 for a lower bound, -1 for an upper one.
    bound : ndarray
        Standardised, and multiplied by the side.
    """

    column: npt.NDArray[np.intp]
    side: FloatArray
    bound: FloatArray

    @classmethod
    def of(cls, dual: ServedDual) -> Rows:
        """Return the rows of a palette: one a target, two for ``between``."""
        low, high = np.flatnonzero(np.isfinite(dual.lower)), np.flatnonzero(np.isfinite(dual.upper))
        return cls(
            column=np.concatenate([low, high]),
            side=np.concatenate([np.ones(len(low)), -np.ones(len(high))]),
            bound=np.concatenate([dual.lower[low], -dual.upper[high]]),
        )

    def at(self, levels: FloatArray) -> FloatArray:
        """Return side·level of each row; `levels` has shape (..., k)."""
        return np.asarray(levels[..., self.column] * self.side)

    def direction(self, weights: FloatArray, k: int) -> FloatArray:
        """Return Σ weight·side per value, shape (k,): the direction that the rows' weights form."""
        return np.bincount(self.column, weights * self.side, minlength=k).astype(np.float64)
