"""How large the batches of each scorer may become, now."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from rewards.base import BatchedScorer
from rewards.batch import BatchLimits

# A batch that went well makes the next one so much larger, until all is given back: what took the
# memory may have left. Twice as much after 35 batches, so at most one pass in 35 fails for it.
_GROWTH = 1.02


class Budgets:
    """Limits by scorer; smaller after the device ran out of memory, then slowly whole again.

    Not locked: the worker guards it.
    """

    def __init__(self) -> None:
        self._full: dict[BatchedScorer, BatchLimits] = {}
        self._lowered: dict[BatchedScorer, float] = {}

    def settle(self, limits: Mapping[BatchedScorer, BatchLimits]) -> None:
        """Set the limits that suit device and model."""
        self._full = dict(limits)

    def of(self, scorer: BatchedScorer) -> BatchLimits:
        """Return the limits of the next batch of this scorer."""
        full = self._full[scorer]
        if scorer not in self._lowered:
            return full
        return dataclasses.replace(full, max_tokens=int(self._lowered[scorer]))

    def went_well(self, scorer: BatchedScorer) -> None:
        """Give back a little of what was taken away."""
        if scorer in self._lowered:
            self._lowered[scorer] *= _GROWTH
            if self._lowered[scorer] >= self._full[scorer].max_tokens:
                del self._lowered[scorer]

    def ran_out(self, scorer: BatchedScorer, n_padded: int) -> None:
        """Halve the limit: a batch of this padded size was too large."""
        self._lowered[scorer] = min(self._lowered.get(scorer, n_padded), n_padded) / 2


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a forward pass failed for want of memory, so that a smaller one may not.

    torch has a class of its own for GPUs only, and must not be imported here.
    """
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (
            type(error).__name__ == "OutOfMemoryError"
            or "DefaultCPUAllocator" in text
            or "CUBLAS_STATUS_ALLOC_FAILED" in text
        )
    )
