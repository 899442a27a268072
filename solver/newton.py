"""Projected Newton on the served dual: the iteration, and nothing about what it is used for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from scipy.linalg.lapack import dposv

from solver.dual import Evaluation, ServedDual

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

# What "converged" means, standardised units; the iteration aims a digit further, which Newton
# reaches in the same step nearly always.
KKT_TOLERANCE: Final = 1e-8
_AIM: Final = 1e-9
# A direction violates h_N(u) >= u·c when it does by more than rounding, per unit of |u|_1.
CERTIFICATE_TOLERANCE: Final = 1e-9

End = Literal["converged", "certified", "stalled", "step_limit", "not_finite"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where the iteration ended.

    Attributes
    ----------
    end : str
        ``converged``: KKT residual <= 1e-8. ``certified``: `multipliers` is a direction that
        proves the palette out of reach. ``stalled``: no step improves the dual, which proves
        nothing. ``step_limit`` and ``not_finite`` as they say.
    multipliers : ndarray, shape (k,)
        Standardised.
    evaluation : Evaluation
        There.
    residual : float
        KKT residual, standardised.
    iterations : int
        Newton steps taken.
    """

    end: End
    multipliers: FloatArray
    evaluation: Evaluation
    residual: float
    iterations: int


def maximise(dual: ServedDual, start: FloatArray, max_iterations: int) -> Outcome:
    """Return the end of the iteration from `start`, shape (k,), standardised.

    Notes
    -----
    Each step solves the quadratic model on the sign constraints exactly, so the direction is an
    ascent direction and the segment towards it stays feasible; then it backtracks (Armijo). The
    maximum over candidates that log-sum-exp needs anyway is the support function at λ, so every
    iterate is tested as a certificate for free.
    """
    point = start
    if start.any():
        wrong = ((start > 0) & (dual.lower == -np.inf)) | ((start < 0) & (dual.upper == np.inf))
        point = np.where(wrong, 0.0, start)
    here = dual(point)
    if not here.is_finite and point.any():
        point = np.zeros_like(point)
        here = dual(point)
    residual = kkt_residual(dual, point, here)
    for iteration in range(max_iterations + 1):
        if not here.is_finite:
            return Outcome("not_finite", point, here, np.inf, iteration)
        if residual <= _AIM:
            return Outcome("converged", point, here, residual, iteration)
        if is_certificate(dual, point, here):
            return Outcome("certified", point, here, residual, iteration)
        if iteration == max_iterations:
            break
        step = _search(dual, point, here, residual)
        if step is None:
            end: End = "converged" if residual <= KKT_TOLERANCE else "stalled"
            return Outcome(end, point, here, residual, iteration)
        point, here, residual = step
    end = "converged" if residual <= KKT_TOLERANCE else "step_limit"
    return Outcome(end, point, here, residual, max_iterations)


def kkt_residual(dual: ServedDual, point: FloatArray, here: Evaluation) -> float:
    """Return the largest violation of the optimality conditions, standardised.

    Where λ_i is not 0 its constraint must be tight, or λ_i itself be that close to 0; where it is
    0 the level must be inside its interval (the natural residual of a complementarity problem).
    """
    if not len(point):
        return 0.0
    levels = here.levels + dual.ridge * point
    below = dual.lower - levels
    if dual.is_one_sided:
        return max(0.0, float(np.where(below >= 0, below, np.minimum(-below, point)).max()))
    above = levels - dual.upper
    # Slack counts only as far as λ: complementarity asks that one of the two vanishes.
    tight_low = np.where(below >= 0, below, np.minimum(-below, point))
    tight_high = np.where(above >= 0, above, np.minimum(-above, -point))
    # A λ_i of rounding size says nothing about the other bound, which must hold all the same.
    outside = np.maximum(below, above)
    tight = np.where(point > 0, tight_low, np.where(point < 0, tight_high, 0.0))
    violation = np.maximum(tight, outside)
    violation = np.where(dual.pinned, np.abs(below), violation)
    return float(max(0.0, violation.max()))


def is_certificate(dual: ServedDual, point: FloatArray, here: Evaluation) -> bool:
    """Return whether the direction λ proves that no choice reaches the palette (DESIGN.md 2.4)."""
    if dual.ridge > 0.0:
        return False
    size = float(np.abs(point).sum())
    rounding = 1e-13 * (abs(here.support) + abs(here.asked))
    return here.asked - here.support > CERTIFICATE_TOLERANCE * size + rounding


def _search(
    dual: ServedDual, point: FloatArray, here: Evaluation, residual: float
) -> tuple[FloatArray, Evaluation, float] | None:
    """Return the next point, its evaluation and its residual, or None when no step gains."""
    direction, side, gradient = _newton_direction(dual, point, here)
    slope = float(gradient @ direction)
    if not slope > 0.0:
        return None
    noise = 1e-13 * (1.0 + abs(here.value) + abs(here.asked) + abs(here.support))
    step = 1.0
    for _ in range(40):
        trial = point + step * direction
        # The segment is feasible; only rounding can cross zero, and must not.
        if dual.is_one_sided:
            np.maximum(trial, 0.0, out=trial)
        else:
            trial[(trial * side < 0) & ~dual.pinned] = 0.0
        if (trial == point).all():
            return None
        there = dual(trial)
        if there.is_finite:
            left = kkt_residual(dual, trial, there)
            enough = 1e-4 * step * slope
            # Close to the solution the gain drowns in rounding; the residual still tells.
            if enough > noise:
                if there.value >= here.value + enough:
                    return trial, there, left
            elif there.value >= here.value - noise and left < 0.9 * residual:
                return trial, there, left
        step *= 0.5
    return None


def _newton_direction(
    dual: ServedDual, point: FloatArray, here: Evaluation
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the step to the model's maximiser, the side of 0 of each λ_i in it, and the gradient.

    A side of 0 (``between`` at rest inside its interval) keeps λ_i at 0 in this step.
    """
    hessian = here.hessian.copy()
    # Collinear values and saturated weights leave directions without curvature but rounding. This
    # much keeps the model concave and is far below what the residual can see; the steps it makes
    # too long are cut below.
    most = hessian.diagonal().max(initial=0.0)
    hessian.ravel()[:: len(point) + 1] += dual.ridge + 1e-13 * max(1.0, most)
    if dual.is_one_sided:
        side, gradient = dual.side, dual.lower - here.levels - dual.ridge * point
        linear = gradient + hessian @ point
        direction = complementary(hessian, linear, dual.pinned, point > 0) - point
    else:
        side = _sides(dual, point, here)
        bound = np.where(side < 0, dual.upper, dual.lower)
        gradient = np.where(side == 0, 0.0, bound - here.levels - dual.ridge * point)
        use = np.flatnonzero(side)
        flip, at = side[use], point[use]
        hessian = hessian[use[:, None], use]
        linear = flip * (gradient[use] + hessian @ at)
        target = complementary(
            hessian * flip * flip[:, None], linear, dual.pinned[use], flip * at > 0
        )
        direction = np.zeros_like(point)
        direction[use] = flip * target - at
    longest = float(np.abs(direction).max(initial=0.0))
    if longest > 10.0:
        direction *= min(1.0, (10.0 + 2.0 * float(np.abs(point).max())) / longest)
    return direction, side, gradient


def _sides(dual: ServedDual, point: FloatArray, here: Evaluation) -> FloatArray:
    """Return the side of 0 on which each λ_i may be in the next step, shape (k,)."""
    side = np.where(dual.pinned, 1.0, dual.side)
    entering = np.where(here.levels < dual.lower, 1.0, 0.0 - (here.levels > dual.upper))
    here_side = np.where(point == 0.0, entering, np.sign(point))
    return np.where(side == 0.0, here_side, side)


def complementary(
    matrix: FloatArray, linear: FloatArray, unsigned: BoolArray, guess: BoolArray
) -> FloatArray:
    """Return the maximiser of linear·y − y·matrix·y/2 over y >= 0, shape (k,).

    Parameters
    ----------
    matrix : ndarray, shape (k, k)
        Positive definite.
    linear : ndarray, shape (k,)
    unsigned : ndarray of bool, shape (k,)
        Components that may be negative.
    guess : ndarray of bool, shape (k,)
        Components thought to be positive.

    Notes
    -----
    Block principal pivoting with a single-index fallback, which ends for positive definite
    matrices: Júdice & Pires, Comput. Oper. Res. 21 (1994) 587–596.
    """
    k = len(linear)
    free = guess | unsigned | (linear > 0)
    fewest, patience = k + 1, 3
    y = np.zeros(k)
    tiny = 1e-14 * np.abs(linear).max(initial=0.0)
    for _ in range(10 * k + 10):
        if free.all():
            y = _solve(matrix, linear)
            if (y >= 0.0).all():
                break
        else:
            inside = np.flatnonzero(free)
            y = np.zeros(k)
            y[inside] = _solve(matrix[inside[:, None], inside], linear[inside])
        pull = linear - matrix @ y
        bad = np.flatnonzero(np.where(free, (y < 0) & ~unsigned, pull > tiny))
        if not len(bad):
            break
        if len(bad) < fewest:
            fewest, patience = len(bad), 3
        elif patience:
            patience -= 1
        else:
            bad = bad[-1:]
        free[bad] = ~free[bad]
    return np.where(unsigned, y, np.maximum(y, 0.0))


def _solve(matrix: FloatArray, linear: FloatArray) -> FloatArray:
    """Return the solution of a positive definite system, up to rounding positive definite."""
    if not len(linear):
        return linear
    y: FloatArray
    _, y, info = dposv(matrix, linear)  # without the checks that cost more than a small system
    if info:
        y = np.asarray(np.linalg.lstsq(matrix, linear)[0], dtype=np.float64)
    return y
