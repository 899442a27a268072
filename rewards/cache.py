"""A bounded memory of scores: what was scored lately is not scored again."""

from __future__ import annotations

from collections import OrderedDict

from rewards.base import FloatArray


class ScoreCache:
    """Scores by key; the least recently used one leaves first.

    Parameters
    ----------
    max_entries : int
        0 keeps nothing.
    """

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._scores: OrderedDict[tuple[str, bytes], FloatArray] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of scores kept."""
        return len(self._scores)

    def get(self, scorer: str, key: bytes) -> FloatArray | None:
        """Return the outputs of this input, shape (n_outputs,), or None."""
        score = self._scores.get((scorer, key))
        if score is not None:
            self._scores.move_to_end((scorer, key))
        return score

    def put(self, scorer: str, key: bytes, score: FloatArray) -> None:
        """Keep the outputs of an input, and forget the oldest ones beyond the bound."""
        self._scores[scorer, key] = score
        while len(self._scores) > self._max_entries:
            self._scores.popitem(last=False)
