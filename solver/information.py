"""Mutual information between values among the answers to one prompt."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree
from scipy.special import digamma, ndtri

from solver.pilot import PilotSet

FloatArray = npt.NDArray[np.float64]

# Neighbours: of 3 to 5 the least noisy.
_NEIGHBOURS: Final = 5


def mutual_information(
    pilot: PilotSet, columns: npt.NDArray[np.intp], max_samples: int, seed: int
) -> FloatArray:
    """Return the estimated information between the values of `columns`, shape (k, k), in nats.

    NaN on the diagonal, and everywhere when there are too few samples; infinite for copies.

    Parameters
    ----------
    pilot : PilotSet
    columns : ndarray of int, shape (k,)
        Values that vary within a prompt.
    max_samples, seed : int
        Samples used, and the seed of drawing, shuffling and ordering ties.

    Notes
    -----
    Why it is done this way is told in `solver.interferences.interference`.
    """
    information = np.full((len(columns), len(columns)), np.nan)
    rewards = pilot.rewards[None] if pilot.pooled else pilot.rewards
    if pilot.counts is not None:  # as many answers to each prompt: the first are as good as any
        rewards = rewards[pilot.counts >= pilot.n_candidates, : pilot.n_candidates]
    n_samples = rewards.shape[0] * rewards.shape[1]
    if min(n_samples, max_samples) <= _NEIGHBOURS:
        return information
    rng = np.random.default_rng(seed)
    drawn: npt.NDArray[np.intp] | slice = slice(None)
    if n_samples > max_samples:
        drawn = np.sort(rng.choice(n_samples, max_samples, replace=False))
    scores, shuffled = [], []
    for column in columns:
        # From the first answer on, a large offset costs no digits.
        excess = rewards[..., column] - rewards[:, :1, column]
        excess -= excess.mean(axis=1, keepdims=True)
        # Equal deviations of different prompts differ by rounding, which must not order them.
        excess = np.round(excess / pilot.scale[column], 9)
        scores.append(_normal_scores(excess.ravel()[drawn], rng))
        shuffled.append(_normal_scores(rng.permuted(excess, axis=1).ravel()[drawn], rng))
    for i, x in enumerate(scores):
        for j, y in enumerate(scores[:i]):
            estimate = math.inf
            if not _is_copy(x, y):
                null = _kraskov(x, shuffled[j]) + _kraskov(shuffled[i], y)
                estimate = max(0.0, _kraskov(x, y) - 0.5 * null)
            information[i, j] = information[j, i] = estimate
    return information


def _is_copy(x: FloatArray, y: FloatArray) -> bool:
    """Return whether half of the samples have the same, or opposite, place in both orders.

    Then one variable is a function of the other on samples that repeat no level: where levels
    repeat, ties are ordered apart. No finite estimate would be right.
    """
    same, opposite = np.mean(x == y), np.mean(x == -y)
    return bool(max(same, opposite) >= 0.5)


def _normal_scores(sample: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Return the normal quantiles of the ranks, ties in random order, shape (n_samples,)."""
    n_samples = len(sample)
    grid = ndtri((np.arange(n_samples // 2) + 0.5) / n_samples)
    middle = np.zeros(n_samples % 2)
    scores = np.empty(n_samples)
    scores[np.lexsort((rng.random(n_samples), sample))] = np.concatenate(
        [grid, middle, -grid[::-1]]  # symmetric to the last digit
    )
    return scores


def _kraskov(x: FloatArray, y: FloatArray) -> float:
    """Return the mutual information of two samples without ties, nats, biased below 0 too.

    Kraskov, Stögbauer & Grassberger (2004), eq. (8): ψ(k) + ψ(n) − mean of ψ(n_x + 1) + ψ(n_y + 1),
    where n_x counts the others strictly nearer in x than the k-th neighbour in the maximum norm.
    """
    points = np.stack([x, y], axis=1)
    radius = np.asarray(cKDTree(points).query(points, [_NEIGHBOURS + 1], p=np.inf)[0])[:, 0]
    radius *= 1.0 - 1e-9  # or rounding would count some neighbours that lie on it
    total = 0.0
    for z in (x, y):
        ordered = np.sort(z)
        last = np.searchsorted(ordered, z + radius, side="left")
        first = np.searchsorted(ordered, z - radius, side="right")
        total += float(digamma(last - first).mean())  # the point itself is the 1 of n_x + 1
    return float(digamma(_NEIGHBOURS) + digamma(len(x)) - total)
