"""A KL budget spent along a line of palettes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from solver.solution import Solution, Status

# The budget is used up to this share of it.
_RTOL: Final = 1e-7


@dataclass(frozen=True, slots=True)
class Spent:
    """Where a budget ends: the position on the line, its solution, and what stopped it."""

    at: float
    solution: Solution
    is_limit: bool


def spend(
    max_kl: float,
    solve_at: Callable[[float], tuple[Solution, float]],
    limit: Callable[[], float],
    ends: tuple[float, float],
    guess: float,
) -> Spent:
    """Return where on a line of palettes the KL reaches `max_kl`, or the limit if that is nearer.

    Parameters
    ----------
    max_kl : float
        Nats; no less than the near end costs.
    solve_at : callable
        Position to the solution there and ∂KL/∂position, nats per unit.
    limit : callable
        Returns the last position to consider. Called at most once, after a trial that was not
        optimal.
    ends : (float, float)
        Positions before and beyond the answer.
    guess : float

    Notes
    -----
    KL is convex along the line and the multipliers give its derivative, so Newton steps on √KL,
    which is nearly linear, need two or three solves from a good guess. A bracket guards them.
    """
    low, high = ends
    least = (1.0 - _RTOL) * max_kl
    aim = math.sqrt(0.5 * (least + max_kl))
    is_limited, position = False, guess
    best: Spent | None = None
    for _ in range(100):
        here, price = solve_at(position)
        is_optimal = here.status is Status.OPTIMAL
        if is_optimal and here.kl <= max_kl:
            low, best = position, Spent(position, here, False)
            if here.kl >= least:
                break
        else:
            high = position
        if not is_optimal and not is_limited:
            is_limited, last = True, limit()
            there, _ = solve_at(last)
            if there.kl <= max_kl:
                return Spent(last, there, True)
            high = min(high, last)
        root = math.sqrt(here.kl)
        position += 2.0 * root * (aim - root) / price if is_optimal and price > 0.0 else math.inf
        if not low < position < high:
            position = 0.5 * (low + high)
    return best or Spent(position, here, False)
