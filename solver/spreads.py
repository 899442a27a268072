"""A spread of palettes: K diverse profiles to ship, from single values to mixtures of them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from solver.errors import PaletteError, UnknownValueError
from solver.palette import Palette
from solver.pilot import PilotSet
from solver.repairs import PULLS
from solver.solution import Solution, Status
from solver.solving import solve
from solver.spending import spend

FloatArray = npt.NDArray[np.float64]

# Palettes whose expected levels are closer than this are one profile, standardised units.
DISTINCT: Final = 0.01
# Steps of the lattice, or as many as give two directions for each palette to choose from, but no
# more directions than this unless that many palettes are asked.
_STEPS: Final = 4
_MOST_DIRECTIONS: Final = 64


@dataclass(frozen=True, eq=False)
class SpreadPalette:
    """One profile.

    Attributes
    ----------
    name : str
        Of the values it raises: "helpful", "helpful+humorous", "mostly-helpful+humorous". Unique,
        lower case, without spaces or slashes.
    direction : mapping of str to float
        Share of each value raised; sums to 1.
    palette : Palette
        Gains for the values raised and "keep" for the rest: good on a new calibration too.
    solution : Solution
        Of `palette`; optimal.
    """

    name: str
    direction: Mapping[str, float]
    palette: Palette
    solution: Solution

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-safe maps."""
        return {
            "name": self.name,
            "direction": dict(self.direction),
            "palette": self.palette.to_dict(),
            "solution": self.solution.to_dict(),
        }


def spread(
    pilot: PilotSet,
    n_palettes: int,
    candidates: float = 16,
    *,
    values: Sequence[str] | None = None,
    max_kl: float | None = 1.0,
    groups: int | None = None,
    seed: int = 0,
) -> tuple[SpreadPalette, ...]:
    """Return up to `n_palettes` palettes as different from each other as can be.

    Parameters
    ----------
    pilot : PilotSet
    n_palettes : int
        K.
    candidates : int or math.inf
    values : sequence of str, optional
        Values to raise or else keep; all by default. Others are free.
    max_kl : float, optional
        Nats that each palette costs; less where a limit comes first. None for the limits.
    groups, seed : int, optional
        As in `solve`.

    Returns
    -------
    tuple of SpreadPalette
        Single values first, in the pilot set's order; the most distant ones where there is no room
        for all. Fewer than K where fewer are distinct: a value that is constant, repeats another,
        or cannot rise while the rest is kept has no palette of its own.

    Raises
    ------
    PaletteError
        An argument cannot be used; `UnknownValueError` for a name nobody measures.
    PilotError
        The pilot set has too few candidates.

    Notes
    -----
    Directions are a lattice on the simplex of the values (Das & Dennis, SIAM J. Optim. 8 (1998)
    631). In each, the levels go from the base as far as the budget and the limit allow. Those kept
    are chosen farthest first (Gonzalez, Theor. Comput. Sci. 38 (1985) 293) in standardised expected
    levels, the base model counting as chosen.
    """
    if isinstance(n_palettes, bool) or not isinstance(n_palettes, int) or n_palettes < 1:
        raise PaletteError(
            f"n_palettes: {n_palettes!r} is not a whole number from 1 up.", "n_palettes"
        )
    chosen = _checked(pilot, values)
    raised = [name for name in chosen if not pilot.is_constant[pilot.values.index(name)]]
    if not raised:
        return ()
    ray = _Ray(pilot, chosen, candidates, max_kl, groups, seed)
    columns = [pilot.values.index(name) for name in chosen]
    for n_steps in _steps(len(raised), n_palettes):
        directions = _lattice(len(raised), n_steps)
        shares = [
            {name: w / n_steps for name, w in zip(raised, weights, strict=True) if w}
            for weights in directions
        ]
        solved = [ray.farthest(share) for share in shares]
        excess = np.stack([solution.expected - pilot.base for _, solution in solved])
        picked = _farthest_first((excess / pilot.scale)[:, columns], len(raised), n_palettes)
        if len(picked) == n_palettes:
            break
    names = _names(raised, [directions[i] for i in picked])
    return tuple(
        SpreadPalette(name, shares[i], *solved[i]) for name, i in zip(names, picked, strict=True)
    )


class _Ray:
    """From the base levels towards a mixture of values; parameters as in `spread`."""

    def __init__(
        self,
        pilot: PilotSet,
        values: Sequence[str],
        candidates: float,
        max_kl: float | None,
        groups: int | None,
        seed: int,
    ) -> None:
        self.pilot, self.values = pilot, values
        self._solve = partial(solve, pilot=pilot, candidates=candidates, groups=groups, seed=seed)
        self._base = self._solve(self.palette({}, 0.0), max_kl=max_kl)
        drawn = pilot.groups(candidates, groups=groups, seed=seed)
        # No choice among N costs more than log N nats.
        self._max_kl = max_kl or 1.0 + math.log(drawn.n_candidates)
        # No choice gives any value more than this above its base level, standardised.
        best = [block.max(axis=1).sum(axis=1) for block in drawn.blocks]
        self._most = np.sum(best, axis=0) / drawn.n_groups

    def palette(self, share: Mapping[str, float], gain: float) -> Palette:
        """Return the palette at a distance in a direction, both standardised."""
        return Palette(
            {n: {"gain": gain * share[n]} if n in share else "keep" for n in self.values}
        )

    def farthest(self, share: Mapping[str, float]) -> tuple[Palette, Solution]:
        """Return the farthest palette in a direction that can be served within the budget."""
        index = [self.pilot.values.index(name) for name in share]
        rates = np.array([*share.values()])
        ceiling = float((self._most[index] / rates).min()) + 1.0
        last = self._base

        def at(gain: float) -> tuple[Solution, float]:
            nonlocal last
            found = self._solve(self.palette(share, gain), warm_start=last)
            last = found if found.status is Status.OPTIMAL else last
            return found, float((found.multipliers * self.pilot.scale)[index] @ rates)

        def limit() -> float:
            # To the share that is given up anyway to keep the multipliers finite.
            low, high = 0.0, ceiling
            while high - low > PULLS[0] * high and high > DISTINCT:
                middle = 0.5 * (low + high)
                is_served = at(middle)[0].status is Status.OPTIMAL
                low, high = (middle, high) if is_served else (low, middle)
            return (1.0 - PULLS[0]) * low

        guess = min(0.5, math.sqrt(self._max_kl))
        spent = spend(self._max_kl, at, limit, (0.0, ceiling), guess)
        for pull in (0.0, *PULLS):  # on from the rare budget that ends at the limit itself
            palette = self.palette(share, (1.0 - pull) * spent.at)
            solution = self._solve(palette)
            if solution.status is Status.OPTIMAL:
                break
        return palette, solution


def _checked(pilot: PilotSet, values: Sequence[str] | None) -> list[str]:
    """Return the values in the pilot set's order."""
    asked = pilot.values if values is None else values
    if isinstance(asked, str) or not asked:
        raise PaletteError(
            f"values: {values!r} names no values; name some of {', '.join(pilot.values)}.", "values"
        )
    for name in asked:
        if name not in pilot.values:
            raise UnknownValueError.of(name, pilot.values, "values")
    return [name for name in pilot.values if name in asked]


def _steps(n_values: int, n_palettes: int) -> list[int]:
    """Return the steps of the lattice to try first, whose names are short, and of the finest."""
    if n_values == 1:
        return [1]
    sizes = {n: math.comb(n + n_values - 1, n) for n in range(1, 2 * n_palettes + _MOST_DIRECTIONS)}
    least = min(n for n, size in sizes.items() if size >= n_palettes)
    finest = max(n for n, size in sizes.items() if size <= _MOST_DIRECTIONS or n <= least)
    good = min(n for n, size in sizes.items() if size >= 2 * n_palettes and n >= _STEPS)
    return sorted({max(least, min(good, finest)), finest})


def _lattice(n_values: int, n_steps: int) -> list[tuple[int, ...]]:
    """Return the whole weights with a sum of `n_steps`, those of fewer values first."""
    lattice = []
    for bars in combinations(range(n_steps + n_values - 1), n_values - 1):
        edges = (-1, *bars, n_steps + n_values - 1)
        lattice.append(tuple(b - a - 1 for a, b in pairwise(edges)))
    return sorted(reversed(lattice), key=lambda weights: n_values - weights.count(0))


def _farthest_first(levels: FloatArray, n_first: int, n_picked: int) -> list[int]:
    """Return distinct rows of `levels` far from 0 and each other; the first ones are preferred."""
    picked: list[int] = []
    distance = np.linalg.norm(levels, axis=1)
    for end in (n_first, len(levels)):
        while len(picked) < n_picked:
            best = int(distance[:end].argmax())
            if distance[best] < DISTINCT:
                break
            picked.append(best)
            distance = np.minimum(distance, np.linalg.norm(levels - levels[best], axis=1))
    return sorted(picked, key=lambda i: min(i, n_first))  # stable: single values in their order


def _names(values: Sequence[str], directions: Sequence[tuple[int, ...]]) -> list[str]:
    """Return a unique name for each direction, from the names of the values in it."""
    words = [re.sub(r"[^\w.]+", "-", value.lower()).strip("-.") or "value" for value in values]
    names: list[str] = []
    for weights in directions:
        order = sorted(np.flatnonzero(weights).tolist(), key=lambda i: -weights[i])
        share, n_top = math.gcd(*weights), weights.count(max(weights))
        plain = "+".join(words[i] for i in order)
        exact = "+".join(f"{words[i]}-{weights[i] // share}" for i in order)
        if n_top < len(order):
            plain = f"mostly-{plain}" if n_top == 1 else exact
        tries = (plain, exact, *(f"{plain}-{n}" for n in range(2, len(directions) + 2)))
        names.append(next(name for name in tries if name not in names))
    return names
