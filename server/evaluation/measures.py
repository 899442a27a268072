"""What a choice among candidates delivers, with its error: levels, wins, KL, ESS, tokens.

Every function works on groups of N candidates of the same prompt, shape (n_prompts, n_groups, N,
...), and on the weights of a choice among them, shape (n_prompts, n_groups, N). Weights of a group
sum to 1, or are all 0 where floors refuse it.

A mean over served answers is taken as the mean of Σ w r: its expectation given the candidates, so
the draw adds no noise (Rao & Blackwell; Owen, Monte Carlo theory, methods and examples, 2013, 8.7).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from solver.serving import cluster_shares

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]

# Intervals miss as often as this.
MISSES: Final = 0.05
_Z: Final = 1.959963984540054
# With this many fresh answers of a prompt, others add time and little else.
_MOST_FRESH: Final = 32


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean with its sampling error over prompts.

    Attributes
    ----------
    mean, stderr : ndarray, shape (n_columns,)
        NaN where there is nothing to take it of.
    n_clusters : int
        Prompts that the mean is over.
    """

    mean: FloatArray
    stderr: FloatArray
    n_clusters: int

    def half_width(self, more: npt.ArrayLike = 0.0) -> FloatArray:
        """Return half of the 95 % interval, shape (n_columns,).

        Parameters
        ----------
        more : array_like, shape (n_columns,)
            Standard error of what the mean is compared with, independent of it: the variances
            add up. Student's quantile for this mean's own prompts serves for both, which is on the
            safe side.
        """
        spread = np.sqrt(self.stderr**2 + np.asarray(more, dtype=np.float64) ** 2)
        return quantile_of(self.n_clusters) * spread


def quantile_of(n_clusters: int, misses: float = MISSES) -> float:
    """Return Student's quantile of a two-sided interval for a mean of so many clusters."""
    return float(stdtrit(n_clusters - 1, 1.0 - misses / 2)) if n_clusters > 1 else np.inf


def cut(samples: FloatArray, n_candidates: int) -> FloatArray:
    """Return disjoint groups of the candidates, shape (n_prompts, n_groups, N, ...).

    Parameters
    ----------
    samples : ndarray, shape (n_prompts, n_samples, ...)
        Independent draws in an order that says nothing of them; what does not fill a group is left
        out.
    n_candidates : int
        N, at most n_samples.
    """
    n_groups = samples.shape[1] // n_candidates
    kept = samples[:, : n_groups * n_candidates]
    return kept.reshape(len(samples), n_groups, n_candidates, *samples.shape[2:])


def mean_over_prompts(
    rows: FloatArray, is_served: npt.NDArray[np.bool_], cluster: IntArray
) -> Mean:
    """Return the mean row of the groups that are served.

    Parameters
    ----------
    rows : ndarray, shape (n_prompts, n_groups, n_columns)
    is_served : ndarray of bool, shape (n_prompts, n_groups)
    cluster : ndarray of int, shape (n_prompts,)
        Equal for prompts that are the same.

    Notes
    -----
    Groups of one prompt are not independent: the error is the cluster-robust one over prompts
    (Liang & Zeger, Biometrika 73, 1986), as of `solver.serving`.
    """
    kept = rows[is_served]
    if not len(kept):
        nothing = np.full(rows.shape[-1], np.nan)
        return Mean(nothing, nothing, 0)
    where = np.broadcast_to(cluster[:, None], is_served.shape)[is_served]
    clusters, where = np.unique(where, return_inverse=True)
    n = len(clusters)
    shares = cluster_shares(kept, where, n)
    inflation = n / (n - 1) if n > 1 else np.inf
    with np.errstate(invalid="ignore"):  # a single prompt: no error to speak of
        stderr = np.sqrt(inflation * (shares * shares).sum(axis=0))
    return Mean(kept.mean(axis=0), stderr, n)


def served_levels(weights: FloatArray, groups: FloatArray) -> FloatArray:
    """Return Σ w r of each group, shape (n_prompts, n_groups, n_columns)."""
    return np.asarray(np.einsum("pgn,pgnc->pgc", weights, groups))


def win_rates(choose: Callable[[FloatArray], FloatArray], groups: FloatArray) -> FloatArray:
    """Return, by group and value, the chance that the served answer beats a fresh base answer.

    Shape (n_prompts, n_groups, n_values); a tie counts half.

    Parameters
    ----------
    choose : callable
        Returns the weights of the groups it is given.
    groups : ndarray, shape (n_prompts, n_groups, N, n_values)

    Notes
    -----
    Each candidate in turn (the first `_MOST_FRESH` of them) is the fresh answer, and the choice is
    among the others: so the chance is that of a choice among N − 1, without bias. Comparing the
    choice among all N with those it was chosen from would flatter it.
    """
    n = groups.shape[2]
    total = np.zeros((*groups.shape[:2], groups.shape[3]))
    if n == 1:
        return total + 0.5
    n_served = np.zeros(groups.shape[:2])
    for k in range(min(n, _MOST_FRESH)):
        others, fresh = np.delete(groups, k, axis=2), groups[:, :, k : k + 1]
        weights = choose(others)
        wins = (others > fresh) + 0.5 * (others == fresh)
        total += served_levels(weights, wins)
        n_served += np.asarray(weights.any(axis=-1))
    return np.asarray(total / np.maximum(n_served, 1.0)[..., None])


def kl_and_ess(weights: FloatArray) -> FloatArray:
    """Return Σ w log(N w), nats, and 1 / Σ w² of each group, shape (n_prompts, n_groups, 2)."""
    n = weights.shape[-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(weights > 0.0, weights * np.log(n * weights), 0.0)
        sizes = 1.0 / (weights * weights).sum(axis=-1)
    return np.stack([np.maximum(terms.sum(axis=-1), 0.0), sizes], axis=-1)


def share(is_so: npt.NDArray[np.bool_]) -> tuple[float, float, float]:
    """Return the share of prompts for which something holds, with its 95 % interval.

    Wilson's interval (JASA 22, 1927), which stays within 0 and 1; NaN without any prompt.
    """
    n = len(is_so)
    if not n:
        return np.nan, np.nan, np.nan
    p = float(is_so.mean())
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * np.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n)) / (1 + _Z**2 / n)
    return p, max(0.0, float(centre - half)), min(1.0, float(centre + half))


def improves(gains: FloatArray, senses: FloatArray, scale: FloatArray) -> npt.NDArray[np.bool_]:
    """Return which rows are better than the base model on every value of a palette.

    Parameters
    ----------
    gains : ndarray, shape (n_rows, n_values)
        Level less that of the base model, reward units.
    senses : ndarray, shape (n_values,)
        1 where more is wanted, -1 where less, 0 where the value does not count. Without any value
        that counts, no row is better.
    scale : ndarray, shape (n_values,)
        Reward units per standardised unit: differences below 1e-9 of it are rounding.
    """
    counted = np.flatnonzero(senses)
    better = gains[:, counted] * senses[counted] > 1e-9 * scale[counted]
    return np.asarray(better.all(axis=1) & (len(counted) > 0))


def delivery(level: float, asked: tuple[float, float], multiplier: float) -> float:
    """Return how far a level is from what was asked, reward units; negative is a shortfall.

    Parameters
    ----------
    level : float
    asked : (float, float)
        Lowest and highest level asked for; infinite where there is no such end.
    multiplier : float
        Of the palette's own solution. Where it is 0 nothing pulls at the value, and more than was
        asked for is no error.
    """
    low, high = asked
    if multiplier > 0:
        return level - low
    if multiplier < 0:
        return high - level
    return min(level - low, 0.0) + min(high - level, 0.0)
