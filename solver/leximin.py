"""Leximin: the shares of several parties' wishes that can be met, the smallest largest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from solver.dual import ServedDual
from solver.feasibility import TOLERANCE, Reach, reach
from solver.palette import Constraints
from solver.rows import Rows

FloatArray = npt.NDArray[np.float64]

# A party that could gain no more than this share of its wish is settled.
_GAIN: Final = 1e-7
# Within this of 1 a wish is whole: what `reach` leaves of it is rounding.
_WHOLE: Final = 1e-9


@dataclass(frozen=True, eq=False)
class Claims:
    """What several parties ask, one row a bound; row arrays have shape (n_rows,).

    Attributes
    ----------
    rows : Rows
        Bounds at the levels asked, standardised.
    party : ndarray of int
        Whose row it is.
    wish : ndarray
        Level asked, reward units.
    least, way : ndarray
        Row level at satisfaction 0, and from there to the wish. A row that the base meets is a
        guard: `least` is the level asked and `way` is 0.
    base : ndarray, shape (k,)
        Levels served with no multipliers, standardised.
    n_parties : int
    """

    rows: Rows
    party: npt.NDArray[np.intp]
    wish: FloatArray
    least: FloatArray
    way: FloatArray
    base: FloatArray
    n_parties: int

    @classmethod
    def of(cls, dual: ServedDual, asked: Sequence[Constraints]) -> Claims:
        """Return the rows of each party's constraints; `dual` says what is solved for."""
        column, side, party, wish = [], [], [], []
        for number, constraints in enumerate(asked):
            for sign, ends in ((1.0, constraints.lower), (-1.0, constraints.upper)):
                some = np.flatnonzero(np.isfinite(ends[dual.active]))
                column.append(some)
                side.append(np.full(len(some), sign))
                party.append(np.full(len(some), number))
                wish.append(ends[dual.active][some])
        columns, sides, levels = np.concatenate(column), np.concatenate(side), np.concatenate(wish)
        scale, origin = dual.groups.scale[dual.active], dual.origin[dual.active]
        bound = sides * (levels - origin[columns]) / scale[columns]
        base = dual(np.zeros(len(dual.active))).levels
        start = sides * base[columns]
        is_guard = bound - start <= TOLERANCE
        return cls(
            rows=Rows(columns, sides, bound),
            party=np.concatenate(party),
            wish=levels,
            least=np.where(is_guard, bound, start),
            way=np.where(is_guard, 0.0, bound - start),
            base=base,
            n_parties=len(asked),
        )

    @property
    def is_wish(self) -> npt.NDArray[np.bool_]:
        """Rows with a way to go."""
        return np.asarray(self.way > 0.0)

    def at(self, share: FloatArray) -> FloatArray:
        """Return the row levels at each party's share of its wish, shape (n_parties,)."""
        return np.asarray(self.least + self.way * share[self.party])

    def bounds(self, dual: ServedDual, share: FloatArray) -> Constraints:
        """Return the bounds that give each party its share, (n_parties,), in reward units."""
        column = dual.active[self.rows.column]
        base = dual.origin[column] + dual.groups.scale[column] * self.base[self.rows.column]
        part = np.where(self.is_wish, share[self.party], 1.0)
        level = part * self.wish + (1.0 - part) * base  # exact at both ends
        lower, upper = np.full(len(dual.origin), -np.inf), np.full(len(dual.origin), np.inf)
        is_lower = self.rows.side > 0
        np.maximum.at(lower, column[is_lower], level[is_lower])
        np.minimum.at(upper, column[~is_lower], level[~is_lower])
        return replace(dual.constraints, lower=lower, upper=upper)

    def satisfaction(self, levels: FloatArray) -> FloatArray:
        """Return each party's satisfaction with `levels`, (k,): its least progress, from 0 to 1."""
        share = np.ones(self.n_parties)
        wish = self.is_wish
        progress = (self.rows.at(levels) - self.least)[wish] / self.way[wish]
        np.minimum.at(share, self.party[wish], progress)
        return np.clip(share, 0.0, 1.0) + 0.0  # without the sign of a rounded zero


def leximin(dual: ServedDual, claims: Claims, weights: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the lexicographic optimum of the sorted share / weight, and levels that attain it.

    Parameters
    ----------
    dual : ServedDual
        Its groups, through `reach`.
    claims : Claims
    weights : ndarray, shape (n_parties,)
        Positive.

    Returns
    -------
    share : ndarray, shape (n_parties,)
        From 0 to 1; unique.
    levels : ndarray, shape (k,)
        Standardised.

    Notes
    -----
    All open parties rise together, each at a rate of its weight, until one has its whole wish or
    none can rise without another falling. Then those are settled that cannot gain even with the
    others held where they are, and the rest go on: lexicographic max-min by linear programmes in
    sequence (Ogryczak, Eur. J. Oper. Res. 100 (1997) 566). At least one is settled in a round.
    """
    is_open = np.zeros(claims.n_parties, dtype=bool)
    is_open[claims.party[claims.is_wish]] = True
    share = np.where(is_open, 0.0, 1.0)
    levels = claims.base
    while is_open.any():
        rate = np.where(is_open, weights / weights[is_open].max(), 0.0)
        found = rise(dual, claims, share, levels, rate)
        # What was had before stays achievable; only rounding says otherwise.
        distance = max(0.0, min(found.distance, 1.0))
        share = np.where(is_open, np.maximum(share, distance * rate), share)
        levels = found.levels
        whole = is_open & (share >= 1.0 - _WHOLE)
        share[whole] = 1.0
        if not whole.any():
            gain = np.full(len(share), np.inf)
            for party in np.flatnonzero(is_open):
                alone = np.eye(len(share))[party]
                gain[party] = rise(dual, claims, share, levels, alone).distance - share[party]
            whole = gain <= max(_GAIN, gain.min())
        is_open &= ~whole
    return share, levels


def rise(
    dual: ServedDual, claims: Claims, share: FloatArray, levels: FloatArray, rate: FloatArray
) -> Reach:
    """Return how far parties can rise together from the base, the others held at their share.

    Parameters
    ----------
    dual : ServedDual
    claims : Claims
    share : ndarray, shape (n_parties,)
    levels : ndarray, shape (k,)
        Achievable levels at which everybody has that share.
    rate : ndarray, shape (n_parties,)
        Share of the wish per unit of distance, 0 for a party that is held.
    """
    moves = claims.is_wish & (rate[claims.party] > 0.0)
    # Held no tighter than `levels` itself attains, so that rounding leaves it achievable.
    held = np.minimum(claims.at(share), claims.rows.at(levels))
    return reach(
        dual,
        claims.rows,
        np.where(moves, claims.least, held),
        np.where(moves, claims.way * rate[claims.party], 0.0),
        np.vstack([levels, claims.base]),
        limit=1.0,
    )


def alone(dual: ServedDual, claims: Claims) -> FloatArray:
    """Return the most each party could have if nobody else asked for anything, (n_parties,)."""
    most = np.ones(claims.n_parties)
    for party in np.unique(claims.party[claims.is_wish]):
        own = claims.party == party
        rows = Rows(claims.rows.column[own], claims.rows.side[own], claims.rows.bound[own])
        start, way = claims.least[own], claims.way[own]
        found = reach(dual, rows, start, way, claims.base[None], limit=1.0)
        most[party] = 1.0 if found.distance >= 1.0 - _WHOLE else max(0.0, found.distance)
    return most
