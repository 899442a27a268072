"""Interference: which values pull on each other, and what that does to their multipliers.

At λ = 0 and N → ∞ the Hessian of the served dual is the mean covariance within a prompt (DESIGN.md
2.1), so the multipliers of a small change of levels are λ = Cov⁻¹·Δc, and ½·Δc·Cov⁻¹·Δc is its KL.
In standardised units that is the inverse of the correlation matrix R: its small eigenvalues are the
combinations of values that are dear to pull apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from solver.errors import PilotError
from solver.information import mutual_information
from solver.pilot import PilotSet

FloatArray = npt.NDArray[np.float64]

# Variance, as a share of a value's own, that is rounding: correlations are known no better.
EXACT: Final = 1e-10
# A coefficient is dropped where the combination's variance grows by no more than this without it.
_NEGLIGIBLE: Final = 1.25


@dataclass(frozen=True)
class Combination:
    """A combination of values that hardly varies, so that no cheap multipliers move it.

    Attributes
    ----------
    coefficients : mapping of str to float
        Value name to coefficient per within-prompt standard deviation, of unit length, the largest
        first and positive.
    eigenvalue : float
        Variance of the combination, where a single value has 1; 0 where it is rounding.
    """

    coefficients: Mapping[str, float]
    eigenvalue: float

    @property
    def price(self) -> float:
        """Nats per squared standard deviation, 1/eigenvalue; infinite for an exact combination.

        Targets that ask for δ of the combination need multipliers of length price·δ, and cost
        ½·price·δ² nats, for small δ. Independent values have price 1.
        """
        return math.inf if self.eigenvalue == 0.0 else 1.0 / self.eigenvalue

    @property
    def sentence(self) -> str:
        """The finding and the remedy in words."""
        (first, largest), *rest = self.coefficients.items()
        if len(rest) == 1:
            ((second, coefficient),) = rest
            way = "together" if coefficient < 0 else "against each other"
            moves = f"{first} and {second} move {way}"
        else:
            terms = " ".join(
                f"{'+' if c < 0 else '-'} {abs(c / largest):.2g}·{name}" for name, c in rest
            )
            terms = "-" + terms[2:] if terms.startswith("- ") else terms.removeprefix("+ ")
            moves = f"{first} moves with {terms} (in standard deviations)"
        cost = "no multipliers pull them apart"
        if self.eigenvalue > 0.0:
            moves += f", to within {100 * self.eigenvalue:.2g} % of a value's variance"
            cost = (
                f"targets that pull them apart take {self.price:.2g} times the multipliers that "
                "independent values take"
            )
        return f"{moves}: {cost}. Leave one of them free, or set a ridge."

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-safe maps, with the sentence."""
        return {
            "coefficients": dict(self.coefficients),
            "eigenvalue": self.eigenvalue,
            "price": _finite(self.price),
            "sentence": self.sentence,
        }


@dataclass(frozen=True, eq=False)
class Interference:
    """How the values of a pilot set depend on each other among the answers to one prompt.

    Attributes
    ----------
    values : tuple of str
        Order of every array here.
    constant : tuple of str
        Values that are the same in all answers to a prompt: no choice moves them. Their
        correlations and information with others are 0.
    correlation : ndarray, shape (n_values, n_values)
        Within a prompt; of the pool, when pooled.
    gaussian_information : ndarray, shape (n_values, n_values)
        −½·log(1 − ρ²), nats: the information that the correlation alone would mean between normal
        variables. Infinite for ρ = ±1, NaN on the diagonal.
    mutual_information : ndarray, shape (n_values, n_values)
        Nats, estimated; see `interference`. What exceeds `gaussian_information` is dependence that
        is no straight line. Infinite where one value is a copy of the other, NaN on the diagonal
        and where there are too few samples.
    inflation : ndarray, shape (n_values,)
        Variance inflation (R⁻¹)_ii = 1/(1 − R²_i), R²_i of the regression on the other values
        (Belsley, Kuh & Welsch, Regression Diagnostics, 1980, 3.1): how much steeper λ_i rises with
        its own target, the other levels being kept, than if the value stood alone. Infinite for
        an exact combination of others, and for a constant value, which no multiplier moves.
    collinear : tuple of Combination
        Near-collinear combinations, the tightest first. Each is the tightest that is left once the
        leading value of every one before it is taken out.
    condition_number : float
        Largest by smallest eigenvalue of the correlation matrix of the values that are not
        constant; infinite for an exact combination.
    """

    values: tuple[str, ...]
    constant: tuple[str, ...]
    correlation: FloatArray
    gaussian_information: FloatArray
    mutual_information: FloatArray
    inflation: FloatArray
    collinear: tuple[Combination, ...]
    condition_number: float

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-safe maps, value name to number; None for what is not finite."""
        return {
            "values": list(self.values),
            "constant": list(self.constant),
            "correlation": self._square(self.correlation),
            "gaussian_information": self._square(self.gaussian_information),
            "mutual_information": self._square(self.mutual_information),
            "inflation": self._by_name(self.inflation),
            "collinear": [combination.to_dict() for combination in self.collinear],
            "condition_number": _finite(self.condition_number),
        }

    def _by_name(self, array: FloatArray) -> dict[str, float | None]:
        return {name: _finite(x) for name, x in zip(self.values, array.tolist(), strict=True)}

    def _square(self, array: FloatArray) -> dict[str, dict[str, float | None]]:
        rows = map(self._by_name, array)
        return dict(zip(self.values, rows, strict=True))


def interference(
    pilot: PilotSet, *, threshold: float = 0.05, max_samples: int = 5000, seed: int = 0
) -> Interference:
    """Return which values of `pilot` pull on each other, and at what price.

    Parameters
    ----------
    pilot : PilotSet
    threshold : float
        Eigenvalue of the correlation matrix, in (0, 1), below which a combination is reported. The
        default is that of two values with correlation 0.95, whose multipliers rise 20 times as
        steeply as those of independent values and whose inflation is 10, the customary limit.
    max_samples : int
        Samples, at least 50, on which information is estimated; all else uses the whole pilot set.
    seed : int
        Of the samples, the shuffles and the order of ties.

    Raises
    ------
    PilotError
        An option is outside its limits.

    Notes
    -----
    Information is estimated on deviations from the prompt's mean by estimator 1 of Kraskov,
    Stögbauer & Grassberger (Phys. Rev. E 69, 066138, 2004), after replacing each value by normal
    scores of its ranks. Ties are ranked at random, for each value by itself: a level becomes a
    block in which values are independent, so the information of discrete values is kept.

    Deviations betray the prompt: of two independent counts, the fractions of both deviations are
    those of the prompt's means, and spreads that differ between prompts do so for both. So the same
    estimate on answers shuffled within each prompt, whose values are independent given the prompt,
    is subtracted, and what is negative becomes 0. Units and offsets of prompts do not matter; in a
    pool or a single prompt no monotone change does.

    Single samples are drawn, not whole prompts, after deviations and shuffles are made from all
    answers: so most prompts take part. At 5000 samples the standard error is about 0.02 nats. With
    fewer than 8 candidates a prompt strong dependence is put too low, since a shuffle leaves many
    where they were: by a tenth for 4, and for 2 no more than log 2 is seen.
    """
    _check_options(threshold, max_samples, seed)
    moving = np.flatnonzero(~pilot.is_constant)
    correlation = np.clip(pilot.correlation, -1.0, 1.0)
    gaussian = np.full_like(correlation, np.nan)
    information = np.full_like(correlation, np.nan)
    apart = ~np.eye(pilot.n_values, dtype=bool)
    left = (1.0 - correlation[apart]) * (1.0 + correlation[apart])
    with np.errstate(divide="ignore"):
        gaussian[apart] = -0.5 * np.log(np.where(left > EXACT, left, 0.0))
    information[apart] = 0.0
    information[np.ix_(moving, moving)] = mutual_information(pilot, moving, max_samples, seed)
    inflation = np.full(pilot.n_values, np.inf)
    among = correlation[np.ix_(moving, moving)]
    inflation[moving] = _inflation(among)
    spectrum = np.linalg.eigvalsh(among) if len(moving) else np.ones(1)
    return Interference(
        values=pilot.values,
        constant=tuple(np.array(pilot.values)[pilot.is_constant].tolist()),
        correlation=correlation,
        gaussian_information=gaussian,
        mutual_information=information,
        inflation=inflation,
        collinear=_collinear(among, [pilot.values[i] for i in moving], threshold),
        condition_number=float(spectrum[-1] / spectrum[0]) if spectrum[0] > EXACT else math.inf,
    )


def _inflation(correlation: FloatArray) -> FloatArray:
    """Return 1/(1 − R²) of each value's regression on the others, shape (k,)."""
    inflation = np.empty(len(correlation))
    for i in range(len(correlation)):
        others = np.delete(np.arange(len(correlation)), i)
        cross = correlation[others, i]
        among = correlation[np.ix_(others, others)]
        # The others may be collinear among themselves: least-norm coefficients fit the same.
        left = 1.0 - cross @ np.linalg.pinv(among, rcond=EXACT, hermitian=True) @ cross
        inflation[i] = 1.0 / left if left > EXACT else np.inf
    return inflation


def _collinear(
    correlation: FloatArray, names: list[str], threshold: float
) -> tuple[Combination, ...]:
    """Return combinations with an eigenvalue below `threshold`, until the values left have none."""
    found: list[Combination] = []
    held = list(range(len(names)))
    while len(held) > 1:
        eigenvalue, vector = _tightest(correlation, held)
        if eigenvalue >= threshold:
            break
        limit = min(_NEGLIGIBLE * eigenvalue + EXACT, threshold)
        support = held
        while len(support) > 2:
            # Where several combinations are exact, the vector mixes them; this leaves one of them.
            least = int(np.argmin(np.abs(vector)))
            fewer = support[:least] + support[least + 1 :]
            rest, rest_vector = _tightest(correlation, fewer)
            if rest > limit:
                break
            support, eigenvalue, vector = fewer, rest, rest_vector
        order = np.lexsort((np.arange(len(support)), -np.round(np.abs(vector), 6)))
        vector = vector * np.sign(vector[order[0]])
        found.append(
            Combination(
                {names[support[i]]: float(vector[i]) for i in order},
                eigenvalue if eigenvalue > EXACT else 0.0,
            )
        )
        held = [i for i in held if i != support[order[0]]]
    return tuple(found)


def _tightest(correlation: FloatArray, held: list[int]) -> tuple[float, FloatArray]:
    """Return the smallest eigenvalue among the values held, and its eigenvector, unit length."""
    eigenvalues, vectors = np.linalg.eigh(correlation[np.ix_(held, held)])
    return float(eigenvalues[0]), vectors[:, 0]


def _check_options(threshold: float, max_samples: int, seed: int) -> None:
    if not 0.0 < threshold < 1.0:
        raise PilotError(
            f"threshold: {threshold} is outside (0, 1); 0.05 reports values correlated beyond 0.95."
        )
    for name, number, least in (("max_samples", max_samples, 50), ("seed", seed, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise PilotError(f"{name}: {number!r} is not a whole number from {least} up.")


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
