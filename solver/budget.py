"""A KL budget: the farthest palette on the way to the one asked that costs no more."""

from __future__ import annotations

from typing import Final

import numpy as np

from solver.dual import ServedDual
from solver.newton import Outcome, maximise
from solver.serving import serve

# The budget is used up to this share of it.
_RTOL: Final = 1e-6


def within_budget(
    dual: ServedDual, outcome: Outcome, max_kl: float, max_iterations: int
) -> tuple[float, ServedDual, Outcome]:
    """Return the largest fraction of the way with KL <= `max_kl`, its dual and its solution.

    The way leads from what is served with no solved multipliers (fraction 0) to the palette of
    `dual` (fraction 1), whose own solution is `outcome`. Where given multipliers spend more than
    the budget by themselves, the fraction is 0.

    Notes
    -----
    KL grows with the fraction, nearly as its square, so the root of √KL − √budget is found by
    bracketed secant steps (Illinois: Dowell & Jarratt 1971), each solve starting from the last.
    """
    full_kl = serve(dual, outcome.multipliers).kl
    if full_kl <= max_kl:
        return 1.0, dual, outcome
    nothing = np.zeros_like(outcome.multipliers)
    start = dual(nothing).levels
    low, high = 0.0, 1.0
    at_low = np.sqrt(serve(dual, nothing).kl) - np.sqrt(max_kl)
    at_high = np.sqrt(full_kl) - np.sqrt(max_kl)
    here = dual.towards(start, 0.0)
    best = (0.0, here, maximise(here, nothing, max_iterations))
    if at_low >= 0.0:
        return best
    for _ in range(60):
        fraction = low - at_low * (high - low) / (at_high - at_low)
        here = dual.towards(start, fraction)
        solved = maximise(here, best[2].multipliers, max_iterations)
        spent = serve(here, solved.multipliers).kl
        miss = np.sqrt(spent) - np.sqrt(max_kl)
        if miss > 0.0:
            high, at_high, at_low = fraction, miss, 0.5 * at_low
        else:
            low, at_low, at_high = fraction, miss, 0.5 * at_high
            best = (fraction, here, solved)
            if spent >= (1.0 - _RTOL) * max_kl:
                break
    return best
