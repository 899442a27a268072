"""Have levels left what was promised? A test that may be looked at after every request.

The null hypothesis allows at every step a mean within ±`allowed`: a promise is an estimate, and a
test that did not allow for its error would find the error. Steps may differ in what was promised,
allowed and how much they scatter, so one stream holds the requests of many palettes.

Evidence is an e-process. With influence φ(x) = sign(x) log(1 + |x| + x²/2) and a spread σ that
bounds the standard deviation, E exp(φ(λ(z − a)/σ) − λ²/2) <= 1 whenever E z <= a, for rewards of
any shape with a variance (Catoni 2012, Ann. Inst. H. Poincaré 48, 1148-1185; Wang & Ramdas 2023,
Stoch. Proc. Appl. 163, 168-202). Products of these are averaged over a grid of λ, for drifts of any
size, and over the step at which they begin, with weights that sum to one, for drifts that begin at
any time (mixtures of e-processes: Shin, Ramdas & Rinaldo 2023, "E-detectors", New England J. Stat.
Data Sci. 2, 229-260). By Ville's inequality the average reaches 1/α with probability α at most over
a whole run, however long; it finds a drift of δ spreads that begins at step T after about
2 (log T + 2 log log T + log 1/α)/δ² steps.

σ is not known: the larger of the caller's and of a running estimate is used, so that the statement
is exact where the caller's is an upper bound, and asymptotic where not; the first steps only teach.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]

# Drifts, in spreads, that are looked for; others are found with those next to them.
_SIZES = 2.0 ** -np.arange(6.0)
# Share of the newest step in the running variance.
_NEWEST = 1 / 128
# Steps before evidence is gathered: the variance of fewer is hardly known.
_LESSONS = 30
# Evidence is kept below this: more says nothing more, and must not overflow.
_MOST = 1e200
# Steps for which intervals are made narrowest.
_NARROWEST_AT = 300


@dataclass(frozen=True, slots=True)
class Drift:
    """What a test knows; all arrays have shape (n_streams,).

    Attributes
    ----------
    direction : ndarray of int
        1 or -1 while a stream's mean is above or below what was allowed, else 0.
    since : ndarray of int
        Step of the last change of `direction`, from 0.
    n_steps : int
        Steps so far.
    n_since : ndarray of int
        Steps since then that a stream took part in.
    mean, low, high : ndarray
        Mean of the differences since then and an interval for the mean of their expectations that
        holds at all times together, at the test's level; infinite with fewer than two steps.
    allowed : ndarray
        What was allowed, mean since then.
    """

    direction: IntArray
    since: IntArray
    n_since: IntArray
    n_steps: int
    mean: FloatArray
    low: FloatArray
    high: FloatArray
    allowed: FloatArray


class DriftTest:
    """Sequential test of |mean| <= allowed for several streams.

    Parameters
    ----------
    n_streams : int
    alpha : float
        Probability, for each stream, of ever calling a drift that is none; and for each drift
        found, of calling it over while at least half of it, roughly, is there.
    """

    def __init__(self, n_streams: int, alpha: float) -> None:
        self.alpha = alpha
        self._threshold = 2.0 / alpha
        self._n_steps = 0
        self._evidence = np.zeros((len(_SIZES), 2, n_streams))  # too high, too low
        self._relief = np.zeros((len(_SIZES), n_streams))
        self._excess = np.zeros(n_streams)
        self._direction = np.zeros(n_streams, dtype=np.intp)
        self._since = np.zeros(n_streams, dtype=np.intp)
        self._last = np.full(n_streams, np.nan)
        self._variance = np.zeros(n_streams)
        self._n_learnt = np.zeros(n_streams)
        # steps, differences, squares, allowed, squared spreads
        self._sums = np.zeros((5, n_streams))

    def update(
        self, differences: npt.ArrayLike, allowed: npt.ArrayLike, spread: npt.ArrayLike
    ) -> None:
        """Take one step.

        Parameters
        ----------
        differences : array_like, shape (n_streams,)
            Found minus promised; NaN for a stream that has no part in this step.
        allowed : array_like, shape (n_streams,)
            Largest size of its expectation that is no drift; known before the difference.
        spread : array_like, shape (n_streams,)
            Its standard deviation as far as it is known before; 0 where it is not.
        """
        z, a = np.asarray(differences, dtype=float), np.asarray(allowed, dtype=float)
        is_in = ~np.isnan(z)
        z, a = np.where(is_in, z, 0.0), np.where(is_in, a, 0.0)
        sigma = np.maximum(np.sqrt(self._variance), np.where(is_in, spread, 0.0))
        sigma = np.where(sigma > 0.0, sigma, np.maximum(np.abs(z) + a, np.finfo(float).tiny))
        self._n_steps += 1
        self._learn(z, is_in)
        is_in &= self._n_learnt >= _LESSONS
        begins = 1 / math.log2(self._n_steps + 1) - 1 / math.log2(self._n_steps + 2)
        begins = begins / len(_SIZES) * is_in
        sizes = _SIZES[:, None] * is_in
        self._evidence += begins
        self._evidence *= _factor(np.stack([z - a, -z - a]) / sigma, sizes[:, None])
        np.minimum(self._evidence, _MOST, out=self._evidence)
        # Of a drift that was found: does the mean still exceed what is allowed by half of it?
        left = (a + 0.5 * self._excess - self._direction * z) / sigma
        self._relief += begins
        self._relief *= _factor(left, sizes)
        np.minimum(self._relief, _MOST, out=self._relief)
        self._sums += np.stack([np.ones_like(z), z, z * z, a, sigma * sigma]) * is_in
        self._turn(sigma)

    @property
    def directions(self) -> IntArray:
        """`Drift.direction` as it is now, without the rest."""
        return self._direction.copy()

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Return all that the test knows, by name: another one that restores it is this one."""
        kept = {name: array.copy() for name, array in self._arrays().items()}
        return {"design": self._design(), "n_steps": np.array(self._n_steps), **kept}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take over what `state` returned; names beyond those are not read.

        Raises
        ------
        ValueError
            When it is of a test of other streams or another design, or no state at all. Nothing is
            taken over then.
        """
        arrays = self._arrays()
        missing = {"design", "n_steps", *arrays} - set(state)
        if missing:
            raise ValueError(f"there is no {min(missing)}")
        if not np.array_equal(state["design"], self._design()):
            raise ValueError("its probability or its grid is another one")
        for name, array in arrays.items():
            found = state[name]
            if found.shape != array.shape or not np.can_cast(found.dtype, array.dtype, "safe"):
                raise ValueError(f"its {name} is {found.dtype} of shape {found.shape}")
            if name != "last" and not np.isfinite(found).all():
                raise ValueError(f"its {name} is not finite")
        n_steps = state["n_steps"]
        if n_steps.shape != () or n_steps.dtype.kind not in "iu" or n_steps < 0:
            raise ValueError("its number of steps is none")
        for name, array in arrays.items():
            array[...] = state[name]
        self._n_steps = int(n_steps)

    def _design(self) -> FloatArray:
        """Return what evidence of different tests must agree on to be the same evidence."""
        return np.array([self.alpha, _NEWEST, _LESSONS, _MOST, *_SIZES])

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {
            "evidence": self._evidence,
            "relief": self._relief,
            "excess": self._excess,
            "direction": self._direction,
            "since": self._since,
            "last": self._last,
            "variance": self._variance,
            "n_learnt": self._n_learnt,
            "sums": self._sums,
        }

    def _turn(self, sigma: FloatArray) -> None:
        """Change the direction of streams where there is the evidence for it."""
        whole = self._evidence.sum(axis=0)
        side = whole.argmax(axis=0)
        columns = np.arange(len(side))
        is_quiet = self._direction == 0
        found = is_quiet & (whole[side, columns] >= self._threshold)
        over = ~is_quiet & (self._relief.sum(axis=0) >= self._threshold)
        if not (found.any() or over.any()):
            return
        # The products grow fastest at the λ that is the drift in spreads.
        size = _SIZES[self._evidence[:, side, columns].argmax(axis=0)]
        self._excess = np.where(found, size * sigma, np.where(over, 0.0, self._excess))
        self._direction = np.where(found, 1 - 2 * side, np.where(over, 0, self._direction)).astype(
            np.intp
        )
        turned = found | over
        self._since[turned] = self._n_steps
        self._evidence[..., turned] = 0.0
        self._relief[:, turned] = 0.0
        self._sums[:, turned] = 0.0

    def _learn(self, z: FloatArray, is_in: npt.NDArray[np.bool_]) -> None:
        """Take the difference into the running variance.

        Half the square of successive differences: a mean that moves is no variance.
        """
        step = np.where(is_in, z - self._last, np.nan)
        is_step = ~np.isnan(step)
        self._n_learnt += is_in
        share = np.maximum(_NEWEST, 1.0 / np.maximum(self._n_learnt - 1.0, 1.0))
        moved = self._variance + share * (0.5 * step * step - self._variance)
        self._variance = np.where(is_step, moved, self._variance)
        self._last = np.where(is_in, z, self._last)

    def drift(self) -> Drift:
        """Return what is known now.

        Notes
        -----
        The interval is the asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy
        & Ramdas (2024, Ann. Statist. 52, 2613-2640), eq. (6); it begins anew when a stream turns.
        """
        counted, total, squares, allowed, spreads = self._sums
        n = np.maximum(counted, 1.0)
        mean = total / n
        # What was thought before counts as well: few draws of a rare event may all be the same.
        variance = np.maximum(squares / n - mean * mean, spreads / n)
        log_alpha = math.log(self.alpha)
        rho2 = (-2 * log_alpha + math.log(-2 * log_alpha + 1)) / _NARROWEST_AT
        grown = n * rho2 + 1.0
        width = np.sqrt(variance * 2 * grown / (n * n * rho2) * (0.5 * np.log(grown) - log_alpha))
        width = np.where(n < 2, np.inf, width)
        return Drift(
            self._direction.copy(),
            self._since.copy(),
            counted.astype(np.intp),
            self._n_steps,
            mean,
            mean - width,
            mean + width,
            allowed / n,
        )


def allowance(stderr: npt.ArrayLike, alpha: float) -> FloatArray:
    """Return the error of an estimate that is exceeded with probability `alpha`, shape as given.

    Of a normal estimate with this standard error.
    """
    return np.asarray(stderr, dtype=float) * NormalDist().inv_cdf(1.0 - alpha / 2.0)


def _factor(x: FloatArray, sizes: FloatArray) -> FloatArray:
    """Return exp(φ(λx) − λ²/2), whose expectation is at most 1, for all sizes λ."""
    scaled = sizes * x
    grown = 1.0 + np.abs(scaled) + 0.5 * scaled * scaled
    return np.asarray(np.where(scaled >= 0.0, grown, 1.0 / grown) * np.exp(-0.5 * sizes * sizes))
