"""What a scorer has done so far, and whether its last attempt went well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class ScorerHealth:
    """Counters of one scorer since the start.

    Attributes
    ----------
    is_failing : bool
        The last attempt failed; the next success clears it.
    persists : bool
        A trial after that failed as well: it is the scorer, not what was scored.
    last_error : str or None
        Kept after a recovery, so that one can see what happened.
    n_batches, n_texts : int
        Forward passes, and the texts in them.
    n_duplicates : int
        Texts answered without a forward pass of their own: known already, or in flight.
    n_tokens, n_padded_tokens : int
        Tokens of those texts, and of the padded batches they went in.
    """

    is_failing: bool = False
    persists: bool = False
    last_error: str | None = None
    n_batches: int = 0
    n_texts: int = 0
    n_duplicates: int = 0
    n_tokens: int = 0
    n_padded_tokens: int = 0

    def ran(self, lengths: Sequence[int]) -> None:
        """Count one forward pass over texts of these lengths, in tokens."""
        self.is_failing = self.persists = False
        self.n_batches += 1
        self.n_texts += len(lengths)
        self.n_tokens += sum(lengths)
        self.n_padded_tokens += max(lengths) * len(lengths)

    def counted(self, n_texts: int) -> None:
        """Count texts scored without a model."""
        self.is_failing = self.persists = False
        self.n_texts += n_texts

    def failed(self, error: str) -> None:
        """Remember a failure."""
        self.is_failing = True
        self.last_error = error

    def report(self, *, is_hung: bool = False) -> dict[str, object]:
        """Return state and counters as JSON, with the share of padding in [0, 1)."""
        padding = self.n_padded_tokens - self.n_tokens
        return {
            "state": "hung" if is_hung else "failing" if self.is_failing else "ok",
            "persists": is_hung or self.persists,
            "last_error": self.last_error,
            "batches": self.n_batches,
            "texts": self.n_texts,
            "duplicates": self.n_duplicates,
            "padded_share": padding / self.n_padded_tokens if self.n_padded_tokens else 0.0,
        }
