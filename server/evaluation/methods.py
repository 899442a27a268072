"""Ways to choose among the same candidates: the palette's λ and what it is compared with.

Every method gets the palette's own values in the palette's own directions.

base
    The base model's answer: any candidate.
palette
    λ solved for this N on the calibration, as the server serves it, floors included.
best_of_n
    The candidate with the largest plain sum of standardised rewards.
fixed_weights
    Drawn from the softmax of that sum times a strength β, the same for all values, which costs as
    much KL on the calibration as the palette does: weights, where the palette has targets.
paper
    MAP's procedure (Wang et al., ICLR 2025, arXiv 2410.19198, eq. 5): λ of the pooled dual at
    N = infinity, on one answer to each prompt of the calibration, solved exactly for the levels
    that the palette asks for, and used at this N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import softmax

from server.evaluation.measures import cut, kl_and_ess
from server.promise import Promise
from solver import Palette, PilotSet, Solution, Status, solve, tilt

FloatArray = npt.NDArray[np.float64]

METHODS = ("base", "palette", "best_of_n", "fixed_weights", "paper")

# Beyond this strength, per standard deviation, the softmax is the best of N.
_STRONGEST = 1e4


@dataclass(frozen=True, slots=True)
class Method:
    """One way to choose.

    Attributes
    ----------
    name : str
        One of `METHODS`.
    multipliers : ndarray, shape (n_values,), or None
        Per reward unit; None where the method cannot be used.
    is_greedy : bool
        Whether the largest Σ λ r is taken instead of drawn.
    floors : ndarray, shape (n_values,), or None
        Least reward of a served answer; NaN for none.
    on_floor : str
    scale : ndarray, shape (n_values,)
        Reward units per standardised unit.
    reason : str or None
        Why it cannot be used.
    """

    name: str
    multipliers: FloatArray | None
    scale: FloatArray
    is_greedy: bool = False
    floors: FloatArray | None = None
    on_floor: str = "refuse"
    reason: str | None = None

    def weights(self, groups: FloatArray) -> FloatArray:
        """Return the weights of the choice, shape (n_prompts, n_groups, n_candidates).

        All 0 where the floors refuse a group. `groups` has a last axis of n_values.
        """
        if self.multipliers is None:
            raise ValueError(self.reason)
        if self.is_greedy:
            logits = groups @ self.multipliers
            best = logits == logits.max(axis=-1, keepdims=True)
            return np.asarray(best / best.sum(axis=-1, keepdims=True))
        # One candidate is subtracted before the product, as in `tilt.log_weights`.
        logits = (groups - groups[..., :1, :]) @ self.multipliers
        if self.floors is None:
            return np.asarray(softmax(logits, axis=-1))
        mask = tilt.floor_mask(groups, self.floors, self.on_floor, self.scale)  # type: ignore[arg-type]
        is_served = mask.any(axis=-1, keepdims=True)
        logits = np.where(mask | ~is_served, logits, -np.inf)
        return np.where(is_served, softmax(logits, axis=-1), 0.0)


def senses_of(palette: Palette, values: tuple[str, ...]) -> FloatArray:
    """Return, by value, 1 where the palette wants more, -1 where less, 0 for neither.

    ``between`` and a multiplier of 0 want neither; a value that is not named is free.
    """
    senses = np.zeros(len(values))
    for name, target in palette.parsed.items():
        match target.kind:
            case "at_most":
                sense = -1.0
            case "between":
                sense = 0.0
            case "multiplier":
                sense = float(np.sign(target.numbers[0]))
            case _:
                sense = 1.0
        senses[values.index(name)] = sense
    return senses


def bounds_of(palette: Palette, solution: Solution, value: str) -> tuple[float, float]:
    """Return the levels asked for, lowest and highest, in reward units; infinite for no end."""
    asked = solution.targets[value]
    if isinstance(asked, tuple):
        return asked
    if palette.parsed[value].kind == "at_most":
        return -math.inf, asked
    return asked, math.inf


def paper_solution(palette: Palette, solution: Solution, pilot: PilotSet) -> Solution:
    """Return the paper's solution for the levels that a solved palette asks for.

    The pool has the first answer to each prompt of the calibration. Floors are left out: the paper
    has none.
    """
    pooled = PilotSet(pilot.rewards[:, 0], pilot.values, pooled=True)
    same: dict[str, object] = {}
    for name, target in palette.parsed.items():
        if target.kind == "multiplier":
            same[name] = target.to_wire()
            continue
        low, high = bounds_of(palette, solution, name)
        if high == math.inf:
            same[name] = {"at_least": low}
        else:
            same[name] = {"at_most": high} if low == -math.inf else {"between": [low, high]}
    return solve(Palette(same), pooled, math.inf)


def strength_for(
    direction: FloatArray, n_candidates: int, wanted_kl: float, pilot: PilotSet
) -> float:
    """Return β at which the softmax of β·direction·r has a mean KL on the pilot set.

    Parameters
    ----------
    direction : ndarray, shape (n_values,)
        Per reward unit.
    n_candidates : int
    wanted_kl : float
        Nats. Where no strength costs as much, the largest one is returned.
    pilot : PilotSet
    """
    from scipy.optimize import brentq  # slow to import

    scores = cut(pilot.rewards @ direction, n_candidates)

    def excess(strength: float) -> float:
        weights = softmax(strength * scores, axis=-1)
        return float(kl_and_ess(weights)[..., 0].mean()) - wanted_kl

    if wanted_kl <= 0.0:
        return 0.0
    high = 1.0
    while excess(high) < 0.0:
        high *= 2.0
        if high > _STRONGEST:
            return _STRONGEST
    return float(brentq(excess, 0.0, high, xtol=1e-9))


def methods_of(promise: Promise, pilot: PilotSet) -> list[Method]:
    """Return the ways to choose under one palette, in the order of `METHODS`.

    Parameters
    ----------
    promise : Promise
        With a solution.
    pilot : PilotSet
        It was solved on.
    """
    palette, solution = promise.palette, promise.solution
    if solution is None:
        raise ValueError("a promise that nothing was solved for cannot be evaluated")
    scale = pilot.scale
    floors = np.array([palette.floors.get(name, np.nan) for name in pilot.values])
    direction = senses_of(palette, pilot.values) / scale
    nothing = (
        None if direction.any() else "the palette names no value that it wants more or less of"
    )
    strength = strength_for(direction, promise.n_candidates, solution.kl, pilot)
    paper = paper_solution(palette, solution, pilot)
    found = paper.status is Status.OPTIMAL
    return [
        Method("base", np.zeros(pilot.n_values), scale),
        Method(
            "palette",
            promise.multipliers,
            scale,
            floors=None if np.isnan(floors).all() else floors,
            on_floor=palette.on_floor,
        ),
        Method("best_of_n", None if nothing else direction, scale, is_greedy=True, reason=nothing),
        Method("fixed_weights", None if nothing else strength * direction, scale, reason=nothing),
        Method(
            "paper",
            paper.multipliers if found else None,
            scale,
            reason=None if found else f"the paper's dual is {paper.status.value}",
        ),
    ]
