"""Planning: how many candidates a palette needs."""

from __future__ import annotations

import functools
from typing import Final

import numpy as np

from solver.dual import ServedDual
from solver.groups import draw_groups
from solver.palette import Palette
from solver.pilot import PilotSet
from solver.solution import Status
from solver.solving import decide
from solver.targets import parse_count

# A pool could form groups of any size; nobody samples more candidates than this for one request.
MOST_POOLED: Final = 256
# So many N below the change may have another verdict than their neighbours.
_ALTERNATE: Final = 3


def min_candidates(
    palette: Palette, pilot: PilotSet, *, upper: int | None = None, seed: int = 0
) -> int | None:
    """Return the smallest N for which `palette` is achievable, or None if none up to the limit is.

    Parameters
    ----------
    palette : Palette
    pilot : PilotSet
    upper : int, optional
        Largest N tried; by default, and at most, the pilot set's candidates a prompt. On a pool
        the default is 256.
    seed : int
        Of the groups.

    Raises
    ------
    PaletteError
        `upper` is no whole number from 1 up; and as `solve`.

    Notes
    -----
    What N candidates can give, h_N, grows with N, so the verdicts change once and bisection finds
    where (DESIGN.md 2.4). Each verdict is exact on its own groups; but different N see different
    groups, so close to the change the verdicts may alternate. The last few N below are therefore
    tried one by one: the answer is achievable, and none of the `_ALTERNATE` below it is.
    """
    upper = None if upper is None else parse_count(upper, "upper")
    held = min(MOST_POOLED if upper is None else upper, pilot.n_prompts)
    most = held if pilot.pooled else min(upper or pilot.n_candidates, pilot.n_candidates)
    constraints = palette.resolve(pilot)

    @functools.cache
    def is_achievable(n_candidates: int) -> bool:
        # Drawn past the pilot set's own store: a search must not push out the groups in use.
        dual = ServedDual(draw_groups(pilot, n_candidates, None, seed), constraints)
        verdict = decide(dual, np.zeros(len(dual.active)), n_candidates, 100)
        return verdict.status not in (Status.INFEASIBLE, Status.NOT_FINITE)

    def below(n_candidates: int) -> int | None:
        tried = range(max(1, n_candidates - _ALTERNATE), n_candidates)
        return next(filter(is_achievable, tried), None)

    high = most if is_achievable(most) else below(most)
    if high is None:
        return None
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        if is_achievable(middle):
            high = middle
        else:
            low = middle
    while (smaller := below(high)) is not None:
        high = smaller
    return high
