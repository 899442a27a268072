"""Repair: the achievable palette to offer in place of one that is out of reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from solver.dual import ServedDual
from solver.errors import PaletteError, UnknownValueError
from solver.feasibility import reach
from solver.nearest import nearest
from solver.palette import Palette
from solver.pilot import PilotSet
from solver.rows import Rows
from solver.solution import Solution, Status
from solver.solving import solve

FloatArray = npt.NDArray[np.float64]
Method = Literal["interpolate", "nearest", "greedy"]

# An achievable limit needs unbounded multipliers, so what is served lies this share of the way
# back to the levels of the base model; the later ones are for limits that are nearly flat there.
PULLS: Final = (0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True, eq=False)
class Repair:
    """An achievable palette close to the one asked.

    Attributes
    ----------
    method : {"interpolate", "nearest", "greedy"}
    palette : Palette
        What is served: levels strictly within reach. The palette asked itself where that is.
    levels : mapping of str to float or (float, float)
        Its levels, reward units.
    limit : mapping of str to float or (float, float)
        The exact optimum of the method, on the boundary of what is achievable.
    fraction : float, optional
        Interpolate: exact share of the way from the base levels to the palette asked.
    distance : float, optional
        Nearest: exact Euclidean distance to the palette asked, standardised units.
    solution : Solution
        Of `palette`.
    """

    method: Method
    palette: Palette
    levels: Mapping[str, float | tuple[float, float]]
    limit: Mapping[str, float | tuple[float, float]]
    fraction: float | None
    distance: float | None
    solution: Solution

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-safe maps."""
        return {
            "method": self.method,
            "palette": self.palette.to_dict(),
            "levels": _plain(self.levels),
            "limit": _plain(self.limit),
            "fraction": self.fraction,
            "distance": self.distance,
            "solution": self.solution.to_dict(),
        }


def repair(
    palette: Palette,
    pilot: PilotSet,
    candidates: float = 16,
    method: Method = "interpolate",
    priorities: Sequence[str] | None = None,
    **options: Any,
) -> Repair:
    """Return an achievable palette in place of `palette`.

    Parameters
    ----------
    palette : Palette
    pilot : PilotSet
    candidates : int or math.inf
    method : {"interpolate", "nearest", "greedy"}
        ``interpolate``: the farthest palette on the way from the base levels to the one asked
        (MAP, arXiv 2410.19198, Algorithm 2, exact in place of its bisection). ``nearest``: the
        closest one in standardised Euclidean distance. ``greedy``: from the base levels, values
        raised one after another, each as far as those before it allow (Algorithm 3).
    priorities : sequence of str, optional
        Greedy: names in order; those not named follow in the palette's order.
    **options
        As in `solve`: groups, seed, max_kl, max_iterations, ridge.

    Raises
    ------
    PaletteError
        The method is unknown, or `priorities` does not fit the palette; and as `solve`.

    Notes
    -----
    "Base levels" are those served with no solved multipliers: the base model's means, unless
    floors or given multipliers shift them. Where floors refuse every group there is nothing to
    offer, and the solution of the palette asked comes back, infeasible.
    """
    if method not in ("interpolate", "nearest", "greedy"):
        raise PaletteError(
            f'repair: {method!r} is none of "interpolate", "nearest", "greedy".', "repair.method"
        )
    constraints = palette.resolve(pilot)
    order = _order(palette, priorities)
    asked = solve(palette, pilot, candidates, **options)
    as_it_is = asked.status in (Status.OPTIMAL, Status.STEP_LIMIT, Status.NOT_FINITE)
    if as_it_is or asked.refused == 1.0:
        whole = 1.0 if method == "interpolate" else None
        none = 0.0 if method == "nearest" else None
        return Repair(method, palette, asked.targets, asked.targets, whole, none, asked)
    drawn = pilot.groups(candidates, groups=options.get("groups"), seed=options.get("seed", 0))
    dual = ServedDual(drawn, constraints)
    rows = Rows.of(dual)
    base = dual(np.zeros(len(dual.active))).levels
    fraction = distance = None
    if method == "interpolate":
        fraction, bound = _interpolate(dual, rows, base)
    elif method == "nearest":
        # Levels are as good as the square root of what the distance is.
        found = nearest(dual, rows, rows.bound, base[None], gap=1e-13)
        distance, bound = found.distance, rows.bound - found.slack
    else:
        columns = [pilot.values.index(name) for name in order]
        bound = _greedy(
            dual, rows, base, [int(np.flatnonzero(dual.active == c)[0]) for c in columns]
        )
    limit = _levels(dual, rows, bound)
    for pull in PULLS:
        # A row that the base model itself meets costs nothing, and stays where it is.
        back = np.maximum(bound - rows.at(base), 0.0)
        levels = _levels(dual, rows, bound - pull * back)
        offered = _as_palette(palette, levels)
        solution = solve(offered, pilot, candidates, **options)
        if solution.status is Status.OPTIMAL:
            break
    return Repair(method, offered, levels, limit, fraction, distance, solution)


def _interpolate(dual: ServedDual, rows: Rows, base: FloatArray) -> tuple[float, FloatArray]:
    start = rows.at(base)
    step = rows.bound - start
    found = reach(dual, rows, start, step, base[None], limit=1.0)
    fraction = float(np.clip(found.distance, 0.0, 1.0))
    return fraction, start + fraction * step


def _greedy(dual: ServedDual, rows: Rows, base: FloatArray, order: list[int]) -> FloatArray:
    levels = np.minimum(rows.at(base), rows.bound)
    points = base[None]
    for column in order:
        step = np.where(rows.column == column, rows.bound - levels, 0.0)
        if not step.any():
            continue
        found = reach(dual, rows, levels, step, points, limit=1.0)
        levels = levels + float(np.clip(found.distance, 0.0, 1.0)) * step
        points = np.vstack([points, found.levels])
    return levels


def _order(palette: Palette, priorities: Sequence[str] | None) -> list[str]:
    named = [name for name, target in palette.parsed.items() if target.kind != "multiplier"]
    first = list(priorities or ())
    for name in first:
        if not isinstance(name, str):
            raise PaletteError(
                f"repair.priorities: {name!r} is not a value name; name values in order.",
                "repair.priorities",
            )
        if name not in named:
            raise UnknownValueError.of(name, named, "repair.priorities")
        if first.count(name) > 1:
            raise PaletteError(
                f"repair.priorities: {name!r} appears twice; name each value once.",
                "repair.priorities",
            )
    return first + [name for name in named if name not in first]


def _levels(
    dual: ServedDual, rows: Rows, bound: FloatArray
) -> dict[str, float | tuple[float, float]]:
    """Return row levels by value name, in reward units."""
    ends: dict[str, list[float]] = {}
    for column, side, level in zip(rows.column, rows.side, bound, strict=True):
        value = dual.active[column]
        reward = float(dual.origin[value] + dual.groups.scale[value] * side * level)
        ends.setdefault(dual.constraints.values[value], []).append(reward)
    return {name: end[0] if len(end) == 1 else (min(end), max(end)) for name, end in ends.items()}


def _as_palette(palette: Palette, levels: Mapping[str, float | tuple[float, float]]) -> Palette:
    targets: dict[str, object] = dict(palette.targets)
    for name, level in levels.items():
        if isinstance(level, tuple):
            targets[name] = {"between": list(level)}
        else:
            kind = "at_most" if palette.parsed[name].kind == "at_most" else "at_least"
            targets[name] = {kind: level}
    return Palette(targets, palette.floors, palette.on_floor)


def _plain(levels: Mapping[str, float | tuple[float, float]]) -> dict[str, Any]:
    return {
        name: list(level) if isinstance(level, tuple) else level for name, level in levels.items()
    }
