"""Prices: what one more unit of a value costs the others, and how sure the multipliers are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from solver import ragged
from solver.dual import ServedDual, softmax
from solver.errors import SolverError
from solver.palette import Palette
from solver.pilot import PilotSet
from solver.serving import inflation, is_one_pool, level_shares
from solver.solution import Solution, Status
from solver.solving import solve
from solver.targets import Target

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]

# Curvature, as a share of the largest, below which a direction of the Hessian is rounding.
_SINGULAR: Final = 1e-9
# Standardised slack of a binding value up to which a solution is that of this palette.
_SAME: Final = 1e-6
_FOREIGN: Final = (
    "solution: it does not solve this palette on these groups; hand in what `solve` returned for "
    "the same palette, pilot set and options, or leave it out."
)


@dataclass(frozen=True, eq=False)
class Prices:
    """Derivatives of a solution with respect to its target levels, and errors of its multipliers.

    Attributes
    ----------
    solution : Solution
        Its multipliers are the prices themselves: λ_j is ∂KL/∂c_j, in nats per reward unit; with
        given multipliers γ that of KL − γ·expected, with a ridge that of KL + |slack|²/(2ρ).
    binding : tuple of str
        Values whose solved multiplier is not 0; also those asked for one exact level. For
        ``at_most`` and ``between``, c is the bound that binds.
    multiplier_stderr : ndarray, shape (n_values,)
        Standard error of λ over prompts, per reward unit; 0 where nothing binds or λ is given.
    multiplier_covariance : ndarray, shape (n_values, n_values)
    multiplier_slopes : ndarray, shape (n_values, n_values)
        ∂λ_i/∂c_j, per squared reward unit; 0 outside the binding values.
    level_slopes : ndarray, shape (n_values, n_values)
        ∂expected_i/∂c_j, reward units of i per unit of j, for free values too: what one more unit
        of j costs each value. A column is 0 where j does not bind.
    """

    solution: Solution
    binding: tuple[str, ...]
    multiplier_stderr: FloatArray
    multiplier_covariance: FloatArray
    multiplier_slopes: FloatArray
    level_slopes: FloatArray

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-safe maps, value name to number; matrices as maps of rows."""
        values = self.solution.values
        return {
            "solution": self.solution.to_dict(),
            "binding": list(self.binding),
            "multiplier_stderr": _by_name(values, self.multiplier_stderr),
            "multiplier_covariance": _by_name(values, self.multiplier_covariance),
            "multiplier_slopes": _by_name(values, self.multiplier_slopes),
            "level_slopes": _by_name(values, self.level_slopes),
        }


def prices(
    palette: Palette,
    pilot: PilotSet,
    candidates: float = 16,
    *,
    solution: Solution | None = None,
    groups: int | None = None,
    seed: int = 0,
    ridge: float = 0.0,
    max_kl: float | None = None,
) -> Prices:
    """Return what the levels of a palette cost each other, and the errors of its multipliers.

    Parameters
    ----------
    palette : Palette
    pilot : PilotSet
    candidates : int or math.inf
    solution : Solution, optional
        Of `solve` with these same arguments, to save the solve.
    groups, seed, ridge, max_kl : optional
        As in `solve`.

    Raises
    ------
    SolverError
        The palette has no finite optimum on this pilot set (the status says why), or `solution`
        is not its solution. Otherwise as `solve`.

    Notes
    -----
    With H = E_x Cov_w(r), and B the binding values, ∂λ_B/∂c_B = H_BB⁻¹ (MAP, arXiv 2410.19198,
    Theorem 4, which prints it with the wrong sign) and ∂expected/∂c_B = H_·B H_BB⁻¹; a ridge is
    added to H_BB. These are one-sided where a value is about to bind or to cease. Collinear values
    make H_BB singular; its pseudo-inverse then gives slopes along the directions that can move.

    Errors are those of an M-estimator (sandwich formula; Huber 1967; Stefanski & Boos 2002, The
    American Statistician 56, 29-38): λ solves the mean over prompts of (target − level) = 0, the
    pilot's own quantiles and means included where they are the target. They are errors over
    prompts, for the pilot set's number of candidates a prompt: what a quantile or a spread of so
    few is biased by, they leave out. Levels that a KL budget has lowered count as given. Groups
    cut from one pool share samples; their errors are upper bounds (`Groups.n_independent`). A
    single prompt is no sample of others, and has no errors. With few prompts (below some 100, or
    several hundred where rewards are skewed), or where a value barely binds, λ is further from
    normal than its error says.
    """
    if solution is None:
        solution = solve(
            palette, pilot, candidates, groups=groups, seed=seed, ridge=ridge, max_kl=max_kl
        )
    if solution.status is not Status.OPTIMAL:
        raise SolverError(
            f"prices: the palette is {solution.status.value}, and only an optimal one has prices. "
            f"{solution.status.sentence}"
        )
    if solution.values != pilot.values or solution.candidates != candidates:
        raise SolverError(_FOREIGN)
    drawn = pilot.groups(candidates, groups=groups, seed=seed)
    dual = ServedDual(drawn, palette.resolve(pilot), ridge)
    if solution.fraction < 1.0:
        dual = dual.towards(dual(np.zeros(len(dual.active))).levels, solution.fraction)
    point = solution.multipliers * pilot.scale
    hessian, excess, weights = _curvature(dual, point)
    columns = _binding(dual, point, excess.mean(axis=0))
    block = hessian[np.ix_(columns, columns)] + ridge * np.eye(len(columns))
    inverse = np.linalg.pinv(block, rcond=_SINGULAR, hermitian=True)
    unit = pilot.scale[columns]
    slopes = inverse / unit / unit[:, None]
    level_slopes = np.zeros_like(hessian)
    level_slopes[:, columns] = pilot.scale[:, None] * (hessian[:, columns] @ inverse) / unit
    shares = -level_shares(dual, excess, weights)[:, columns]
    for share, column in zip(shares.T, columns.tolist(), strict=True):
        if solution.fraction == 1.0:
            target = palette.parsed[pilot.values[column]]
            share += _sample_shares(dual, target_influence(target, pilot, column))
        if ridge:
            # Slack is measured in a unit, `PilotSet.scale`, that the pilot set estimates too.
            given_up = ridge * solution.multipliers[column] * _squares(pilot, column)
            share -= _sample_shares(dual, given_up)
    spread = inflation(dual) * (shares.T @ shares)
    covariance = _embedded(slopes @ spread @ slopes, columns, len(point))
    return Prices(
        solution=solution,
        binding=tuple(pilot.values[column] for column in columns),
        multiplier_stderr=np.sqrt(covariance.diagonal()),
        multiplier_covariance=covariance,
        multiplier_slopes=_embedded(slopes, columns, len(point)),
        level_slopes=level_slopes,
    )


def _binding(dual: ServedDual, point: FloatArray, levels: FloatArray) -> IntArray:
    """Return the columns of the values that bind, and check that they do at these levels."""
    at = point[dual.active]
    held = (at != 0.0) | dual.pinned
    bound = np.where(at > 0.0, dual.lower, dual.upper)[held]
    slack = bound - levels[dual.active][held] - dual.ridge * at[held]
    is_given = np.allclose(dual.full(at), point, rtol=1e-9, atol=0.0)
    if not is_given or (np.abs(slack) > _SAME).any():
        raise SolverError(_FOREIGN)
    columns: IntArray = dual.active[held]
    return columns


def _embedded(block: FloatArray, columns: IntArray, n_values: int) -> FloatArray:
    """Return a matrix of all values that holds `block` and is 0 elsewhere."""
    whole = np.zeros((n_values, n_values))
    whole[np.ix_(columns, columns)] = block
    return whole


def target_influence(target: Target, pilot: PilotSet, column: int) -> FloatArray:
    """Return the influence of each sample on the level that a target resolves to, reward units.

    Shape (n_prompts, n_candidates), or (n_samples,) in a pool, up to a constant. What is defined
    by prompt is spread over the prompt's candidates, so that their mean is the prompt's influence.
    Where prompts have different numbers of answers, shape (n_prompts, 1): that mean itself.

    Notes
    -----
    The influence on a pooled quantile is (q − 1{r <= Q}) / f(Q) (van der Vaart, Asymptotic
    Statistics 1998, 21.2); 1/f is a difference quotient of the quantile function with the
    bandwidth of Hall & Sheather (1988, J. R. Statist. Soc. B 50, 381-391).
    """
    rewards = pilot.rewards[..., column]
    if pilot.counts is not None:
        return _ragged_influence(target, pilot, pilot.counts, column)[:, None]
    match target.kind:
        case "keep":
            return rewards
        case "gain":
            std = float(pilot.within_std[column])
            step = target.numbers[0] * _squares(pilot, column) / (2.0 * std)
            return np.asarray(rewards + step)
        case "quantile" if target.of == "traffic" or pilot.pooled:
            q = target.numbers[0]
            level = pilot.traffic_quantile(q)[column]
            return np.asarray((q - (rewards <= level)) * _sparsity(pilot, column, q))
        case "quantile":
            own = np.quantile(rewards, target.numbers[0], axis=1, keepdims=True)
            return np.broadcast_to(own, rewards.shape)
        case _:
            return np.zeros(rewards.shape)


def _ragged_influence(
    target: Target, pilot: PilotSet, counts: npt.NDArray[np.intp], column: int
) -> FloatArray:
    rewards, means = pilot.rewards[..., column], pilot.prompt_means[:, column]
    match target.kind:
        case "keep":
            return means
        case "gain":
            std = float(pilot.within_std[column])
            step = target.numbers[0] * _squares(pilot, column)[:, 0] / (2.0 * std)
            return np.asarray(means + step)
        case "quantile" if target.of == "traffic":
            q = target.numbers[0]
            is_below = rewards <= pilot.traffic_quantile(q)[column]
            is_below &= np.arange(rewards.shape[1]) < counts[:, None]
            return np.asarray((q - is_below.sum(axis=1) / counts) * _sparsity(pilot, column, q))
        case "quantile":
            return ragged.quantiles(rewards, counts, target.numbers[0])
        case _:
            return np.zeros(len(rewards))


def _squares(pilot: PilotSet, column: int) -> FloatArray:
    """Return squared deviations, whose mean is the squared `PilotSet.within_std`."""
    rewards = pilot.rewards[..., column]
    if pilot.counts is not None:
        return ragged.squares(rewards, pilot.counts)[:, None]
    centre = pilot.base[column] if pilot.pooled else rewards.mean(axis=1, keepdims=True)
    return np.asarray((rewards - centre) ** 2)


def _sparsity(pilot: PilotSet, column: int, q: float) -> float:
    """Return 1/f at the pooled q-quantile, reward units."""
    normal = NormalDist()
    z = normal.inv_cdf(q)
    ratio = 1.5 * normal.pdf(z) ** 2 / (2.0 * z * z + 1.0)
    n_samples = pilot.n_prompts * pilot.n_candidates
    if pilot.counts is not None:
        n_samples = int(pilot.counts.sum())
    bandwidth = (normal.inv_cdf(0.975) ** 2 * ratio / n_samples) ** (1 / 3)
    low, high = max(0.0, q - bandwidth), min(1.0, q + bandwidth)
    rise = pilot.traffic_quantile(high) - pilot.traffic_quantile(low)
    return float(rise[column] / (high - low))


def _curvature(
    dual: ServedDual, multipliers: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return H of all values, each group's excess, and the weights of the last block."""
    n_values = len(multipliers)
    gram = np.zeros((n_values, n_values))
    excesses = []
    weights = np.empty((0, 0))
    for part in dual.parts():
        x = part.excess
        weights, _, _ = softmax(multipliers, x, part.mask, None)
        weighted = x * weights
        mean = weighted.sum(axis=1)
        gram += weighted.reshape(n_values, -1) @ x.reshape(n_values, -1).T - mean @ mean.T
        excesses.append(mean)
    gram = 0.5 * (gram + gram.T) / dual.n_groups
    return gram, np.concatenate(excesses, axis=1).T, weights


def _sample_shares(dual: ServedDual, influence: FloatArray) -> FloatArray:
    """Return what each cluster adds to the error of a mean over samples, shape (n_clusters,)."""
    groups = dual.groups
    if is_one_pool(groups):
        rows = influence[groups.sample[0]]
    else:
        rows = influence[groups.sample].mean(axis=1) if groups.pooled else influence.mean(axis=1)
    return np.asarray((rows - rows.mean()) / len(rows))


def _by_name(values: tuple[str, ...], array: FloatArray) -> dict[str, Any]:
    if array.ndim > 1:
        return {name: _by_name(values, row) for name, row in zip(values, array, strict=True)}
    numbers = [x if math.isfinite(x) else None for x in array.tolist()]
    return dict(zip(values, numbers, strict=True))
