"""What a solve found: the status, whose text is the remedy, and the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


class Status(StrEnum):
    """Outcome of a solve; ``Status.OPTIMAL.sentence`` says what it means and what to do."""

    sentence: str

    OPTIMAL = "optimal", "The multipliers meet the palette as served."
    INFEASIBLE = (
        "infeasible",
        "No choice among this many candidates reaches the palette; the certificate says by how "
        "much. Ask for less, let it be repaired, or sample more candidates.",
    )
    BOUNDARY = (
        "boundary",
        "The palette is the very limit of what a choice among this many candidates reaches, and "
        "needs unbounded multipliers; those given come close. Ask for a little less.",
    )
    STEP_LIMIT = (
        "step_limit",
        "The iteration ended before its tolerance, and no proof was found that the palette is out "
        "of reach. Raise max_iterations, or ask for a little less.",
    )
    NOT_FINITE = (
        "not_finite",
        "Multipliers times rewards overflow. Lower the given multipliers.",
    )

    def __new__(cls, word: str, sentence: str) -> Status:
        """Make a member that equals its word and carries its sentence."""
        member = str.__new__(cls, word)
        member._value_ = word
        member.sentence = sentence
        return member


@dataclass(frozen=True)
class Certificate:
    """Proof that a palette is out of reach: a direction u with u·c > h_N(u).

    Attributes
    ----------
    direction : dict of str to float
        Value name to u_i, per reward unit and scaled to Σ|u_i| = 1; negative for an upper target.
    asked : float
        u·c, what the palette asks of this combination.
    limit : float
        h_N(u), the most that any choice gives of it.
    candidates : int or math.inf
    """

    direction: Mapping[str, float]
    asked: float
    limit: float
    candidates: float

    @property
    def sentence(self) -> str:
        """The proof in words."""
        if self.candidates == math.inf:
            among = "all answers"
        else:
            among = f"{int(self.candidates)} candidate{'s' * (self.candidates > 1)}"
        if len(self.direction) == 1:
            ((name, sign),) = self.direction.items()
            way = "more" if sign > 0 else "less"
            asked, limit = _distinct(self.asked / sign, self.limit / sign)
            return (
                f"no choice among {among} gives {way} than {limit} of {name}; the palette asks "
                f"for {asked}"
            )
        terms = " ".join(
            f"{'-' if u < 0 else '+'} {abs(u):.3g}·{name}" for name, u in self.direction.items()
        ).removeprefix("+ ")
        terms = "-" + terms.removeprefix("- ") if terms.startswith("- ") else terms
        asked, limit = _distinct(self.asked, self.limit)
        return (
            f"no choice among {among} gives more than {limit} of {terms}; the palette asks for "
            f"{asked}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-safe maps, with the sentence."""
        return {
            "direction": dict(self.direction),
            "asked": self.asked,
            "limit": self.limit,
            "candidates": _count(self.candidates),
            "sentence": self.sentence,
        }


@dataclass(frozen=True, eq=False)
class Solution:
    """The multipliers of a palette, and what they deliver.

    Attributes
    ----------
    status : Status
    values : tuple of str
        Order of every array here; all have shape (n_values,).
    targets : mapping of str to float or (float, float)
        Level asked, reward units; a pair for ``between``. Free values and given multipliers have
        none.
    multipliers : ndarray
        Per reward unit; 0 for a free value. Where the status is not optimal they are the last
        iterate: close for boundary and step limit, meaningless for the others.
    expected, stderr, base : ndarray
        Level served and its standard error over prompts; level of the base model. Reward units.
    ess, kl : float
        Means over the groups: effective number of candidates; nats against the uniform choice.
    candidates : int or math.inf
    certificate : Certificate, optional
        Where infeasible, unless every group was refused.
    kkt_residual : float
        Standardised units.
    iterations : int
        Newton steps of the last stage.
    refused : float
        Share of the groups in which no candidate reaches the floors.
    pooled : bool
        Whether groups were drawn across prompts.
    fraction, limited_by
        With a KL budget: how far from the start (0) to the palette (1) `targets` lies, and
        "max_kl" where the budget stopped it short.
    solve_ms : float
    """

    status: Status
    values: tuple[str, ...]
    targets: Mapping[str, float | tuple[float, float]]
    multipliers: FloatArray
    expected: FloatArray
    stderr: FloatArray
    base: FloatArray
    ess: float
    kl: float
    candidates: float
    certificate: Certificate | None = None
    kkt_residual: float = 0.0
    iterations: int = 0
    refused: float = 0.0
    pooled: bool = False
    fraction: float = 1.0
    limited_by: str | None = None
    solve_ms: float = 0.0

    @property
    def is_achievable(self) -> bool:
        """Whether some choice reaches the palette, if only in the limit."""
        return self.status in (Status.OPTIMAL, Status.BOUNDARY, Status.STEP_LIMIT)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-safe maps, value name to number."""
        return {
            "status": self.status.value,
            "values": list(self.values),
            "targets": {
                name: list(level) if isinstance(level, tuple) else level
                for name, level in self.targets.items()
            },
            "multipliers": self._by_name(self.multipliers),
            "expected": self._by_name(self.expected),
            "stderr": self._by_name(self.stderr),
            "base": self._by_name(self.base),
            "ess": self.ess,
            "kl": self.kl,
            "candidates": _count(self.candidates),
            "certificate": self.certificate.to_dict() if self.certificate else None,
            "kkt_residual": _finite(self.kkt_residual),
            "iterations": self.iterations,
            "refused": self.refused,
            "pooled": self.pooled,
            "fraction": self.fraction,
            "limited_by": self.limited_by,
            "solve_ms": self.solve_ms,
        }

    def _by_name(self, array: FloatArray) -> dict[str, float | None]:
        return {name: _finite(x) for name, x in zip(self.values, array.tolist(), strict=True)}


def _finite(number: float) -> float | None:
    """JSON has no infinities; `null` says that a number overflowed."""
    return number if math.isfinite(number) else None


def _count(candidates: float) -> int | str:
    return "inf" if candidates == math.inf else int(candidates)


def _distinct(asked: float, limit: float) -> tuple[str, str]:
    """Return both numbers with as few digits, from 3 up, as tell them apart."""
    for digits in range(3, 17):
        texts = f"{asked:.{digits}g}", f"{limit:.{digits}g}"
        if texts[0] != texts[1]:
            return texts
    return repr(asked), repr(limit)
