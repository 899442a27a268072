"""Can these rewards be a pilot set? Every way in which they cannot has its message here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from solver.errors import PilotError
from solver.targets import LARGEST

FloatArray = npt.NDArray[np.float64]


def checked_names(values: Sequence[str]) -> tuple[str, ...]:
    """Return the value names as a tuple.

    Raises
    ------
    PilotError
        There are none, or one is empty, no text, or given twice.
    """
    names = tuple(values) if isinstance(values, Iterable) else ()
    if isinstance(values, str) or not names:
        raise PilotError(
            f"values: expected the names of the rewards, got {values!r}; give one for each column."
        )
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise PilotError(f"values: {name!r} is not a name.")
        if names.count(name) > 1:
            raise PilotError(f"values: {name!r} appears twice; rename one of them.")
    return names


def checked_rewards(rewards: npt.ArrayLike, values: tuple[str, ...], pooled: bool) -> FloatArray:
    """Return the rewards as a new array, C-ordered, of double precision.

    Raises
    ------
    PilotError
        They are ragged, of the wrong shape, empty, not finite, or beyond ±1e100.
    """
    wanted = "(n_samples, n_values)" if pooled else "(n_prompts, n_candidates, n_values)"
    try:
        if isinstance(rewards, np.ma.MaskedArray) or np.iscomplexobj(rewards):
            raise TypeError("they are masked or complex")  # either would be dropped in silence
        array = np.array(rewards, dtype=np.float64, order="C")
    except (TypeError, ValueError) as error:
        raise PilotError(
            f"rewards: not an array of numbers of shape {wanted} ({error}); give every prompt the "
            "same number of answers and every answer every value."
        ) from error
    if array.ndim != (2 if pooled else 3) or array.shape[-1] != len(values):
        raise PilotError(
            f"rewards: shape {array.shape} where {wanted} with n_values = {len(values)} is needed."
        )
    if array.size == 0:
        raise PilotError(f"rewards: shape {array.shape} holds nothing; give at least one answer.")
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(array) <= LARGEST)
    if wrong.any():
        *where, column = (int(i) for i in np.argwhere(wrong)[0])
        place = f"sample {where[0]}" if pooled else f"prompt {where[0]}, answer {where[1]}"
        raise PilotError(
            f"rewards: {values[column]} is {array[(*where, column)]} at {place} (counting from 0); "
            f"every reward must be finite and within ±{LARGEST:g}. Score again or drop the prompt."
        )
    return array
