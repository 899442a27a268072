"""The solve: one palette on one pilot set, from the constraints to a `Solution`."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from solver import feasibility
from solver.budget import within_budget
from solver.dual import ServedDual
from solver.errors import PaletteError, SolverError
from solver.newton import KKT_TOLERANCE, Outcome, kkt_residual, maximise
from solver.palette import Constraints, Palette
from solver.pilot import PilotSet
from solver.serving import serve
from solver.solution import Certificate, Solution, Status
from solver.targets import parse_count, parse_number

FloatArray = npt.NDArray[np.float64]

# Curvature below which a converged point may owe its small residual to saturated weights.
_FLAT: Final = 1e-6
# From this many groups on, a first solve on a part of them makes most steps cheap.
_LARGE: Final = 8192
_PART: Final = 1024
_SHARE: Final = 32


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was decided about a palette, and where the iteration stands."""

    status: Status
    outcome: Outcome
    certificate: Certificate | None = None


def solve(
    palette: Palette,
    pilot: PilotSet,
    candidates: float = 16,
    *,
    groups: int | None = None,
    seed: int = 0,
    warm_start: Solution | npt.ArrayLike | None = None,
    ridge: float = 0.0,
    max_kl: float | None = None,
    max_iterations: int = 100,
) -> Solution:
    """Return the multipliers that meet `palette` as served with this many candidates.

    Parameters
    ----------
    palette : Palette
    pilot : PilotSet
        For the scope "answer", the request's own candidates as its single prompt.
    candidates : int or math.inf
        Candidates sampled for a request, N. Infinity is MAP's own problem; on a pooled pilot set,
        the paper's procedure solved exactly.
    groups, seed : int, optional
        How candidates are grouped; see `PilotSet.groups`.
    warm_start : Solution or array_like, shape (n_values,), optional
        Multipliers per reward unit to start from.
    ridge : float
        ρ: minimise KL + |slack|²/(2ρ), slack in standardised units, so that any palette has
        finite multipliers and targets may be missed a little.
    max_kl : float, optional
        Budget in nats. A palette that needs more is lowered towards the base levels until it
        fits; `Solution.fraction` says how far it got.
    max_iterations : int
        Newton steps in each stage.

    Returns
    -------
    Solution
        Also for a palette out of reach: the status and the certificate say so.

    Raises
    ------
    PaletteError
        An option or a target cannot be used; `UnknownValueError` for a name nobody measures.
    PilotError
        The pilot set has too few candidates.

    Notes
    -----
    DESIGN.md 2.3 to 2.5. Feasibility is never concluded from an iteration that did not diverge,
    nor infeasibility from one that did not converge: see `decide`.
    """
    began = time.perf_counter()
    _check_options(palette, pilot, ridge, max_kl, max_iterations)
    constraints = palette.resolve(pilot)
    drawn = pilot.groups(candidates, groups=groups, seed=seed)
    dual = ServedDual(drawn, constraints, ridge)
    candidates = candidates if candidates == math.inf else int(candidates)
    start = _start(dual, warm_start, pilot.values)
    verdict = decide(dual, start, candidates, max_iterations)
    outcome, fraction = _least_norm(dual, verdict.outcome), 1.0
    if max_kl is not None and verdict.status in (Status.OPTIMAL, Status.BOUNDARY):
        fraction, dual, outcome = within_budget(dual, outcome, max_kl, max_iterations)
        if fraction < 1.0:
            # Short of a palette that can be reached, nothing is on the boundary.
            verdict = replace(verdict, status=Status.OPTIMAL, outcome=outcome)
    served = serve(dual, outcome.multipliers)
    return Solution(
        status=verdict.status,
        values=pilot.values,
        targets=_targets(dual, constraints, fraction),
        multipliers=dual.full(outcome.multipliers) / drawn.scale,
        expected=served.expected,
        stderr=served.stderr,
        base=pilot.base,
        ess=served.ess,
        kl=served.kl,
        candidates=candidates,
        certificate=verdict.certificate,
        kkt_residual=outcome.residual,
        iterations=outcome.iterations,
        refused=dual.refused,
        pooled=pilot.pooled,
        fraction=fraction,
        limited_by="max_kl" if fraction < 1.0 else None,
        solve_ms=1e3 * (time.perf_counter() - began),
    )


def decide(dual: ServedDual, start: FloatArray, candidates: float, max_iterations: int) -> Verdict:
    """Return the status of a palette with its solution or its certificate.

    Notes
    -----
    Three proofs end it, from the cheap to the dear. A Newton iterate is itself a certificate of
    infeasibility; or it converges at a point with curvature, which is a solution; or else the
    exact headroom is computed from both sides. A residual can vanish because the weights
    saturate: such a point solves the palette only in the limit, and its headroom is 0.
    """
    if not dual.n_groups:
        return Verdict(Status.INFEASIBLE, maximise(dual, 0.0 * start, 0))
    outcome = maximise(dual, _from_part(dual, start, max_iterations), max_iterations)
    if outcome.end in ("stalled", "step_limit") and start.any():
        outcome = maximise(dual, 0.0 * start, max_iterations)  # a poor start decides nothing
    if outcome.end == "not_finite":
        return Verdict(Status.NOT_FINITE, outcome)
    if outcome.end == "certified":
        proof = feasibility.certificate(dual, outcome.multipliers, candidates)
        if proof is not None:
            return Verdict(Status.INFEASIBLE, outcome, proof)
    converged = outcome.end == "converged"
    if dual.ridge > 0.0:
        return Verdict(Status.OPTIMAL if converged else Status.STEP_LIMIT, outcome)
    if converged and _has_curvature(dual, outcome):
        return Verdict(Status.OPTIMAL, outcome)
    least, most, direction = feasibility.headroom(dual, outcome.evaluation.levels)
    proof = None
    if most < -feasibility.TOLERANCE:
        proof = feasibility.certificate(dual, direction, candidates)
    if proof is not None:
        return Verdict(Status.INFEASIBLE, outcome, proof)
    if least > feasibility.BOUNDARY:
        return Verdict(Status.OPTIMAL if converged else Status.STEP_LIMIT, outcome)
    if most - least > feasibility.BOUNDARY:
        # A linear programme failed on rounding, so the bounds do not meet and prove no boundary.
        # The nearest achievable levels need none, and may still prove that it is out of reach.
        direction = feasibility.towards_palette(dual, outcome.evaluation.levels)
        proof = feasibility.certificate(dual, direction, candidates)
        if proof is not None:
            return Verdict(Status.INFEASIBLE, outcome, proof)
        return Verdict(Status.STEP_LIMIT, outcome)
    return Verdict(Status.BOUNDARY, outcome)


def _has_curvature(dual: ServedDual, outcome: Outcome) -> bool:
    """Return whether the Hessian holds the multipliers, and not saturated weights.

    Combinations that no choice can change have no curvature anywhere: they do not count.
    """
    is_held = outcome.multipliers != 0.0
    held = np.flatnonzero(is_held)
    hessian = outcome.evaluation.hessian
    if dual.unseen.size:
        free = _without(dual.unseen, dual.unseen[~is_held])
        hessian = hessian + free @ free.T
    hessian = hessian[held[:, None], held]
    hessian.ravel()[:: len(held) + 1] -= _FLAT
    try:
        np.linalg.cholesky(hessian)
    except np.linalg.LinAlgError:
        return False
    return True


def _least_norm(dual: ServedDual, outcome: Outcome) -> Outcome:
    """Return the same choice with the smallest multipliers, Euclidean and standardised.

    Notes
    -----
    Collinear values leave the multipliers free along the combinations V that no choice can
    change. Of λ + V·y with the same signs and the same λ·c, the shortest is a least-distance
    programme, which non-negative least squares solves (Lawson & Hanson 1974, ch. 23).
    """
    unseen, point = dual.unseen, outcome.multipliers
    if outcome.end != "converged" or dual.ridge > 0.0 or not unseen.size or not point.any():
        return outcome
    side = np.where(point == 0.0, dual.side, np.sign(point))
    movable = side != 0.0
    bound = np.where(side < 0.0, dual.upper, np.where(side > 0.0, dual.lower, 0.0))
    unseen = _without(unseen, np.vstack([bound @ unseen, unseen[~movable]]))
    if not unseen.size:
        return outcome
    # u = y + Vᵀλ: minimise |u| subject to side·(λ − V·Vᵀλ + V·u) >= 0.
    rest = point - unseen @ (unseen.T @ point)
    rows, least = side[:, None] * unseen, -side * rest
    system = np.vstack([rows[movable].T, least[movable]])
    wanted = np.append(np.zeros(unseen.shape[1]), 1.0)
    gap = system @ nnls(system, wanted)[0] - wanted
    shortest = rest - unseen @ (gap[:-1] / gap[-1])
    shortest[shortest * side <= 0.0] = 0.0
    here = dual(shortest)
    residual = kkt_residual(dual, shortest, here)
    if residual > KKT_TOLERANCE:
        return outcome  # nearly collinear: the combination is not quite free
    return replace(outcome, multipliers=shortest, evaluation=here, residual=residual)


def _without(basis: FloatArray, rows: FloatArray) -> FloatArray:
    """Return an orthonormal basis of the combinations of `basis` that all of `rows` map to 0."""
    _, sizes, rotation = np.linalg.svd(rows)
    return np.asarray(basis @ rotation[int((sizes > KKT_TOLERANCE).sum()) :].T)


def _from_part(dual: ServedDual, start: FloatArray, max_iterations: int) -> FloatArray:
    """Return a start for many groups: the solution on a part of them, found the same way."""
    n_groups = dual.groups.n_groups
    fewer = max(_PART, n_groups // _SHARE)
    groups = dual.groups.first(fewer) if n_groups >= _LARGE else dual.groups
    if groups.n_groups == n_groups:
        return start
    part = ServedDual(groups, dual.constraints, dual.ridge)
    outcome = maximise(part, _from_part(part, start, max_iterations), max_iterations)
    return outcome.multipliers if outcome.end == "converged" else start


def _start(
    dual: ServedDual, warm_start: Solution | npt.ArrayLike | None, values: tuple[str, ...]
) -> FloatArray:
    if warm_start is None:
        return np.zeros(len(dual.active))
    needed = (
        f"one multiplier for each of the values {', '.join(values)} is needed; start from a "
        "solution on the same pilot set."
    )
    if isinstance(warm_start, Solution) and warm_start.values != values:
        raise SolverError(f"warm_start: of {', '.join(warm_start.values)}, where {needed}")
    given = warm_start.multipliers if isinstance(warm_start, Solution) else warm_start
    try:
        multipliers = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise SolverError(f"warm_start: no array of numbers ({error}), where {needed}") from error
    if multipliers.shape != (len(values),):
        raise SolverError(f"warm_start: shape {multipliers.shape} where {needed}")
    standardised: FloatArray = (multipliers * dual.groups.scale)[dual.active]
    return np.where(np.isfinite(standardised), standardised, 0.0)


def _targets(
    dual: ServedDual, constraints: Constraints, fraction: float
) -> dict[str, float | tuple[float, float]]:
    lower, upper = constraints.lower[dual.active], constraints.upper[dual.active]
    if fraction < 1.0:
        scale, origin = dual.groups.scale[dual.active], dual.origin[dual.active]
        lower, upper = origin + scale * dual.lower, origin + scale * dual.upper
    levels: dict[str, float | tuple[float, float]] = {}
    for column, low, high in zip(dual.active, lower.tolist(), upper.tolist(), strict=True):
        name = constraints.values[column]
        if math.isinf(high):
            levels[name] = low
        else:
            levels[name] = high if math.isinf(low) else (low, high)
    return levels


def _check_options(
    palette: Palette, pilot: PilotSet, ridge: float, max_kl: float | None, max_iterations: int
) -> None:
    if not isinstance(palette, Palette) or not isinstance(pilot, PilotSet):
        raise SolverError(
            f"palette, pilot: a Palette and a PilotSet are needed, not {type(palette).__name__} "
            f"and {type(pilot).__name__}; build them first: Palette({{...}}), PilotSet(rewards, "
            "values)."
        )
    if parse_number(ridge, "ridge") < 0.0:
        raise PaletteError(f"ridge: {ridge} is below 0.", "ridge")
    if max_kl is not None and not parse_number(max_kl, "max_kl") > 0.0:
        raise PaletteError(
            f"max_kl: {max_kl} is not a positive number of nats; leave it out for no budget.",
            "max_kl",
        )
    parse_count(max_iterations, "max_iterations")
