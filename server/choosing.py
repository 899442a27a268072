"""From scored candidates to a choice: the promise that holds for them, their weights, the draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from server.calibration import Calibration
from server.deadline import promise_fewer
from server.promise import Promise, Promiser
from server.schemas import PaletteOptions
from solver import tilt


@dataclass(frozen=True, slots=True)
class Group:
    """The candidates of one request as far as the choice among them goes: numbers alone.

    Attributes
    ----------
    rewards : ndarray, shape (n_candidates, n_values)
        NaN where a value that the palette can do without has none.
    n_asked : int
        Candidates asked for; there are fewer after a deadline or failures.
    is_lost : bool
        Whether failures of the upstream left fewer.
    n_choices : int
    seed : int
        The request's.
    calibration : Calibration or None
        That of the request.
    """

    rewards: np.ndarray
    n_asked: int
    is_lost: bool
    n_choices: int
    seed: int
    calibration: Calibration | None

    @property
    def known(self) -> np.ndarray:
        """The rewards with 0 where there are none: no multiplier sees those."""
        return np.where(np.isnan(self.rewards), 0.0, self.rewards)

    def lost(self, values: Sequence[str]) -> list[str]:
        """Return the values that some candidate has no reward of."""
        missing = np.isnan(self.rewards).any(axis=0)
        return [name for name, is_missing in zip(values, missing, strict=True) if is_missing]


async def promise_for(
    group: Group, options: PaletteOptions, promise: Promise | None, promiser: Promiser
) -> tuple[Promise, list[str]]:
    """Return the promise that holds for these candidates, and what is known against it.

    Parameters
    ----------
    group : Group
    options : PaletteOptions
    promise : Promise or None
        The one for as many as were asked for; None with scope ``answer``.
    promiser : Promiser

    Raises
    ------
    PaletteError, InfeasiblePaletteError
    """
    n_candidates = len(group.rewards)
    cause = "failures of the upstream" if group.is_lost else "the deadline"
    told = f"{cause} left {n_candidates} of {group.n_asked} candidates"
    if promise is None:
        promise = await promiser.on_answer(options, group.known, n_candidates)
        return promise, [told] if group.is_lost else []  # a deadline has its own report
    if n_candidates >= group.n_asked:
        return promise, []
    told += (
        ", and shorter answers come through more easily: levels promised on average may not hold"
    )
    promise, told = await promise_fewer(
        promiser, options, group.calibration, promise, n_candidates, group.n_choices, told
    )
    return promise, [told]


def choose(group: Group, promise: Promise, values: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return log-weights (n_candidates,) and the indices chosen, from the request's seed.

    None are where no candidate clears the floors of a palette that refuses.
    """
    rewards = group.known
    floors = [promise.palette.floors.get(name, np.nan) for name in values]
    scale = 1.0 if group.calibration is None else group.calibration.pilot.scale
    mask = tilt.floor_mask(rewards, floors, promise.palette.on_floor, scale)
    if not mask.any():
        return np.full(len(rewards), -np.inf), np.empty(0, dtype=np.intp)
    log_weights = tilt.log_weights(promise.multipliers, rewards, mask)
    # Another stream than the candidates': they use the seed itself.
    seed = int(np.random.SeedSequence([group.seed, 1]).generate_state(1, np.uint64)[0])
    return log_weights, tilt.draw(log_weights, seed, group.n_choices)
