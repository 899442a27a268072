"""Why a party gets no more: what stands against its wish, in words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from solver.dual import ServedDual
from solver.feasibility import BOUNDARY, TOLERANCE, certificate
from solver.leximin import Claims, rise

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


def limits(
    dual: ServedDual,
    claims: Claims,
    names: Sequence[str],
    share: FloatArray,
    levels: FloatArray,
    candidates: float,
) -> str | None:
    """Return what keeps the worst party from more, while the others keep what they have.

    Parameters
    ----------
    dual : ServedDual
    claims : Claims
    names : sequence of str
        Of the parties, in the order of their numbers.
    share : ndarray, shape (n_parties,)
        What each has of its wish, the leximin optimum.
    levels : ndarray, shape (k,)
        Levels that attain it, standardised.
    candidates : int or math.inf

    Returns
    -------
    str, optional
        Another party's bound that is met head-on; or the certificate of the direction that
        `reach` proves the optimum with, the worst party being pushed to its whole wish. None
        where every wish is met whole.
    """
    worst = int(share.argmin())
    if share[worst] == 1.0:
        return None
    if not dual.n_groups:
        return "no answer reaches the floors"
    at = claims.at(share)
    own = claims.is_wish & (claims.party == worst)
    for row, other in _opposed(claims, own):
        if at[row] + at[other] >= -BOUNDARY:
            return _collision(dual, claims, names, row, other, at[other])
    found = rise(dual, claims, share, levels, np.eye(len(share))[worst])
    pushed = share.copy()
    pushed[worst] = 1.0
    wished = ServedDual(dual.groups, claims.bounds(dual, pushed))
    proof = certificate(wished, found.direction, candidates)
    whole = f"the whole wish of {names[worst]} beside what the others have"
    if proof is None:  # opposite rows that cancel in part, or rounding, may hide it
        return f"no choice among the candidates gives {whole}"
    return f"{whole} is out of reach: {proof.sentence}"


def stopped(dual: ServedDual, claims: Claims, names: Sequence[str]) -> tuple[str, ...]:
    """Return the wishes that go beyond another party's guard, in words."""
    bound = claims.rows.bound
    return tuple(
        _collision(dual, claims, names, row, other, bound[other])
        for row, other in _opposed(claims, claims.is_wish)
        if not claims.is_wish[other] and bound[row] + bound[other] > TOLERANCE
    )


def _opposed(claims: Claims, some: BoolArray) -> list[tuple[int, int]]:
    """Return each of some rows with each row that pulls its value in the opposite direction."""
    column, side = claims.rows.column, claims.rows.side
    return [
        (int(row), int(other))
        for row in np.flatnonzero(some)
        for other in np.flatnonzero((column == column[row]) & (side != side[row]))
    ]


def _collision(
    dual: ServedDual,
    claims: Claims,
    names: Sequence[str],
    row: int,
    other: int,
    level: float,
) -> str:
    """Return the sentence on a wish and the opposite row, which stands at `level`."""
    side, column = claims.rows.side, dual.active[claims.rows.column[row]]
    ends = {1.0: "at least", -1.0: "at most"}
    held = dual.origin[column] + dual.groups.scale[column] * side[other] * level
    sentence = (
        f"{names[claims.party[row]]} wants {dual.constraints.values[column]} "
        f"{ends[side[row]]} {claims.wish[row]:.6g}, but {names[claims.party[other]]} holds it "
        f"{ends[side[other]]} {held:.6g}"
    )
    return sentence if claims.is_wish[other] else f"{sentence}, which the base model meets"
