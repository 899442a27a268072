"""The served dual: its value, gradient and Hessian in one pass (DESIGN.md 2.3)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from solver.groups import Groups
from solver.palette import Constraints
from solver.tilt import floor_mask

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The dual at one point; k is the number of solved multipliers, units are standardised.

    Attributes
    ----------
    value : float
        g(λ), in nats, up to a constant.
    levels : ndarray, shape (k,)
        ∇Λ_N: expected level of the served answer.
    hessian : ndarray, shape (k, k)
        ∇²Λ_N: mean covariance of the served answer within its group.
    asked : float
        λ·c, what the palette asks of the direction λ.
    support : float
        h_N(λ), the mean over groups of max_j λ·x_j: what a choice can give of it.
    is_finite : bool
        Whether nothing overflowed.
    """

    value: float
    levels: FloatArray
    hessian: FloatArray
    asked: float
    support: float
    is_finite: bool


class ServedDual:
    """The concave dual g_N(λ) = λ·c − Λ_N(λ) of a resolved palette on groups of candidates.

    Levels are standardised: level 0 is that of the uniform choice among all N candidates, the unit
    is the within-prompt standard deviation. Each value has an interval, so the linear term is
    lower·λ⁺ − upper·λ⁻: an ``at_least`` target has λ >= 0, ``at_most`` λ <= 0, and ``between``
    either sign with a kink at 0.

    Parameters
    ----------
    groups : Groups
    constraints : Constraints
        Given multipliers tilt every group beforehand; floors mask candidates, and a group with no
        candidate left leaves the expectation.
    ridge : float
        ρ of the term −(ρ/2)|λ|², standardised (DESIGN.md 2.5).

    Attributes
    ----------
    active : ndarray of int, shape (k,)
        Columns whose multipliers are solved for.
    lower, upper : ndarray, shape (k,)
        The interval of each, standardised.
    pinned : ndarray of bool, shape (k,)
        Values asked for one exact level: their multipliers have either sign, without a kink.
    side : ndarray, shape (k,)
        Sign that the multiplier may have: 1, -1, or 0 for either.
    origin : ndarray, shape (n_values,)
        Standardised level 0, in reward units. It is the pilot mean, so that the base level costs
        nothing whichever groups were drawn; where groups are refused, the remaining groups' own
        difference from the mean is added.
    kept : ndarray of bool, shape (n_groups,), or None
        Groups that can be served; None when that is all of them.
    """

    def __init__(self, groups: Groups, constraints: Constraints, ridge: float = 0.0) -> None:
        self.groups = groups
        self.constraints = constraints
        self.ridge = ridge
        self.active = constraints.active
        self._fixed = np.nan_to_num(constraints.fixed) * groups.scale
        self.kept: npt.NDArray[np.bool_] | None = None
        self._blocks, self._masks = self._masked_blocks()
        self.n_groups = sum(block.shape[2] for block in self._blocks)
        self.origin = groups.base
        if self.kept is not None and self.n_groups:
            drift = groups.means[self.kept].mean(axis=0) - groups.means.mean(axis=0)
            self.origin = groups.base + drift
        scale, origin = groups.scale[self.active], self.origin[self.active]
        self._ask(
            (constraints.lower[self.active] - origin) / scale,
            (constraints.upper[self.active] - origin) / scale,
        )
        if len(self.active) == len(groups.scale):
            self._solved = self._blocks
        else:
            self._solved = tuple(block[self.active] for block in self._blocks)
        self._offsets: tuple[FloatArray | None, ...] = (None,) * len(self._blocks)
        if self._fixed.any():
            with np.errstate(over="ignore", invalid="ignore"):
                self._offsets = tuple(np.tensordot(self._fixed, x, axes=1) for x in self._blocks)

    @property
    def refused(self) -> float:
        """Share of the groups in which no candidate reaches the floors."""
        return float(1.0 - self.n_groups / self.groups.n_groups)

    def _ask(self, lower: FloatArray, upper: FloatArray) -> None:
        self.lower, self.upper = lower, upper
        self.pinned = np.asarray(lower == upper)
        self.side = np.where(upper == np.inf, 1.0, np.where(lower == -np.inf, -1.0, 0.0))

    def linear(self, multipliers: FloatArray) -> float:
        """Return λ·c, with each value's lower or upper bound as the sign of λ says."""
        # A multiplier of 0 asks for nothing, even of an infinite bound.
        below = np.where(multipliers < 0, self.upper, 0.0)
        return float(multipliers @ np.where(multipliers > 0, self.lower, below))

    def __call__(self, multipliers: FloatArray) -> Evaluation:
        """Return value, gradient parts and Hessian at standardised multipliers, shape (k,)."""
        k = len(multipliers)
        log_partition = support = 0.0
        levels = np.zeros(k)
        gram = np.zeros((k, k))
        with np.errstate(over="ignore", invalid="ignore"):
            for x, mask, offset in zip(self._solved, self._masks, self._offsets, strict=True):
                weights, log_z, best = softmax(multipliers, x, mask, offset)
                log_partition += float(log_z.sum())
                support += best
                weighted = x * weights
                means = weighted.sum(axis=1)
                levels += means.sum(axis=1)
                gram -= means @ means.T
                gram += _gram(weighted.reshape(k, weights.size), x.reshape(k, weights.size))
            count = max(1, self.n_groups)
            asked = self.linear(multipliers)
            penalty = 0.5 * self.ridge * float(multipliers @ multipliers)
            value = asked - log_partition / count - penalty
            is_finite = math.isfinite(value + float(levels.sum()) + float(gram.sum()))
        return Evaluation(value, levels / count, gram / count, asked, support / count, is_finite)

    def vertex(self, direction: FloatArray) -> FloatArray:
        """Return the levels of the choice that maximises `direction`, shape (k,), standardised.

        Its product with `direction` is the support function h_N(u) = E max_j u·x_j, exactly.
        """
        levels = np.zeros(len(direction))
        for x, mask in zip(self._solved, self._masks, strict=True):
            score = np.tensordot(direction, x, axes=1)
            if mask is not None:
                score += mask
            best = score.argmax(axis=0)
            levels += x[:, best, np.arange(len(best))].sum(axis=1)
        return np.asarray(levels / max(1, self.n_groups))

    @property
    def centre(self) -> FloatArray:
        """Levels of the uniform choice among the allowed candidates, shape (k,), standardised."""
        levels = np.zeros(len(self.active))
        for x, mask in zip(self._solved, self._masks, strict=True):
            if mask is not None:  # otherwise 0: excesses are over the mean of their group
                allowed = np.exp(mask)
                levels += (x * (allowed / allowed.sum(axis=0))).sum(axis=(1, 2))
        return np.asarray(levels / max(1, self.n_groups))

    def full(self, multipliers: FloatArray) -> FloatArray:
        """Return the multipliers of all values, given ones included, shape (n_values,)."""
        everything: FloatArray = self._fixed.copy()
        everything[self.active] = multipliers
        return everything

    def towards(self, start: FloatArray, fraction: float) -> ServedDual:
        """Return the dual of the palette a fraction of the way from the levels `start`, (k,)."""
        there = copy.copy(self)
        # Infinite bounds stay infinite: 0·inf is avoided by leaving them out.
        low, high = np.isfinite(self.lower), np.isfinite(self.upper)
        lower, upper = self.lower.copy(), self.upper.copy()
        lower[low] = start[low] + fraction * (self.lower[low] - start[low])
        upper[high] = start[high] + fraction * (self.upper[high] - start[high])
        there._ask(lower, upper)
        return there

    def blocks(self) -> Iterator[tuple[FloatArray, FloatArray | None]]:
        """Iterate over excesses of all values, (n_values, N, n_groups), and their masks."""
        return zip(self._blocks, self._masks, strict=True)

    def _masked_blocks(self) -> tuple[tuple[FloatArray, ...], tuple[FloatArray | None, ...]]:
        """Return the blocks of groups that can be served, with 0 or -inf for each candidate."""
        groups, rule = self.groups, self.constraints
        if not rule.has_floors:
            return groups.blocks, (None,) * len(groups.blocks)
        kept = np.empty(groups.n_groups, dtype=bool)
        blocks, masks = [], []
        for block, part in zip(groups.blocks, groups.slices, strict=True):
            rewards = groups.flat[groups.sample[part]]
            allowed = floor_mask(rewards, rule.floors, rule.on_floor, groups.scale).T
            kept[part] = allowed.any(axis=0)
            whole = bool(kept[part].all())
            blocks.append(block if whole else block[..., kept[part]])
            masks.append(np.where(allowed if whole else allowed[:, kept[part]], 0.0, -np.inf))
        if not kept.all():
            self.kept = kept
        some = [i for i, block in enumerate(blocks) if block.shape[2]]
        return tuple(blocks[i] for i in some), tuple(masks[i] for i in some)


def softmax(
    multipliers: FloatArray, x: FloatArray, mask: FloatArray | None, offset: FloatArray | None
) -> tuple[FloatArray, FloatArray, float]:
    """Return the weights in each group, its log Σ_j exp, and the groups' sum of max_j λ·x_j.

    Parameters
    ----------
    multipliers : ndarray, shape (k,)
    x : ndarray, shape (k, n_candidates, n_groups)
    mask : ndarray, shape (n_candidates, n_groups), or None
        0 for a candidate that may be served, -inf for another.
    offset : ndarray, shape (n_candidates, n_groups), or None
        Exponents of given multipliers; no part of the support function, whose limit they do not
        change.

    Returns
    -------
    weights : ndarray, shape (n_candidates, n_groups)
    log_partition : ndarray, shape (n_groups,)
    support : float
    """
    k, n_candidates, n_groups = x.shape
    score = multipliers @ x.reshape(k, n_candidates * n_groups)
    score = score.reshape(n_candidates, n_groups)
    if mask is not None:
        score += mask
    top = score.max(axis=0)
    support = float(top.sum())
    if offset is not None:
        score += offset
        top = score.max(axis=0)
    score -= top
    np.exp(score, out=score)
    total = score.sum(axis=0)
    score /= total
    return score, np.asarray(top + np.log(total)), support


def _gram(weighted: FloatArray, x: FloatArray) -> FloatArray:
    """Return weighted·xᵀ, symmetric, shape (k, k), for few rows and many columns.

    Row by row, using the symmetry, is about twice as fast as one matrix product once the columns
    are some thousands; below that the calls themselves cost more.
    """
    k, n = x.shape
    if n < 2500:
        return np.asarray(weighted @ x.T)
    gram = np.empty((k, k))
    for i in range(k):
        gram[i, i:] = gram[i:, i] = x[i:] @ weighted[i]
    return gram
