"""Pilot sets whose prompts have different numbers of answers: their statistics and groups.

What a level means must not depend on how many answers each prompt happens to have. So everything
that a small sample biases is that of a prompt with the full number K, the width of the array: the
standard deviation within a prompt exactly, quantiles to the second order (`quantile_weights`).
With K answers to every prompt each function gives what `PilotSet` computes in its own, faster way.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy.special import comb

from solver.errors import PilotError

if TYPE_CHECKING:
    from solver.pilot import PilotSet

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]
BoolArray = npt.NDArray[np.bool_]


def checked_counts(
    counts: npt.ArrayLike | None, rewards: FloatArray, pooled: bool
) -> IntArray | None:
    """Return the number of answers to each prompt, shape (n_prompts,); None when all are full.

    Rewards beyond a prompt's number become 0.

    Raises
    ------
    PilotError
        They are no whole numbers from 1 to the width, one for each prompt, or come with a pool.
    """
    if counts is None:
        return None
    given = np.asarray(counts)
    if pooled or given.shape != rewards.shape[:1] or given.dtype.kind not in "iu":
        raise PilotError(
            "counts: expected a whole number for each prompt, and no pool; leave it out when every "
            "prompt has the same number of answers."
        )
    width = rewards.shape[1]
    if given.min() < 1 or given.max() > width:
        raise PilotError(f"counts: from {given.min()} to {given.max()}, outside 1 to {width}.")
    if given.min() == width:
        return None
    array = given.astype(np.intp)
    rewards[~_held(array, width)] = 0.0
    array.setflags(write=False)
    return array


def promised(counts: IntArray) -> int:
    """Return the largest N that at least half of the prompts have."""
    return int(np.sort(counts)[len(counts) // 2])


def prompt_means(rewards: FloatArray, counts: IntArray) -> FloatArray:
    """Return the mean of each prompt's answers, shape (n_prompts, n_values)."""
    excess = rewards - rewards[:, :1]
    excess[~_held(counts, rewards.shape[1])] = 0.0
    return np.asarray(rewards[:, 0] + excess.sum(axis=1) / counts[:, None])


def covariance(rewards: FloatArray, counts: IntArray, means: FloatArray) -> FloatArray:
    """Return the mean covariance within a prompt of K answers, shape (n_values, n_values).

    Prompts with a single answer say nothing about it.
    """
    spread = rewards - means[:, None]
    spread[~_held(counts, rewards.shape[1])] = 0.0
    spread *= np.sqrt(_weights(counts, rewards.shape[1]))[:, None, None]
    flat = spread.reshape(-1, rewards.shape[2])
    return np.asarray(flat.T @ flat)


def squares(rewards: FloatArray, counts: IntArray) -> FloatArray:
    """Return what each prompt adds to the mean variance, shape (n_prompts,).

    Parameters
    ----------
    rewards : ndarray, shape (n_prompts, K)
        Of one value; the mean of what is returned is `covariance`'s entry for it.
    """
    held = _held(counts, rewards.shape[1])
    means = np.where(held, rewards, 0.0).sum(axis=1) / counts
    deviations = np.where(held, rewards - means[:, None], 0.0)
    sums = (deviations * deviations).sum(axis=1)
    # Prompts without a variance of their own count as average ones, which moves no mean.
    weights = _weights(counts, rewards.shape[1])
    average = float((sums * weights).sum())
    shares = sums * weights * len(counts)
    known = int(np.count_nonzero(counts > 1))
    return np.asarray(shares + average * (1.0 - len(counts) * (counts > 1) / max(known, 1)))


def _weights(counts: IntArray, width: int) -> FloatArray:
    """Return the weight of each prompt's sum of squares in the variance of K answers."""
    known = max(1, int(np.count_nonzero(counts > 1)))
    unbiased = np.where(counts > 1, 1.0 / np.maximum(counts - 1, 1), 0.0)
    return np.asarray(unbiased * ((width - 1) / width / known))


def quantiles(rewards: FloatArray, counts: IntArray, q: float) -> FloatArray:
    """Return the q-quantile of each prompt's answers, shape (n_prompts,).

    Parameters
    ----------
    rewards : ndarray, shape (n_prompts, K)
        Of one value.
    counts : ndarray of int, shape (n_prompts,)
    q : float
        In [0, 1].
    """
    result = np.empty(len(rewards))
    for n in np.unique(counts):
        of_n = counts == n
        ordered = np.sort(rewards[of_n, :n], axis=1)
        result[of_n] = ordered @ quantile_weights(q, int(n), rewards.shape[1])
    return result


@functools.lru_cache(maxsize=1024)
def quantile_weights(q: float, n: int, width: int) -> FloatArray:
    """Return the weights of n sorted answers in the estimate of K answers' q-quantile, (n,).

    Notes
    -----
    With K answers it is the order statistic at 1 + q (K − 1), interpolated: numpy's default. Its
    expectation is Q(p) + p (1 − p) Q''(p) / (2 (K + 2)) + O(1/K²) with p = rank/(K + 1) and the
    quantile function Q (David & Nagaraja, Order Statistics 2003, 4.6). So n answers are read at the
    same p, and the second term is brought from n to K by a straight line in 1/(n + 2) through the
    mean over subsets of half as many (which are weights on the same order statistics).

    Half of fewer than 8 answers, or a rank at their edge, is too little for that: then n answers
    are read where the median rank (h − 1/3)/(n + 1/3) is the same (Hyndman & Fan 1996, The American
    Statistician 50, 361-365, definition 8), which is close for rewards that are about normal.
    Ranks that n answers do not reach become their smallest or largest: an extreme quantile of few
    answers is too mild.
    """
    at = q * (width - 1)
    if n == width:
        below = min(int(at), width - 2) if width > 1 else 0
        weights = np.zeros(width)
        weights[below : below + 2] = (1.0 - (at - below), at - below)[: width - below]
        return weights
    half = n // 2
    p = (1.0 + at) / (width + 1)
    if n < 8 or not 1.5 <= p * (half + 1) <= half - 0.5:
        p = (at + 2 / 3) / (width + 1 / 3)
        return _order_statistic(p * (n + 1 / 3) + 1 / 3, n)
    own = _order_statistic(p * (n + 1), n)
    place = np.arange(1, n + 1)[:, None]
    rank = np.arange(1, half + 1)
    # Of `half` answers drawn from n, the one at `rank` is the one at `place`, with probability:
    chance = comb(place - 1, rank - 1) * comb(n - place, half - rank) / comb(n, half)
    near, far, wanted = 1 / (n + 2), 1 / (half + 2), 1 / (width + 2)
    step = (near - wanted) / (far - near)
    return np.asarray(own + step * (own - chance @ _order_statistic(p * (half + 1), half)))


def _order_statistic(rank: float, n: int) -> FloatArray:
    """Return the weights of n sorted answers in the order statistic at a rank between 1 and n.

    Between ranks it is the cubic through the four nearest: a straight line would bend the curve of
    the expectations by as much as is corrected.
    """
    at = min(max(rank - 1.0, 0.0), n - 1.0)
    first = min(max(int(at) - 1, 0), max(n - 4, 0))
    ranks = np.arange(first, min(first + 4, n))
    weights = np.zeros(n)
    for one in ranks:
        others = ranks[ranks != one]
        weights[one] = np.prod((at - others) / (one - others))
    return weights


def pooled_quantile(rewards: FloatArray, counts: IntArray, q: float) -> FloatArray:
    """Return the q-quantile over all answers, every prompt counting as much, shape (n_values,).

    Between the middles of the sorted answers' shares it interpolates linearly, which with equal
    shares is numpy's default.
    """
    held = _held(counts, rewards.shape[1])
    flat = rewards[held]
    share = np.repeat(1.0 / counts / len(counts), counts)
    result = np.empty(flat.shape[1])
    for i, column in enumerate(flat.T):
        order = np.argsort(column, kind="stable")
        own = share[order]
        middle = np.cumsum(own) - 0.5 * own
        middle = (middle - middle[0]) / max(middle[-1] - middle[0], np.finfo(float).tiny)
        result[i] = np.interp(q, middle, column[order])
    return result


def cut_prompts(
    pilot: PilotSet, size: int, groups: int | None, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int32], IntArray]:
    """Return groups of `size` answers as `Groups.sample` and `Groups.prompt`.

    Only prompts with at least `size` answers have groups, each as many (one more or less, where
    `groups` does not divide): a prompt counts as much however many answers it has. By default
    there are as many rounds as make about as many groups as there are disjoint ones.
    """
    assert pilot.counts is not None
    eligible = np.flatnonzero(pilot.counts >= size)
    disjoint = pilot.counts[eligible] // size
    wanted = int(disjoint.sum()) if groups is None else groups
    n_rounds = max(
        1, round(wanted / len(eligible)) if groups is None else -(-wanted // len(eligible))
    )
    width = pilot.rewards.shape[1]
    rounds = np.empty((n_rounds, len(eligible), size), dtype=np.int32)
    for n in np.unique(pilot.counts[eligible]):
        of_n = np.flatnonzero(pilot.counts[eligible] == n)
        per_cut = int(n) // size
        rows = np.broadcast_to(np.arange(n, dtype=np.int32), (len(of_n), int(n)))
        cuts = [
            rng.permuted(rows, axis=1)[:, : per_cut * size].reshape(len(of_n), per_cut, size)
            for _ in range(-(-n_rounds // per_cut))
        ]
        cut = np.concatenate(cuts, axis=1)[:, :n_rounds]
        first = (eligible[of_n] * width).astype(np.int32)
        rounds[:, of_n] = (cut + first[:, None, None]).transpose(1, 0, 2)
    prompt = np.tile(eligible, n_rounds)
    keep = np.arange(len(prompt))
    if groups is not None and groups < len(prompt):
        last = (n_rounds - 1) * len(eligible)
        keep[last:] = last + rng.permutation(len(eligible))
        keep = keep[:groups]
    return rounds.reshape(-1, size)[keep], prompt[keep]


def _held(counts: IntArray, width: int) -> BoolArray:
    return np.asarray(np.arange(width) < counts[:, None])
