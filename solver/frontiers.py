"""The frontier of two values: what is achievable of both, and the price (DESIGN.md 2.7)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from solver.errors import PaletteError, UnknownValueError
from solver.palette import Palette
from solver.pilot import PilotSet
from solver.repairs import PULLS
from solver.solution import Solution, Status
from solver.solving import solve
from solver.tradeoff import Curve, Place

FloatArray = npt.NDArray[np.float64]
Sense = Literal["more", "less"]


@dataclass(frozen=True, eq=False)
class FrontierPoint:
    """One point of the curve, and a palette to serve there.

    Attributes
    ----------
    limit : mapping of str to float
        Levels of the two values on the exact curve, reward units.
    exchange : float
        −∂b/∂a, reward units of the second value given up for one of the first. 0 where the second
        is at its most by itself, infinite where the first is, NaN where the curve is one point.
    palette : Palette
        Can be served: the levels of `limit` where the KL budget binds; a little inside where that
        is the limit of what is achievable, which needs unbounded multipliers.
    solution : Solution
        Of `palette`; its multipliers are the prices, in nats per reward unit.
    """

    limit: Mapping[str, float]
    exchange: float
    palette: Palette
    solution: Solution

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-safe maps; an exchange rate that is not finite is None."""
        return {
            "limit": dict(self.limit),
            "exchange": self.exchange if math.isfinite(self.exchange) else None,
            "palette": self.palette.to_dict(),
            "solution": self.solution.to_dict(),
        }


@dataclass(frozen=True, eq=False)
class Frontier:
    """The curve of two values with the others held.

    Attributes
    ----------
    values : (str, str)
        First and second value, a and b.
    candidates : int or math.inf
    max_kl : float or None
        Budget in nats.
    points : tuple of FrontierPoint
        From the most of b to the most of a. One point where the two values are not at odds; none
        where the others alone cannot be served.
    others : Solution
        Of the palette without a and b. Where there are no points it says why: its status and
        certificate, or `limited_by` where it needs more than `max_kl`.
    """

    values: tuple[str, str]
    candidates: float
    max_kl: float | None
    points: tuple[FrontierPoint, ...]
    others: Solution

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-safe maps."""
        return {
            "values": list(self.values),
            "candidates": "inf" if self.candidates == math.inf else int(self.candidates),
            "max_kl": self.max_kl,
            "points": [point.to_dict() for point in self.points],
            "others": self.others.to_dict(),
        }


def frontier(
    palette: Palette,
    pilot: PilotSet,
    values: Sequence[str],
    candidates: float = 16,
    *,
    n_points: int = 11,
    max_kl: float | None = None,
    senses: Mapping[str, Sense] | None = None,
    groups: int | None = None,
    seed: int = 0,
) -> Frontier:
    """Return the curve of what is achievable of two values while the rest of `palette` holds.

    Parameters
    ----------
    palette : Palette
        Its targets on the two values are left out; floors and given multipliers of other values
        stay.
    pilot : PilotSet
    values : (str, str)
        a and b.
    candidates : int or math.inf
    n_points : int
        At equally spaced levels of a, ends included.
    max_kl : float, optional
        Budget in nats: the curve of choices with KL <= `max_kl`. Without it, the exact limit.
    senses : mapping of str to {"more", "less"}, optional
        What is wanted of a and b; "more" where not named.
    groups, seed : int, optional
        As in `solve`.

    Raises
    ------
    PaletteError
        An argument cannot be used; `UnknownValueError` for a name nobody measures.
    PilotError
        The pilot set has too few candidates.

    Notes
    -----
    The ε-constraint method (Haimes, Lasdon & Wismer, IEEE Trans. SMC 1 (1971) 296; Ehrgott,
    Multicriteria Optimization, 2005, 4.1): at each level of a, the most of b. On the exact limit
    the exchange rate is that of the proof's direction, u_a/u_b; under a budget it is λ_a/λ_b, by
    the envelope theorem. Where the budget outlasts a value's own limit, that end of the curve is
    cut the first of `PULLS` short of it, and the rest of the budget goes to the other value.
    Multipliers given to other values are part of what the budget pays; then λ_a/λ_b is the rate at
    equal KL less their Σ λ·level, and the curve need not be concave.
    """
    pair = _pair(values, pilot)
    signs = _signs(senses or {}, pair)
    if isinstance(n_points, bool) or not isinstance(n_points, int) or n_points < 2:
        raise PaletteError(
            f"n_points: {n_points!r} is not a whole number from 2 up; a curve has two ends.",
            "n_points",
        )
    rest = {name: wire for name, wire in palette.targets.items() if name not in pair}
    held = Palette(rest, palette.floors, palette.on_floor)
    others = solve(held, pilot, candidates, groups=groups, seed=seed, max_kl=max_kl)
    points: tuple[FrontierPoint, ...] = ()
    if others.status is Status.OPTIMAL and others.limited_by is None:
        curve = Curve(held, pilot, pair, signs, others, max_kl, groups, seed)
        points = tuple(_point(curve, place) for place in curve.places(n_points))
    return Frontier(pair, candidates, max_kl, points, others)


def _point(curve: Curve, place: Place) -> FrontierPoint:
    # Towards what the others alone serve, which has finite multipliers. A budget may end so close
    # to the limit that only the search's own start gets there, so this solve is a fresh one.
    for pull in (0.0, *PULLS) if place.is_servable else PULLS:
        levels = place.levels - pull * (place.levels - curve.home)
        solution = curve.solve(levels)
        if solution.status is Status.OPTIMAL:
            break
    a, b = place.normal / curve.scale
    exchange = float(a / b) if b > 0.0 else (math.inf if a > 0.0 else math.nan)
    rewards = curve.rewards(place.levels)
    limit = dict(zip(curve.pair, rewards.tolist(), strict=True))
    return FrontierPoint(limit, exchange, curve.palette(levels), solution)


def _pair(values: Sequence[str], pilot: PilotSet) -> tuple[str, str]:
    if isinstance(values, str) or len(values) != 2 or values[0] == values[1]:
        raise PaletteError(
            f"values: {values!r} are not two different values; name two of "
            f"{', '.join(pilot.values)}.",
            "values",
        )
    for name in values:
        if name not in pilot.values:
            raise UnknownValueError.of(name, pilot.values, "values")
    return values[0], values[1]


def _signs(senses: Mapping[str, Sense], pair: tuple[str, str]) -> FloatArray:
    for name, sense in senses.items():
        if name not in pair:
            raise UnknownValueError.of(name, pair, "senses")
        if sense not in ("more", "less"):
            raise PaletteError(
                f'senses.{name}: {sense!r} is neither "more" nor "less".', f"senses.{name}"
            )
    return np.array([-1.0 if senses.get(name) == "less" else 1.0 for name in pair])
