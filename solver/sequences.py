"""One value at a time, in cycles: how a palette is met, or added to, without a joint solve."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from solver.dual import ServedDual
from solver.errors import PaletteError, SolverError, UnknownValueError
from solver.newton import is_certificate, kkt_residual
from solver.palette import Palette
from solver.pilot import PilotSet
from solver.serving import serve
from solver.solution import Solution, Status
from solver.solving import Verdict, decide, solve

FloatArray = npt.NDArray[np.float64]

# One value is aligned to this KKT residual, so that all together cannot be asked for less.
_LEAST_TOLERANCE: Final = 1e-9
_MAX_ITERATIONS: Final = 100


@dataclass(frozen=True, eq=False)
class Step:
    """What stands after one value was aligned; arrays have shape (n_values,).

    Attributes
    ----------
    cycle : int
        From 1.
    value : str
        The one just aligned.
    multipliers : ndarray
        Of all values, per reward unit.
    expected : ndarray
        Level served of all values, reward units.
    dual : float
        g_N, nats, from 0 at the base model; it never falls.
    kkt_residual : float
        Of the joint problem, standardised units: what the values not just aligned still miss.
    """

    cycle: int
    value: str
    multipliers: FloatArray
    expected: FloatArray
    dual: float
    kkt_residual: float


@dataclass(frozen=True, eq=False)
class Sequential:
    """The course of a sequential alignment and where it ended.

    Attributes
    ----------
    steps : tuple of Step
        In order; empty where the start already meets the palette.
    solution : Solution
        Its multipliers are those of the last step, its iterations the number of steps.
    """

    steps: tuple[Step, ...]
    solution: Solution

    @property
    def cycles(self) -> int:
        """Cycles begun."""
        return self.steps[-1].cycle if self.steps else 0

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-safe maps, value name to number."""
        values = self.solution.values
        return {
            "cycles": self.cycles,
            "steps": [
                {
                    "cycle": step.cycle,
                    "value": step.value,
                    "multipliers": dict(zip(values, step.multipliers.tolist(), strict=True)),
                    "expected": dict(zip(values, step.expected.tolist(), strict=True)),
                    "dual": step.dual,
                    "kkt_residual": step.kkt_residual,
                }
                for step in self.steps
            ],
            "solution": self.solution.to_dict(),
        }


def sequential(
    palette: Palette,
    pilot: PilotSet,
    candidates: float = 16,
    *,
    start: Solution | None = None,
    order: Sequence[str] | None = None,
    max_cycles: int = 50,
    tol: float = 1e-8,
    groups: int | None = None,
    seed: int = 0,
) -> Sequential:
    """Return the multipliers that meet `palette`, found by aligning one value after another.

    To add a value to a running palette: ``sequential(wider, pilot, start=running_solution)``.

    Parameters
    ----------
    palette : Palette
    pilot : PilotSet
    candidates : int or math.inf
    start : Solution, optional
        A running palette's solution. Its multipliers are taken over by name for the values that
        `palette` asks for; without it they start at 0.
    order : sequence of str, optional
        Values in the order in which a cycle takes them; those not named follow in the palette's
        order, values that `start` had no target for before the others.
    max_cycles : int
    tol : float
        Joint KKT residual at which it ends, standardised; from 1e-9 up.
    groups, seed : int, optional
        How candidates are grouped; see `PilotSet.groups`.

    Returns
    -------
    Sequential
        The solution's status is optimal where the joint residual is at most `tol`. Otherwise it
        is what `solve` proves: infeasible or boundary; or step limit, where more cycles help.

    Raises
    ------
    PaletteError
        An option cannot be used; and as `solve`.
    SolverError
        `start` has a multiplier for a value that the pilot set lacks.

    Notes
    -----
    MAP, arXiv 2410.19198, Theorem 5. A step maximises g_N in λ_i, the others being part of the
    model that is aligned; λ_i may fall back to 0. That is exact coordinate ascent on a concave
    function whose only kinks are separable, so the cycles converge to the joint solution, at a
    linear rate that the correlation of the values sets (Hildreth 1957; Luo & Tseng, J. Optim.
    Theory Appl. 72 (1992) 7). Where all values are wanted at once, `solve` is much faster.
    """
    began = time.perf_counter()
    if max_cycles < 1:
        raise PaletteError(f"max_cycles: {max_cycles} is not a positive number.", "max_cycles")
    if not tol >= _LEAST_TOLERANCE:
        raise PaletteError(
            f"tol: {tol} is not a number from {_LEAST_TOLERANCE:g} up; single values are aligned "
            "no closer.",
            "tol",
        )
    drawn = pilot.groups(candidates, groups=groups, seed=seed)
    joint = ServedDual(drawn, palette.resolve(pilot))
    columns = [pilot.values.index(name) for name in _order(palette, order, start)]
    point = _taken_over(joint, start)
    here = joint(point)
    residual = kkt_residual(joint, point, here)
    steps: list[Step] = []
    for turn in range(max_cycles * len(columns)):
        if residual <= tol or not here.is_finite or is_certificate(joint, point, here):
            break
        cycle, place = divmod(turn, len(columns))
        i = int(np.searchsorted(joint.active, columns[place]))
        aligned = _align(joint, i, point, candidates)
        if aligned.status not in (Status.OPTIMAL, Status.STEP_LIMIT):
            break
        point[i] = aligned.outcome.multipliers[0]
        here = joint(point)
        residual = kkt_residual(joint, point, here)
        steps.append(
            Step(
                cycle=cycle + 1,
                value=pilot.values[columns[place]],
                multipliers=joint.full(point) / drawn.scale,
                expected=serve(joint, point).expected,
                dual=here.value + float(np.log(drawn.n_candidates)),
                kkt_residual=residual,
            )
        )
    multipliers = joint.full(point) / drawn.scale
    # Started where the cycles ended, the joint solve has nothing left to do but to judge.
    judged = solve(palette, pilot, candidates, groups=groups, seed=seed, warm_start=multipliers)
    status = judged.status
    if status is Status.OPTIMAL and residual > tol:
        status = Status.STEP_LIMIT
    served = serve(joint, point)
    solution = replace(
        judged,
        status=status,
        multipliers=multipliers,
        expected=served.expected,
        stderr=served.stderr,
        ess=served.ess,
        kl=served.kl,
        kkt_residual=residual,
        iterations=len(steps),
        solve_ms=1e3 * (time.perf_counter() - began),
    )
    return Sequential(tuple(steps), solution)


def _align(joint: ServedDual, i: int, point: FloatArray, candidates: float) -> Verdict:
    """Return what becomes of solved value `i` alone, the other multipliers being given."""
    asked, column = joint.constraints, joint.active[i]
    lower, upper = np.full_like(asked.lower, -np.inf), np.full_like(asked.upper, np.inf)
    lower[column], upper[column] = asked.lower[column], asked.upper[column]
    fixed = joint.full(point) / joint.groups.scale
    fixed[column] = np.nan
    alone = replace(asked, lower=lower, upper=upper, fixed=fixed)
    return decide(ServedDual(joint.groups, alone), point[i : i + 1], candidates, _MAX_ITERATIONS)


def _taken_over(joint: ServedDual, start: Solution | None) -> FloatArray:
    """Return the standardised multipliers to begin with, shape (k,)."""
    if start is None:
        return np.zeros(len(joint.active))
    values = joint.constraints.values
    running = dict(zip(start.values, start.multipliers.tolist(), strict=True))
    for name, multiplier in running.items():
        if multiplier and name not in values:
            raise SolverError(
                f"start: has a multiplier for {name!r}, which the pilot set does not measure; its "
                f"values are {', '.join(values)}."
            )
    given = np.array([running.get(values[column], 0.0) for column in joint.active])
    point = np.where(np.isfinite(given), given, 0.0) * joint.groups.scale[joint.active]
    return np.where(point * joint.side < 0, 0.0, point)


def _order(palette: Palette, order: Sequence[str] | None, start: Solution | None) -> list[str]:
    named = [name for name, target in palette.parsed.items() if target.kind != "multiplier"]
    first = list(order or ())
    for name in first:
        if name not in named:
            raise UnknownValueError.of(name, named, "order")
        if first.count(name) > 1:
            raise PaletteError(f"order: {name!r} appears twice; name each value once.", "order")
    rest = [name for name in named if name not in first]
    if start is not None:
        rest.sort(key=lambda name: name in start.targets)
    return first + rest
