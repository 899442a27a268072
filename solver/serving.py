"""What is served at given multipliers: levels with their errors, effective sample size, KL."""

from __future__ import annotations

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
    The multipliers are taken as given: their own sampling error is not in `stderr`.
    """
    groups = dual.groups
    if not dual.n_groups:
        nothing = np.zeros(len(groups.scale))
        return Served(groups.base, nothing, 0.0, 0.0)
    everything = dual.full(multipliers)
    excesses, sizes, divergences = [], [], []
    weights = np.empty((0, 0))
    with np.errstate(over="ignore", invalid="ignore"):
        for x, mask in dual.blocks():
            weights, log_z, _ = softmax(everything, x, mask, None)
            excess = (x * weights).sum(axis=1)
            excesses.append(excess)
            sizes.append(1.0 / (weights * weights).sum(axis=0))
            divergences.append(everything @ excess - log_z)  # Σ w log w, as log w = λ·x − log Z
        excess = np.concatenate(excesses, axis=1).T
        ess = float(np.concatenate(sizes).mean())
        kl = float(np.concatenate(divergences).mean() + np.log(groups.n_candidates))
        expected = dual.origin + groups.scale * excess.mean(axis=0)
        kept = slice(None) if dual.kept is None else dual.kept
        levels = groups.means[kept] + groups.scale * excess
        if groups.pooled and groups.n_groups == 1:
            error = _weighted_mean_error(weights[:, 0], groups.flat - levels[0])
        else:
            error = _clustered_error(levels, groups.prompt[kept], groups)
    return Served(expected, error, ess, max(0.0, kl))


def _weighted_mean_error(weights: FloatArray, deviations: FloatArray) -> FloatArray:
    """Return the error of Σ w r over one pool: Σ w² (r − r̄)², Owen, Monte Carlo (2013), 9.9."""
    return np.sqrt((weights * weights) @ (deviations * deviations))


def _clustered_error(
    levels: FloatArray, prompt: npt.NDArray[np.intp], groups: Groups
) -> FloatArray:
    """Return the standard error over prompts of the mean level, shape (n_values,).

    One prompt is served for itself, not as a sample of others: its error is 0.
    """
    counts = np.bincount(prompt)
    served = counts > 0  # floors may have refused every group of a prompt
    n_prompts = int(served.sum())
    if n_prompts < 2:
        return np.zeros(levels.shape[1])
    sums = np.stack([np.bincount(prompt, level) for level in levels.T])
    means = sums[:, served] / counts[served]
    n_independent = min(groups.n_independent, n_prompts)
    return np.asarray(means.std(axis=1, ddof=1) / np.sqrt(n_independent))
