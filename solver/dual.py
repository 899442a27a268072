"""The served dual: its value, gradient and Hessian in one pass (DESIGN.md 2.3)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from solver.groups import COLLINEAR, Groups
from solver.palette import Constraints
from solver.tilt import floor_mask

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Part:
    """One block of the groups that can be served; n_groups is the block's.

    Attributes
    ----------
    excess : ndarray, shape (n_values, n_candidates, n_groups)
        Of all values, over the mean of the group, standardised.
    solved : ndarray, shape (k, n_candidates, n_groups)
        Of the values whose multipliers are solved for.
    mask : ndarray, shape (n_candidates, n_groups), or None
        0 for a candidate that may be served, -inf for another.
    offset : ndarray, shape (n_candidates, n_groups), or None
        Exponents of given multipliers.
    """

    excess: FloatArray
    solved: FloatArray
    mask: FloatArray | None
    offset: FloatArray | None


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
        self._fixed = np.where(np.isnan(constraints.fixed), 0.0, constraints.fixed) * groups.scale
        self._has_floors = constraints.has_floors
        self._has_fixed = bool(self._fixed.any())
        self.kept: npt.NDArray[np.bool_] | None = self._servable()
        self.n_groups = groups.n_groups if self.kept is None else int(self.kept.sum())
        # Blocks that the groups do not keep are not kept here either.
        self._held = None if groups.held is None else tuple(self._made())
        self.origin = groups.base
        if self.kept is not None and self.n_groups:
            drift = groups.means[self.kept].mean(axis=0) - groups.means.mean(axis=0)
            self.origin = groups.base + drift
        scale, origin = groups.scale[self.active], self.origin[self.active]
        rounding = groups.base_rounding[self.active]
        self._ask(
            (constraints.lower[self.active] - origin - rounding) / scale,
            (constraints.upper[self.active] - origin - rounding) / scale,
        )

    @property
    def refused(self) -> float:
        """Share of the groups in which no candidate reaches the floors."""
        return float(1.0 - self.n_groups / self.groups.n_groups)

    def _ask(self, lower: FloatArray, upper: FloatArray) -> None:
        self.lower, self.upper = lower, upper
        self.pinned = np.asarray(lower == upper)
        self.side = np.where(upper == np.inf, 1.0, np.where(lower == -np.inf, -1.0, 0.0))
        self.is_one_sided = bool((self.side > 0.0).all())

    def linear(self, multipliers: FloatArray) -> float:
        """Return λ·c, with each value's lower or upper bound as the sign of λ says."""
        if self.is_one_sided:
            return float(multipliers @ self.lower)
        # A multiplier of 0 asks for nothing, even of an infinite bound.
        below = np.where(multipliers < 0, self.upper, 0.0)
        return float(multipliers @ np.where(multipliers > 0, self.lower, below))

    def __call__(self, multipliers: FloatArray) -> Evaluation:
        """Return value, gradient parts and Hessian at standardised multipliers, shape (k,)."""
        k = len(multipliers)
        if not (self._has_floors or self._has_fixed or multipliers.any()):
            return self._at_rest()
        log_partition = support = 0.0
        levels = np.zeros(k)
        gram = np.zeros((k, k))
        with np.errstate(over="ignore", invalid="ignore"):
            for part in self.parts():
                x = part.solved
                weights, log_z, best = softmax(multipliers, x, part.mask, part.offset)
                log_partition += float(np.add.reduce(log_z))
                support += best
                weighted = x * weights
                means = np.add.reduce(weighted, axis=1)
                levels += np.add.reduce(means, axis=1)
                gram -= means @ means.T
                gram += _gram(weighted.reshape(k, weights.size), x.reshape(k, weights.size))
            count = max(1, self.n_groups)
            asked = self.linear(multipliers)
            penalty = 0.5 * self.ridge * float(multipliers @ multipliers)
            value = asked - log_partition / count - penalty
        # Excesses are finite: what overflows, overflows in the exponents and shows in the value.
        is_finite = math.isfinite(value)
        return Evaluation(value, levels / count, gram / count, asked, support / count, is_finite)

    def _at_rest(self) -> Evaluation:
        """Return what the uniform choice gives, without a pass: every solve starts here."""
        k = len(self.active)
        hessian = self.groups.covariance[self.active[:, None], self.active]
        return Evaluation(
            -math.log(self.groups.n_candidates), np.zeros(k), hessian, 0.0, 0.0, is_finite=True
        )

    @cached_property
    def unseen(self) -> FloatArray:
        """Orthonormal combinations of the solved values that no choice can change, shape (k, d).

        They are those of collinear values; along them the optimal multipliers are not unique.
        Values that are constant by themselves are left out.
        """
        varying = np.flatnonzero(~self.groups.is_constant[self.active])
        if not self.groups.is_collinear or not len(varying):
            return np.empty((len(self.active), 0))
        columns = self.active[varying]
        variances, vectors = np.linalg.eigh(self.groups.covariance[columns[:, None], columns])
        null = vectors[:, variances <= COLLINEAR]
        unseen = np.zeros((len(self.active), null.shape[1]))
        unseen[varying] = null
        return unseen

    def vertex(self, direction: FloatArray) -> FloatArray:
        """Return the levels of the choice that maximises `direction`, shape (k,), standardised.

        Its product with `direction` is the support function h_N(u) = E max_j u·x_j, exactly.
        """
        levels = np.zeros(len(direction))
        for part in self.parts():
            x = part.solved
            score = np.tensordot(direction, x, axes=1)
            if part.mask is not None:
                score += part.mask
            best = score.argmax(axis=0)
            levels += x[:, best, np.arange(len(best))].sum(axis=1)
        return np.asarray(levels / max(1, self.n_groups))

    @property
    def centre(self) -> FloatArray:
        """Levels of the uniform choice among the allowed candidates, shape (k,), standardised."""
        levels = np.zeros(len(self.active))
        if not self._has_floors:
            return levels  # excesses are over the mean of their group
        for part in self.parts():
            if part.mask is not None:
                allowed = np.exp(part.mask)
                levels += (part.solved * (allowed / allowed.sum(axis=0))).sum(axis=(1, 2))
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

    def parts(self) -> Iterable[Part]:
        """Return the groups that can be served, block by block."""
        return self._made() if self._held is None else self._held

    def _made(self) -> Iterator[Part]:
        groups = self.groups
        is_all = len(self.active) == len(groups.scale)
        for block, where in zip(groups.blocks, groups.slices, strict=True):
            excess, mask, offset = block, None, None
            if self._has_floors:
                allowed = self._allowed(where)
                if self.kept is not None:
                    kept = self.kept[where]
                    excess, allowed = excess[..., kept], allowed[:, kept]
                if not allowed.size:
                    continue
                mask = np.where(allowed, 0.0, -np.inf)
            if self._has_fixed:
                with np.errstate(over="ignore", invalid="ignore"):
                    offset = np.asarray(np.tensordot(self._fixed, excess, axes=1), dtype=np.float64)
            yield Part(excess, excess if is_all else excess[self.active], mask, offset)

    def _allowed(self, where: slice) -> npt.NDArray[np.bool_]:
        """Return which candidates reach the floors, shape (n_candidates, n_groups)."""
        groups, rule = self.groups, self.constraints
        rewards = groups.flat[groups.sample[where]]
        return floor_mask(rewards, rule.floors, rule.on_floor, groups.scale).T

    def _servable(self) -> npt.NDArray[np.bool_] | None:
        """Return the groups in which some candidate reaches the floors; None for all of them."""
        if not self._has_floors:
            return None
        kept = [self._allowed(where).any(axis=0) for where in self.groups.slices]
        servable = np.concatenate(kept)
        return None if servable.all() else servable


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
    # The ufuncs' own reductions: the array methods around them cost as much as a small group.
    top = np.maximum.reduce(score)
    support = float(np.add.reduce(top))
    if offset is not None:
        score += offset
        top = np.maximum.reduce(score)
    score -= top
    np.exp(score, out=score)
    total = np.add.reduce(score)
    score /= total
    return score, top + np.log(total), support


def _gram(weighted: FloatArray, x: FloatArray) -> FloatArray:
    """Return weighted·xᵀ, symmetric, shape (k, k), for few rows and many columns.

    Row by row, using the symmetry, is up to twice as fast as one matrix product once the columns
    are some thousands; below that the calls themselves cost more.
    """
    k, n = x.shape
    if n < 1500:
        return np.asarray(weighted @ x.T)
    gram = np.empty((k, k))
    for i in range(k):
        gram[i, i:] = gram[i:, i] = x[i:] @ weighted[i]
    return gram
