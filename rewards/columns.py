"""From the outputs of scorers to the columns of a suite: one output each, or a weighted sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rewards.base import FloatArray, Scorer


@dataclass(frozen=True, slots=True)
class Term:
    """One output of a scorer, and its weight in a column."""

    scorer: str
    output: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the matrix of rewards.

    Attributes
    ----------
    name : str
    terms : tuple of Term
        Summed up.
    """

    name: str
    terms: tuple[Term, ...]

    @property
    def scorers(self) -> tuple[str, ...]:
        """Names of the scorers that it needs."""
        return tuple(dict.fromkeys(term.scorer for term in self.terms))

    def read(self, scores: Mapping[str, FloatArray], scorers: Mapping[str, Scorer]) -> FloatArray:
        """Return the column, shape (n_samples,), from each scorer's (n_samples, n_outputs)."""
        parts = [
            term.weight * scores[term.scorer][:, scorers[term.scorer].outputs.index(term.output)]
            for term in self.terms
        ]
        return sum(parts[1:], start=parts[0])

    def identity(self, scorers: Mapping[str, Scorer]) -> list[object]:
        """Return what its numbers depend on, as JSON, the name included."""
        if len(self.terms) == 1 and self.terms[0].weight == 1.0:
            return [self.name, scorers[self.terms[0].scorer].identity(self.terms[0].output)]
        mixed = [[term.weight, scorers[term.scorer].identity(term.output)] for term in self.terms]
        return [self.name, {"mix": mixed}]
