"""The achievable levels nearest to those asked, by vertices generated as they are needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import optimize

from solver.dual import ServedDual
from solver.rows import Rows

FloatArray = npt.NDArray[np.float64]

# How close to the true distance the answer is brought, standardised.
GAP: Final = 1e-8
# Steps that rounding may keep from getting any nearer before it ends.
_IDLE: Final = 5


@dataclass(frozen=True, eq=False)
class Nearest:
    """The least change that makes row levels achievable.

    Attributes
    ----------
    slack : ndarray, shape (n_rows,)
        How far each row has to give, standardised; non-negative. Its direction is the normal of
        the achievable set there: the weights of a certificate.
    points : ndarray, shape (n, k)
        Achievable levels that the nearest ones are a mixture of.
    """

    slack: FloatArray
    points: FloatArray

    @property
    def distance(self) -> float:
        """Euclidean distance, standardised."""
        return float(np.linalg.norm(self.slack))


def nearest(
    dual: ServedDual,
    rows: Rows,
    bound: FloatArray,
    points: FloatArray,
    *,
    gap: float = GAP,
    rtol: float = 0.0,
) -> Nearest:
    """Return the least slack with which the row levels `bound` are achievable.

    Parameters
    ----------
    dual : ServedDual
        Its groups, through `vertex`.
    rows : Rows
    bound : ndarray, shape (n_rows,)
        Row levels asked (side included), standardised.
    points : ndarray, shape (n, k)
        Some achievable levels, at least one.
    gap, rtol : float
        Proven error of the distance at which to stop, and the same as a share of the distance.

    Notes
    -----
    Fully corrective Frank-Wolfe: the slack s of the best mixture of known points is itself the
    direction in which to look for the next vertex, and (s·bound − h_N(s))/|s| bounds the distance
    from below. The best mixture is the point of least norm in a polytope plus a cone; non-negative
    least squares on the homogenised system finds it (Wolfe, Math. Program. 11 (1976) 128). As
    there, points without weight in it are dropped: each step shortens the slack, so that none
    comes back.
    """
    short = bound - rows.at(points)
    slack = np.maximum(short[0], 0.0)
    least, n_idle = np.inf, 0
    for _ in range(5000):
        n, n_rows = short.shape
        system = np.block([[short.T, np.eye(n_rows)], [np.ones(n), np.zeros(n_rows)]])
        try:
            mix, _ = optimize.nnls(system, np.append(np.zeros(n_rows), 1.0))
        except RuntimeError:  # its step limit: the slack so far is achievable all the same
            break
        slack = np.maximum(mix[:n] @ short / mix[:n].sum(), 0.0)
        size = float(np.linalg.norm(slack))
        if size <= gap:
            break
        n_idle = 0 if size < least * (1.0 - 1e-14) else n_idle + 1
        least = min(least, size)
        vertex = dual.vertex(rows.direction(slack, points.shape[1]))
        added = bound - rows.at(vertex)
        is_known = (np.abs(short - added).max(axis=1) < 1e-14).any()
        error = size - float(slack @ added) / size
        if is_known or n_idle > _IDLE or error <= max(gap * max(1.0, size), rtol * size):
            break
        held = mix[:n] > 0.0
        points = np.vstack([points[held], vertex])
        short = np.vstack([short[held], added])
    return Nearest(slack, points)
