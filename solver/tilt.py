"""From multipliers to a choice: weights of the candidates, what they cost, and the draw."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from solver.errors import SolverError

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


def log_weights(
    multipliers: npt.ArrayLike, rewards: npt.ArrayLike, mask: npt.ArrayLike | None = None
) -> FloatArray:
    """Return the normalised log selection weights, shape (n,).

    Parameters
    ----------
    multipliers : array_like, shape (n_values,)
        Per reward unit.
    rewards : array_like, shape (n, n_values)
        Rewards of the candidates.
    mask : array_like of bool, shape (n,), optional
        Candidates that may be served; the others get weight 0, log weight -inf.

    Raises
    ------
    SolverError
        A reward is not finite, an exponent overflows, or no candidate may be served (refuse the
        answer before asking for weights).

    Notes
    -----
    w_j ∝ exp(λ·r_j), DESIGN.md 2.3. The largest exponent is subtracted first: rewards are
    unbounded.
    """
    table = np.asarray(rewards, dtype=np.float64)
    if not np.isfinite(table).all():
        raise SolverError("weights: a reward is not finite; score the candidates again.")
    # One candidate's rewards are subtracted before the product: a large level that all candidates
    # share would cost the digits in which they differ.
    with np.errstate(over="ignore", invalid="ignore"):
        logits = (table - table[:1]) @ np.asarray(multipliers, dtype=np.float64)
    if not np.isfinite(logits).all():
        raise SolverError("weights: multipliers times rewards overflow; lower the multipliers.")
    if mask is not None:
        logits = np.where(np.asarray(mask, dtype=bool), logits, -np.inf)
    top = logits.max(initial=-np.inf)
    if top == -np.inf:
        raise SolverError(
            "weights: no candidate may be served; refuse the answer, or lower the floors."
        )
    logits = logits - top
    return np.asarray(logits - np.log(np.exp(logits).sum()))


def ess(log_weights: npt.ArrayLike) -> float:
    """Return the effective sample size 1 / Σ w², between 1 and n."""
    return float(1.0 / np.exp(2.0 * np.asarray(log_weights)).sum())


def kl(log_weights: npt.ArrayLike) -> float:
    """Return Σ w log(n w) in nats: how far the choice is from the uniform one over all n."""
    log_w = np.asarray(log_weights, dtype=np.float64)
    positive = log_w[log_w > -np.inf]
    # Rounding may leave the uniform weights a hair below zero divergence.
    return max(0.0, float(np.exp(positive) @ positive) + float(np.log(log_w.size)))


def expected(log_weights: npt.ArrayLike, rewards: npt.ArrayLike) -> FloatArray:
    """Return Σ w r, the expected rewards of the choice, shape (n_values,), reward units."""
    return np.asarray(np.exp(np.asarray(log_weights)) @ np.asarray(rewards, dtype=np.float64))


def floor_mask(
    rewards: npt.ArrayLike,
    floors: npt.ArrayLike,
    on_floor: Literal["refuse", "best"] = "refuse",
    scale: npt.ArrayLike = 1.0,
) -> BoolArray:
    """Return which candidates the floors allow, shape (..., n).

    Parameters
    ----------
    rewards : array_like, shape (..., n, n_values)
        One or many groups of candidates.
    floors : array_like, shape (n_values,)
        Least reward of a served answer; NaN for none.
    on_floor : {"refuse", "best"}
        When no candidate of a group reaches every floor: allow none, or the one candidate whose
        total violation is smallest (the first of several).
    scale : array_like, shape (n_values,)
        Reward units per standardised unit (`PilotSet.scale`), in which violations are added up.
    """
    bounds = np.asarray(floors, dtype=np.float64)
    given = np.flatnonzero(~np.isnan(bounds))
    below: FloatArray = bounds[given] - np.asarray(rewards, dtype=np.float64)[..., given]
    allowed = np.asarray(np.all(below <= 0.0, axis=-1), dtype=bool)
    if on_floor == "best":
        units = np.broadcast_to(np.asarray(scale, dtype=np.float64), bounds.shape)[given]
        violation = (np.maximum(below, 0.0) / units).sum(axis=-1)
        best = np.arange(allowed.shape[-1]) == violation.argmin(axis=-1)[..., None]
        allowed = np.where(allowed.any(axis=-1, keepdims=True), allowed, best)
    return allowed


def draw(log_weights: npt.ArrayLike, seed: int, n: int = 1) -> npt.NDArray[np.intp]:
    """Return the indices of `n` distinct candidates, the first with probability w.

    Gumbel top-n (Kool et al. 2019, arXiv 1903.06059): successive draws without replacement. Where
    fewer than `n` candidates have a positive weight, those are returned and no others.

    Parameters
    ----------
    log_weights : array_like, shape (n_candidates,)
    seed : int
        Non-negative; the same seed and weights give the same choice.
    n : int
    """
    log_w = np.asarray(log_weights, dtype=np.float64)
    noise = np.random.Generator(np.random.Philox(seed)).gumbel(size=log_w.shape)
    order = np.argsort(-(log_w + noise), kind="stable")
    return order[: min(n, int((log_w > -np.inf).sum()))]
