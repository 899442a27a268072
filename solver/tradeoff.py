"""The search along the trade-off of two values: one exact place of the curve after another."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from solver.dual import ServedDual
from solver.feasibility import reach
from solver.palette import Palette
from solver.pilot import PilotSet
from solver.repairs import PULLS
from solver.rows import Rows
from solver.solution import Solution, Status
from solver.solving import solve
from solver.spending import spend

FloatArray = npt.NDArray[np.float64]

# Ends closer than this in one of the two values are one place, standardised units.
_SAME: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Place:
    """A place on the exact curve.

    Attributes
    ----------
    levels : ndarray, shape (2,)
        Of a and b: standardised, higher is wanted.
    normal : ndarray, shape (2,)
        Of the curve, not negative, any length.
    is_servable : bool
        Whether finite multipliers reach it: the budget binds, not the limit.
    """

    levels: FloatArray
    normal: FloatArray
    is_servable: bool


class Curve:
    """The curve of what is achievable of values a and b while the rest of a palette holds.

    Parameters
    ----------
    held : Palette
        Without targets on a and b.
    pilot : PilotSet
    pair : (str, str)
        a and b.
    signs : ndarray, shape (2,)
        1 where more is wanted, -1 where less is.
    others : Solution
        Of `held`: optimal, and within the budget.
    max_kl : float or None
        Budget in nats.
    groups, seed : int
        Those of `others`.

    Attributes
    ----------
    origin, scale : ndarray, shape (2,)
        Level 0 of a and b in reward units, and the reward units of one level.
    home : ndarray, shape (2,)
        Levels of a and b that `others` serves.
    """

    def __init__(
        self,
        held: Palette,
        pilot: PilotSet,
        pair: tuple[str, str],
        signs: FloatArray,
        others: Solution,
        max_kl: float | None,
        groups: int | None,
        seed: int,
    ) -> None:
        self.held, self.pilot, self.pair, self.signs = held, pilot, pair, signs
        self.others = self._last = others
        self._groups, self._seed = groups, seed
        drawn = pilot.groups(others.candidates, groups=groups, seed=seed)
        # No choice among N costs more than log N nats, so such a budget is none.
        is_bound = max_kl is not None and max_kl < math.log(drawn.n_candidates)
        self.max_kl = max_kl if is_bound else None
        self.columns = np.array([pilot.values.index(name) for name in pair])
        self.origin, self.scale = drawn.base[self.columns], drawn.scale[self.columns]
        self.dual = ServedDual(drawn, self.palette(np.zeros(2)).resolve(pilot))
        self.origin = self.dual.origin[self.columns]
        self.home = self._expected(others)
        self.rows = Rows.of(self.dual)
        at = self.dual.active[self.rows.column].tolist()
        self._index = np.array([at.index(column) for column in self.columns])
        served = ((others.expected - self.dual.origin) / drawn.scale)[self.dual.active]
        self._known = served[None]
        # The other rows as served: the same but for rounding, and met by a known point.
        self._bound = np.minimum(self.rows.bound, self.rows.at(served))
        # Levels that any choice exceeds, and that none reaches.
        self._free = np.array([self._extreme(i, -1.0) for i in range(2)]) - 1.0
        self._ceiling = np.array([self._extreme(i, 1.0) for i in range(2)]) + 1.0

    def places(self, n_places: int) -> tuple[Place, ...]:
        """Return places from the most of b to the most of a; one where these are the same."""
        start, stop = self._end(1), self._end(0)
        gain, loss = stop.levels[0] - start.levels[0], start.levels[1] - stop.levels[1]
        if min(gain, loss) <= _SAME:
            only = stop if loss <= _SAME else start
            return (replace(only, normal=np.zeros(2)),)
        places = [start]
        for level in np.linspace(start.levels[0], stop.levels[0], n_places)[1:-1]:
            # The curve is concave, so its tangent at the last place lies above it, and closely.
            last, (a, b) = places[-1].levels, places[-1].normal
            guess = last[1] - (level - last[0]) * (a / b if b > 0.0 else 0.0)
            places.append(self._most(np.array([level, self._free[1]]), 1, float(guess)))
        return (*places, stop)

    def palette(self, levels: FloatArray) -> Palette:
        """Return the palette that asks for these levels of a and b, and holds the others."""
        kinds = ["at_least" if sign > 0 else "at_most" for sign in self.signs]
        rewards = self.rewards(levels).tolist()
        asked = {n: {kind: x} for n, kind, x in zip(self.pair, kinds, rewards, strict=True)}
        return Palette({**self.held.targets, **asked}, self.held.floors, self.held.on_floor)

    def rewards(self, levels: FloatArray) -> FloatArray:
        """Return these levels of a and b in reward units, shape (2,)."""
        return np.asarray(self.origin + self.scale * self.signs * levels)

    def solve(self, levels: FloatArray, *, is_warm: bool = False) -> Solution:
        """Return the solution of that palette, started from the last one if `is_warm`."""
        found = solve(
            self.palette(levels),
            self.pilot,
            self.others.candidates,
            groups=self._groups,
            seed=self._seed,
            warm_start=self._last if is_warm else None,
        )
        if found.status is Status.OPTIMAL:
            self._last = found
        return found

    def _expected(self, solution: Solution) -> FloatArray:
        return np.asarray(self.signs * (solution.expected[self.columns] - self.origin) / self.scale)

    def _prices(self, solution: Solution) -> FloatArray:
        return np.asarray(np.abs(solution.multipliers[self.columns]) * self.scale)

    def _extreme(self, i: int, sign: float) -> float:
        """Return the highest (sign 1) or lowest level of one value in any choice."""
        row = np.zeros(len(self._bound))
        row[self._index[i]] = sign
        vertex = self.dual.vertex(self.rows.direction(row, len(self.dual.active)))
        return float(self.rows.at(vertex)[self._index[i]])

    def _end(self, i: int) -> Place:
        """Return the end with the most of value `i`, then the most of the other."""
        j = 1 - i
        self._last = self.others
        spare = 0.0 if self.max_kl is None else self.max_kl - self.others.kl
        end = self._most(self._free, i, float(self.home[i]) + min(0.5, math.sqrt(spare)))
        if end.is_servable:
            return end
        levels = end.levels.copy()
        if self.max_kl is None:
            return replace(end, levels=self._limit(levels, j).levels)
        # The limit comes before the budget ends. Its multipliers are not finite, so the end is cut
        # a little short of it, and what is left of the budget goes to the other value.
        levels[i] -= PULLS[0] * (levels[i] - self.home[i])
        return self._most(levels, j, float(self.home[j]))

    def _most(self, levels: FloatArray, i: int, guess: float) -> Place:
        """Return the most of value `i`, the other being at least at its level in `levels`."""
        if self.max_kl is None:
            return self._limit(levels, i)
        limit: Place | None = None

        def at(level: float) -> tuple[Solution, float]:
            solution = self.solve(np.where(np.arange(2) == i, level, levels), is_warm=True)
            return solution, float(self._prices(solution)[i])

        def leave() -> float:
            nonlocal limit
            limit = self._limit(levels, i)
            return float(limit.levels[i])

        ends = float(self._free[i]), float(self._ceiling[i])
        spent = spend(self.max_kl, at, leave, ends, guess)
        if spent.is_limit and limit is not None:
            return limit
        return Place(self._expected(spent.solution), self._prices(spent.solution), True)

    def _limit(self, levels: FloatArray, i: int) -> Place:
        """Return the exact limit of value `i`, the other being at least at its level."""
        start = self._bound.copy()
        start[self._index] = levels
        start[self._index[i]] = 0.0
        step = np.zeros_like(start)
        step[self._index[i]] = 1.0
        found = reach(self.dual, self.rows, start, step, self._known, limit=float(self._ceiling[i]))
        self._known = np.vstack([self._known, found.levels])
        top = levels.copy()
        top[i] = found.distance
        normal = self.signs * found.direction[self.rows.column[self._index]]
        return Place(top, np.maximum(normal, 0.0), is_servable=False)
