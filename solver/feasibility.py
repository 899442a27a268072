"""What is achievable: how far a choice among N candidates can go, decided exactly, with proof.

The levels that choices reach form the convex hull of one vertex for every way of picking a
candidate in each group. There are far too many to list, but the best vertex for a direction is one
argmax in each group, so a linear programme over them is solved by generating vertices as they are
needed (Dantzig & Wolfe 1960; seen from the dual, Kelley's cutting planes on the support function
h_N). It ends because the vertices are finitely many, and every bound on the way is a proof.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize

from solver.dual import ServedDual
from solver.errors import SolverError
from solver.nearest import nearest
from solver.rows import Rows
from solver.solution import Certificate

FloatArray = npt.NDArray[np.float64]

# How close the two bounds of an exact answer are brought, standardised units.
GAP = 1e-10
# A palette is infeasible when its headroom is proven to be below minus this, standardised.
TOLERANCE = 1e-9
# A feasible palette whose headroom is no more than this is called the boundary itself.
BOUNDARY = 1e-7


@dataclass(frozen=True, eq=False)
class Reach:
    """How far one can go along a line of row levels.

    Attributes
    ----------
    distance : float
        The largest z with start + z·step achievable: attained, so a lower bound.
    bound : float
        Proven upper bound on it; equals `distance` within `GAP` when carried to the end.
    direction : ndarray, shape (k,)
        The u that proves `bound`.
    levels : ndarray, shape (k,)
        Achievable levels at `distance`, standardised.
    """

    distance: float
    bound: float
    direction: FloatArray
    levels: FloatArray


def reach(
    dual: ServedDual,
    rows: Rows,
    start: FloatArray,
    step: FloatArray,
    points: FloatArray,
    *,
    limit: float,
    settle: tuple[float, float] | None = None,
    max_vertices: int = 2000,
) -> Reach:
    """Return the largest z <= `limit` for which the row levels start + z·step are achievable.

    Parameters
    ----------
    dual : ServedDual
        Its groups, through `vertex`.
    rows : Rows
    start, step : ndarray, shape (n_rows,)
        Row levels (side included), standardised.
    points : ndarray, shape (n, k)
        Some achievable levels; together they must reach `start` + z·`step` for some z.
    limit : float
    settle : (float, float), optional
        Stop as soon as z is proven to be below the first or above the second.
    max_vertices : int
        Safety stop; the bounds returned are valid all the same.

    Raises
    ------
    SolverError
        No single point reaches `start`, and the linear programme cannot be solved.
    """
    k = len(dual.active)
    levels = _approach(dual, rows, start, step, points, limit)
    table = rows.at(levels)
    reached = (rows.at(points) >= start).all(axis=1)
    known = points[int(reached.argmax())]
    best = Reach(0.0 if reached.any() else -np.inf, limit, np.zeros(k), known)
    for _ in range(max_vertices):
        solved = _master(table, start, step, limit)
        if solved is None:
            break
        distance, mix, weights = solved
        direction = rows.direction(weights, k)
        vertex = dual.vertex(direction)
        per_step = float(weights @ step)
        bound = best.bound
        if per_step > 0:
            bound = min(limit, (float(direction @ vertex) - float(weights @ start)) / per_step)
        proof = direction if bound <= best.bound else best.direction
        best = Reach(distance, min(bound, best.bound), proof, mix @ levels)
        if best.bound - distance <= GAP or per_step <= 0:
            break
        if settle is not None and (best.bound < settle[0] or distance > settle[1]):
            break
        row = rows.at(vertex)
        if (np.abs(table - row).max(axis=1) < 1e-14).any():
            break  # the master already has the best vertex: what is left of the gap is rounding
        table = np.vstack([table, row])
        levels = np.vstack([levels, vertex])
    if best.distance == -np.inf:
        raise SolverError(
            "feasibility: a linear programme failed on rounding; ask for levels a little apart."
        )
    return best


def _approach(
    dual: ServedDual,
    rows: Rows,
    start: FloatArray,
    step: FloatArray,
    points: FloatArray,
    distance: float,
) -> FloatArray:
    """Return `points` and vertices around the place where the line leaves the achievable set.

    From a point outside, the nearest achievable one gives a normal, and its supporting plane cuts
    the line nearer to the set; a few rounds of that come within 1e-7 of the exit. It proves
    nothing, but leaves the linear programme little to do.
    """
    held = points
    for _ in range(50):
        found = nearest(dual, rows, start + distance * step, held, rtol=0.3)
        held = found.points
        pull = float(found.slack @ step)
        if found.distance <= 1e-7 or pull <= 0.0:
            break
        limit = dual.vertex(rows.direction(found.slack, points.shape[1]))
        held = np.vstack([held, limit])
        cut = float(found.slack @ (rows.at(limit) - start)) / pull
        if cut > distance - 1e-7:
            break
        distance = cut
    return np.vstack([points, held])


def _master(
    table: FloatArray, start: FloatArray, step: FloatArray, limit: float
) -> tuple[float, FloatArray, FloatArray] | None:
    """Return the best z over mixtures of known points, the mixture, and the rows' dual weights.

    None where the programme cannot be solved to its tolerance, which proves nothing.
    """
    n = len(table)
    bounds: list[tuple[float | None, float | None]] = [(0.0, None)] * n
    bounds.append((None, limit))
    # At this tolerance presolve calls some feasible programmes infeasible: then without it. What
    # the points reach by construction they may miss by rounding: then with rows that much looser.
    for presolve, looser in ((True, 0.0), (False, 0.0), (False, TOLERANCE), (True, TOLERANCE)):
        result = optimize.linprog(
            np.append(np.zeros(n), -1.0),
            A_ub=np.hstack([-table.T, step[:, None]]),
            b_ub=looser - start,
            A_eq=np.append(np.ones(n), 0.0)[None],
            b_eq=[1.0],
            bounds=bounds,
            method="highs",
            options={
                "presolve": presolve,
                "primal_feasibility_tolerance": GAP,
                "dual_feasibility_tolerance": GAP,
            },
        )
        if result.x is not None:
            weights = np.maximum(0.0, -np.asarray(result.ineqlin.marginals))
            return float(result.x[-1]), np.asarray(result.x[:-1]), weights
    return None


def headroom(dual: ServedDual, points: FloatArray) -> tuple[float, float, FloatArray]:
    """Return how far the palette is from the limit of what is achievable, and the normal there.

    Parameters
    ----------
    dual : ServedDual
    points : ndarray, shape (n, k)
        Some achievable levels; those where an iteration ended make it quick.

    Returns
    -------
    least, most : float
        Proven bounds, standardised: the largest change of a target on the way from the levels of
        the uniform choice through the palette to the limit. Negative: the palette is infeasible.
        Positive: it has a solution with finite multipliers. Zero: only unbounded ones reach it.
    direction : ndarray, shape (k,)
        Proof of `most`: a certificate where that is negative.

    Notes
    -----
    Let ρ be the farthest feasible point of that ray, the palette being at 1. A direction u with
    u·c = h_N(u) that tells candidates apart has u·e < h_N(u) at the uniform levels e, so it ends
    the ray at ρ = 1. One that does not tell them apart (a constant or a repeated value, the two
    sides of a ``between`` of no width) is level along the ray and does no harm to the solution.
    """
    rows = Rows.of(dual)
    start = rows.at(dual.centre)
    step = rows.bound - start
    unit = float(step.max(initial=0.0))
    if unit <= 0.0:
        return np.inf, np.inf, np.zeros(len(dual.active))
    margin = BOUNDARY / unit
    points = np.vstack([dual.centre, points])
    found = reach(dual, rows, start, step, points, limit=2.0, settle=(1.0 - margin, 1.0 + margin))
    return (found.distance - 1.0) * unit, (found.bound - 1.0) * unit, found.direction


def towards_palette(dual: ServedDual, levels: FloatArray) -> FloatArray:
    """Return the direction from the nearest achievable levels to the palette, shape (k,).

    A candidate for `certificate`, found without a linear programme; `levels`, shape (k,), are
    some achievable ones.
    """
    rows = Rows.of(dual)
    found = nearest(dual, rows, rows.bound, np.vstack([dual.centre, levels]))
    return rows.direction(found.slack, len(dual.active))


def certificate(dual: ServedDual, direction: FloatArray, candidates: float) -> Certificate | None:
    """Return the checked proof that `direction`, shape (k,), violates u·c <= h_N(u), or None.

    Terms too small to matter are dropped first, if the proof stands without them: it is read by
    people.
    """
    size = np.abs(direction).max(initial=0.0)
    if size == 0.0:
        return None
    for least in (0.05, 0.01, 1e-3, 0.0):
        short = np.where(np.abs(direction) >= least * size, direction, 0.0)
        limit = float(short @ dual.vertex(short))
        if dual.linear(short) > limit:
            break
    else:
        return None
    scale = dual.groups.scale[dual.active]
    per_unit = short / scale
    total = float(np.abs(per_unit).sum())
    shift = float(per_unit @ dual.origin[dual.active])
    names = [dual.constraints.values[column] for column in dual.active]
    return Certificate(
        direction={
            name: float(u / total) for name, u in zip(names, per_unit, strict=True) if u != 0.0
        },
        asked=(dual.linear(short) + shift) / total,
        limit=(limit + shift) / total,
        candidates=candidates,
    )
