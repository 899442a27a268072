"""What is served at given multipliers: levels with their errors, effective sample size, KL."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from solver.dual import ServedDual, softmax
from solver.groups import Groups

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Served:
    """Means over the groups of what their choice delivers.

    Attributes
    ----------
    expected, stderr : ndarray, shape (n_values,)
        Expected level of the served answer and its sampling error over prompts, reward units.
    ess : float
        Effective number of candidates, 1 / Σ w².
    kl : float
        Nats against the uniform choice among all N.
    """

    expected: FloatArray
    stderr: FloatArray
    ess: float
    kl: float


def serve(dual: ServedDual, multipliers: FloatArray) -> Served:
    """Return what is served at standardised multipliers of the solved values, shape (k,).

    Notes
    -----
    `stderr` is the error of `expected` around the true level served at these very multipliers,
    also where they were solved on the same groups: what λ̂ gets wrong moves both levels alike, so
    L(λ̂) − L̂(λ̂) is L(λ) − L̂(λ) at the true λ, to first order.
    """
    groups = dual.groups
    if not dual.n_groups:
        nothing = np.zeros(len(groups.scale))
        return Served(groups.base, nothing, 0.0, 0.0)
    everything = dual.full(multipliers)
    excesses, sizes, divergences = [], [], []
    weights = np.empty((0, 0))
    with np.errstate(over="ignore", invalid="ignore"):
        for part in dual.parts():
            x = part.excess
            weights, log_z, _ = softmax(everything, x, part.mask, None)
            excess = (x * weights).sum(axis=1)
            excesses.append(excess)
            sizes.append(1.0 / (weights * weights).sum(axis=0))
            divergences.append(everything @ excess - log_z)  # Σ w log w, as log w = λ·x − log Z
        excess = np.concatenate(excesses, axis=1).T if len(excesses) > 1 else excesses[0].T
        ess = sum(float(part.sum()) for part in sizes) / dual.n_groups
        kl = sum(float(part.sum()) for part in divergences) / dual.n_groups
        kl += math.log(groups.n_candidates)
        expected = dual.origin + groups.scale * excess.mean(axis=0)
        shares = level_shares(dual, excess, weights)
        error = np.sqrt(inflation(dual) * (shares * shares).sum(axis=0))
    return Served(expected, error, ess, max(0.0, kl))


def is_one_pool(groups: Groups) -> bool:
    """Return whether a whole pool is the single group: then each sample is a cluster."""
    return groups.pooled and groups.n_groups == 1


def level_shares(dual: ServedDual, excess: FloatArray, weights: FloatArray) -> FloatArray:
    """Return what each cluster adds to the error of the mean level, (n_clusters, n_values).

    Parameters
    ----------
    dual : ServedDual
    excess : ndarray, shape (n_groups served, n_values)
        Of each group's choice over the mean of the group, standardised.
    weights : ndarray, shape (n_candidates, n_groups of the last block)
        Used when a pool is the single group.

    Notes
    -----
    To first order an estimate misses its limit by a sum of one term a cluster, its influence
    divided by the number of clusters; clusters are independent, so the squares add up. For a
    self-normalised mean over one pool a sample's term is w (r − r̄) (Owen, Monte Carlo 2013, 9.9).
    Where floors refuse groups the mean is a ratio of two sums, and a prompt counts by its share
    of the groups that are served. The base level is that of all candidates: prompts' own means
    take the place of the groups', which may leave some out.
    """
    groups, prompt_means = dual.groups, dual.groups.prompt_means
    if is_one_pool(groups):
        (part,) = dual.parts()
        deviations = part.excess[..., 0] - excess[0][:, None]
        deviations *= weights[:, 0]
        deviations *= groups.scale[:, None]
        return np.asarray(deviations.T)
    kept = slice(None) if dual.kept is None else dual.kept
    levels = groups.means[kept] + groups.scale * excess
    if prompt_means is None:
        return cluster_shares(levels, groups.prompt[kept], int(groups.prompt.max()) + 1)
    n_prompts = len(prompt_means)
    shares = cluster_shares(levels, groups.prompt[kept], n_prompts)
    shares -= cluster_shares(groups.means, groups.prompt, n_prompts)
    return shares + (prompt_means - groups.base) / n_prompts


def cluster_shares(rows: FloatArray, cluster: npt.NDArray[np.intp], n_clusters: int) -> FloatArray:
    """Return what each cluster adds to the error of the mean row, (n_clusters, n_columns)."""
    centred = (rows - rows.mean(axis=0)) / len(rows)
    return np.stack([np.bincount(cluster, c, minlength=n_clusters) for c in centred.T], axis=1)


def inflation(dual: ServedDual) -> float:
    """Return the factor from summed squares of the clusters' shares to a variance.

    It corrects for the mean that the shares are centred at, and for groups cut from one pool,
    which are worth fewer independent draws than they are. One prompt is served for itself, not as
    a sample of others: its factor is 0.
    """
    groups = dual.groups
    if is_one_pool(groups):
        return 1.0
    served = groups.prompt if dual.kept is None else groups.prompt[dual.kept]
    n_clusters = int(np.count_nonzero(np.bincount(served)))
    if n_clusters < 2:
        return 0.0
    shared = groups.n_groups / min(groups.n_independent, groups.n_groups) if groups.pooled else 1.0
    return shared * n_clusters / (n_clusters - 1)
