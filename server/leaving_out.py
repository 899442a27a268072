"""Values that could not be scored: what a palette can do without, and what is promised then."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from rewards import RewardError
from server.calibration import Calibration
from server.promise import Promise, Promiser, palette_of
from server.schemas import PaletteOptions


def dispensable(options: PaletteOptions, values: Collection[str]) -> frozenset[str]:
    """Return the values whose scorers may fail: no target or floor needs them.

    They are scored for the report, or as a target that is optional.
    """
    palette = palette_of(options)
    needed = {name for name, target in palette.parsed.items() if not target.optional}
    return frozenset(values) - needed - palette.floors.keys()


def left_out(
    rewards: np.ndarray, values: Sequence[str], reasons: Mapping[str, str]
) -> dict[str, str]:
    """Return the values that some candidate has no reward of, with the reason.

    Parameters
    ----------
    rewards : ndarray, shape (n_candidates, n_values)
        NaN where there is none.
    values : sequence of str
    reasons : mapping of str to str
        By value.

    Raises
    ------
    RewardError
        When a reward is NaN without a reason.
    """
    is_missing = np.isnan(rewards).any(axis=0)
    missing = [name for name, lacks in zip(values, is_missing, strict=True) if lacks]
    for name in missing:
        if name not in reasons:
            raise RewardError(f"a reward of {name} is no number; check its scorer")
    return {name: reasons[name] for name in missing}


def without(options: PaletteOptions, lost: Collection[str], n_candidates: int) -> PaletteOptions:
    """Return the palette without lost values, for as many candidates as there are.

    What is asked for then was asked for before, with more: an answer that is there is not refused.
    """
    targets = {name: target for name, target in options.targets.items() if name not in lost}
    is_reject = options.on_infeasible == "reject" and options.scope == "traffic"
    return options.model_copy(
        update={
            "targets": targets,
            "candidates": n_candidates,
            "on_infeasible": "best_effort" if is_reject else options.on_infeasible,
        }
    )


async def promise_without(
    promiser: Promiser,
    options: PaletteOptions,
    calibration: Calibration | None,
    promise: Promise,
    lost: Collection[str],
    n_choices: int,
) -> tuple[PaletteOptions, Promise]:
    """Return the palette without the values that were lost, and its promise on traffic."""
    fewer = without(options, lost, promise.n_candidates)
    if fewer.targets == options.targets:
        return options, promise
    return fewer, await promiser.on_traffic(fewer, calibration, n_choices)
