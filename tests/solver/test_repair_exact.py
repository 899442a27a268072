"""Repairs and plans against every way of choosing, listed one by one."""

import itertools
import math

import numpy as np
import pytest
from scipy import optimize

from solver import Palette, PilotSet, Status, min_candidates, repair
from tests.solver.problems import explicit_fraction, explicit_margin, gaussian_pilot, names

N_PROBLEMS = 192
BLOCKS = 4
# Standardised; the solver claims 1e-10 along a line and 1e-8 for the nearest, HiGHS about 1e-9.
SAME = 1e-7


class Enumerated:
    """A small problem in standardised units, its achievable set as the hull of all choices."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        n_prompts, self.n = [(2, 4), (3, 3), (3, 4), (6, 2), (1, 4), (4, 3)][seed % 6]
        m = int(rng.integers(1, 5))
        rewards = rng.normal(size=(n_prompts, self.n, m)) @ rng.normal(size=(m, m))
        if seed % 3 == 0:
            rewards = np.round(rewards)  # ties
        if seed % 7 == 0 and m > 1:
            rewards[..., 1] = rewards[..., 0]
        self.pilot = pilot = PilotSet(rewards * 10.0 ** rng.integers(-2, 3, size=m), names(m))
        rewards, units = self.pilot.rewards, self.pilot.scale
        targets, given, floors = {}, np.zeros(m), {}
        self.lower, self.upper = np.full(m, -np.inf), np.full(m, np.inf)
        self.kinds = []
        for i, name in enumerate(pilot.values):
            kind = rng.choice(["at_least", "at_least", "at_most", "between", "pinned", "given"])
            kind = "at_least" if kind == "given" and m < 3 else kind
            level = float(pilot.base[i] + rng.uniform(-0.3, 1.5) * units[i])
            if kind == "at_most":
                level = float(2 * pilot.base[i] - level)
                targets[name] = {"at_most": level}
                self.upper[i] = level
            elif kind == "given":
                given[i] = rng.normal() / units[i]
                targets[name] = {"multiplier": float(given[i])}
            elif kind == "at_least":
                targets[name] = {"at_least": level}
                self.lower[i] = level
            else:
                high = level if kind == "pinned" else level + 0.2 * float(units[i])
                targets[name] = {"between": [level, high]}
                self.lower[i], self.upper[i] = level, high
            self.kinds.append(kind)
        allowed = np.ones(rewards.shape[:2], dtype=bool)
        if seed % 4 == 1:
            name = pilot.values[int(rng.integers(m))]
            floors[name] = float(np.quantile(rewards[..., pilot.values.index(name)], 0.3))
            allowed = rewards[..., pilot.values.index(name)] >= floors[name]
        self.palette = Palette(targets, floors)
        kept = allowed.any(axis=1)
        groups = [
            (group[mask] - pilot.base) / units
            for group, mask in zip(rewards[kept], allowed[kept], strict=True)
        ]
        # all the ways of picking one candidate in each group
        self.choices = np.array([np.mean(picked, axis=0) for picked in itertools.product(*groups)])
        served = []
        for group in groups:
            weights = np.exp(group @ (given * units))
            served.append(weights @ group / weights.sum())
        self.base = np.mean(served, axis=0)
        low, high = np.flatnonzero(np.isfinite(self.lower)), np.flatnonzero(np.isfinite(self.upper))
        self.column = np.concatenate([low, high])
        self.side = np.concatenate([np.ones(len(low)), -np.ones(len(high))])
        self.asked = self.rows_of(self.lower, self.upper)
        self.table = self.choices[:, self.column] * self.side
        self.start = self.base[self.column] * self.side

    def rows_of(self, lower, upper):
        ends = np.concatenate([lower[np.isfinite(lower)], upper[np.isfinite(upper)]])
        return (ends - self.pilot.base[self.column]) / self.pilot.scale[self.column] * self.side

    def rows_at(self, levels):
        """Standardised rows of a mapping of names to levels."""
        lower, upper = self.lower.copy(), self.upper.copy()
        for name, level in levels.items():
            i = self.pilot.values.index(name)
            if isinstance(level, tuple):
                lower[i], upper[i] = level
            elif np.isfinite(lower[i]):
                lower[i] = level
            else:
                upper[i] = level
        return self.rows_of(lower, upper)

    def farthest(self, start, step, least=0.0, most=1.0):
        """Largest z with start + z·step below some mixture of choices."""
        n = len(self.table)
        result = optimize.linprog(
            np.append(np.zeros(n), -1.0),
            A_ub=np.hstack([-self.table.T, step[:, None]]),
            b_ub=-start,
            A_eq=np.append(np.ones(n), 0.0)[None],
            b_eq=[1.0],
            bounds=[*[(0, None)] * n, (least, most)],
        )
        assert result.success, result.message
        return float(result.x[-1])

    def margin(self, rows):
        return self.farthest(rows, np.ones(len(rows)), None, None)

    def greedy(self, order):
        levels = np.minimum(self.start, self.asked)
        for name in order:
            mine = self.column == self.pilot.values.index(name)
            step = np.where(mine, self.asked - levels, 0.0)
            levels = levels + self.farthest(levels, step) * step
        return levels

    def nearest_by_descent(self):
        """The distance by sequential quadratic programming over the mixture and the slack."""
        n, k = self.table.shape
        begin = np.append(np.full(n, 1 / n), np.maximum(self.asked - self.table.mean(axis=0), 0))
        best = optimize.minimize(
            lambda x: 0.5 * x[n:] @ x[n:],
            begin,
            jac=lambda x: np.append(np.zeros(n), x[n:]),
            method="SLSQP",
            bounds=[(0, None)] * (n + k),
            constraints=[
                {"type": "eq", "fun": lambda x: x[:n].sum() - 1,
                 "jac": lambda x: np.append(np.ones(n), np.zeros(k))},
                {"type": "ineq", "fun": lambda x: x[:n] @ self.table + x[n:] - self.asked,
                 "jac": lambda x: np.hstack([self.table.T, np.eye(k)])},
            ],
            options={"ftol": 1e-15, "maxiter": 500},
        )  # fmt: skip
        return float(np.linalg.norm(best.x[n:]))


def problems(block):
    for seed in range(block, N_PROBLEMS, BLOCKS):
        problem = Enumerated(seed)
        if len(problem.asked) and problem.margin(problem.asked) < -SAME:
            yield seed, problem


def check_offer(problem, found):
    """What is offered is within reach, solved, and still the palette asked in all other parts."""
    assert found.solution.status is Status.OPTIMAL
    offered = problem.rows_at(found.levels)
    assert problem.margin(offered) > -SAME
    levels = (found.solution.expected - problem.pilot.base) / problem.pilot.scale
    assert (levels[problem.column] * problem.side - offered > -SAME).all()
    # no row asks for more than before, and none for less than the base model gives
    assert (offered <= np.maximum(problem.asked, problem.start) + SAME).all()
    assert (offered >= np.minimum(problem.asked, problem.start) - 1e-6).all() or (
        found.method == "nearest"
    )
    assert dict(found.palette.floors) == dict(problem.palette.floors)
    assert list(found.palette.targets) == list(problem.palette.targets)


@pytest.mark.parametrize("block", range(BLOCKS))
def test_interpolation_goes_exactly_as_far_as_choices_do(block):
    n_repairs = 0
    for seed, problem in problems(block):
        found = repair(problem.palette, problem.pilot, problem.n, "interpolate")
        step = problem.asked - problem.start
        exact = problem.farthest(problem.start, step)
        # A share of the way, so its precision is that of the levels over the way's length.
        np.testing.assert_allclose(found.fraction, exact, atol=SAME / step.max(), err_msg=str(seed))
        limit = problem.start + exact * step
        np.testing.assert_allclose(problem.rows_at(found.limit), limit, atol=SAME)
        check_offer(problem, found)
        n_repairs += 1
    assert n_repairs >= 20


@pytest.mark.parametrize("block", range(BLOCKS))
def test_the_nearest_has_no_nearer_one(block):
    n_repairs = 0
    for seed, problem in problems(block):
        found = repair(problem.palette, problem.pilot, problem.n, "nearest")
        limit = problem.rows_at(found.limit)
        slack = problem.asked - limit
        # Achievable: an upper bound on the distance.
        assert problem.margin(limit) > -SAME, seed
        distance = float(np.linalg.norm(slack))
        np.testing.assert_allclose(found.distance, distance, atol=SAME)
        # Beyond the plane through it there is nothing: a lower bound.
        reachable = float((problem.table @ slack).max())
        assert (float(slack @ problem.asked) - reachable) / distance > distance - SAME, seed
        check_offer(problem, found)
        n_repairs += 1
    assert n_repairs >= 20


def test_the_nearest_agrees_with_another_method():
    compared = 0
    for seed, problem in itertools.islice(problems(0), 12):
        found = repair(problem.palette, problem.pilot, problem.n, "nearest")
        other = problem.nearest_by_descent()
        np.testing.assert_allclose(found.distance, other, atol=1e-6, err_msg=str(seed))
        compared += 1
    assert compared == 12


@pytest.mark.parametrize("block", range(BLOCKS))
def test_greedy_is_a_sequence_of_linear_programmes(block):
    n_repairs = 0
    for seed, problem in problems(block):
        named = [
            name
            for name, kind in zip(problem.pilot.values, problem.kinds, strict=True)
            if kind != "given"
        ]
        order = list(np.random.default_rng(seed).permutation(named))
        first = [str(name) for name in order[: 1 + seed % len(order)]]
        whole = first + [name for name in named if name not in first]
        found = repair(problem.palette, problem.pilot, problem.n, "greedy", priorities=first)
        exact = problem.greedy(whole)
        np.testing.assert_allclose(
            problem.rows_at(found.limit), exact, atol=1e-6, err_msg=f"{seed} {whole}"
        )
        check_offer(problem, found)
        n_repairs += 1
    assert n_repairs >= 20


def feasible_counts(palette, pilot, most):
    """Verdict of the explicit linear programme for every N, on the same groups."""
    asked = palette.resolve(pilot)
    verdicts = {}
    for n in range(1, most + 1):
        rewards = pilot.groups(n).rewards
        rewards = rewards + (pilot.base - rewards.mean(axis=(0, 1)))
        margin = explicit_margin(rewards, asked.lower, asked.upper, pilot.scale)
        verdicts[n] = margin > 0 if abs(margin) > SAME else None
    return verdicts


@pytest.mark.parametrize("seed", range(24))
def test_the_least_number_of_candidates_by_trying_all(seed):
    rng = np.random.default_rng(seed)
    pilot = gaussian_pilot(seed, n_prompts=12, n_candidates=12, n_values=2)
    gains = rng.uniform(-0.2, 1.3, size=2)
    palette = Palette(
        {
            "v0": {"gain": float(gains[0])},
            "v1": {"at_most": float(pilot.base[1] - gains[1] * pilot.scale[1])},
        }
    )
    found = min_candidates(palette, pilot)
    verdicts = feasible_counts(palette, pilot, 12)
    assert None not in verdicts.values()
    if found is None:
        assert not verdicts[12]
        return
    assert verdicts[found]
    assert found == 1 or not verdicts[found - 1]
    changes = sum(verdicts[n] != verdicts[n + 1] for n in range(1, 12))
    if changes <= 1:
        assert found == min(n for n, is_feasible in verdicts.items() if is_feasible)
    assert math.isfinite(found)


@pytest.mark.parametrize("seed", range(6))
def test_repairs_of_the_published_answers(published_pilot, seed):
    """Too many choices to list: the ray by one large programme, the nearest by its two bounds."""
    pilot, rng = published_pilot, np.random.default_rng(seed)
    rewards = pilot.groups(16).rewards
    own = rewards.mean(axis=(0, 1))
    rewards = rewards + (pilot.base - own)
    side = rng.choice([-1.0, 1.0], size=6)
    levels = pilot.base + side * rng.uniform(0.5, 1.5, size=6) * pilot.scale
    lower, upper = np.where(side > 0, levels, -np.inf), np.where(side < 0, levels, np.inf)
    targets = {
        name: {"at_least" if sign > 0 else "at_most": level}
        for name, sign, level in zip(pilot.values, side, levels.tolist(), strict=True)
    }
    palette = Palette(targets)
    found = repair(palette, pilot, 16, "interpolate")
    exact = explicit_fraction(rewards, pilot.base, lower, upper, pilot.scale, 1.0)
    np.testing.assert_allclose(found.fraction, exact, atol=1e-8)
    found = repair(palette, pilot, 16, "nearest")
    limit = np.array([found.limit[name] for name in pilot.values])
    slack = (levels - limit) / pilot.scale
    np.testing.assert_allclose(np.linalg.norm(slack), found.distance, atol=1e-9)
    ends = np.where(side > 0, limit, -np.inf), np.where(side < 0, limit, np.inf)
    assert explicit_margin(rewards, *ends, pilot.scale) > -SAME
    gives = float((rewards @ (slack / pilot.scale)).max(axis=1).mean())
    assert slack @ (levels / pilot.scale) - gives > found.distance * (found.distance - SAME)


@pytest.mark.parametrize("n_values", [6, 12])
def test_values_that_are_all_at_odds(n_values):
    """Every level costs every other, so that long lists of vertices meet near one another."""
    rng = np.random.default_rng(n_values)
    apart = -0.9 / (n_values - 1)
    mix = np.linalg.cholesky((1 - apart) * np.eye(n_values) + apart)
    pilot = PilotSet(rng.normal(size=(60, 8, n_values)) @ mix.T, names(n_values))
    asked = pilot.quantile(0.95)
    palette = Palette({name: {"quantile": 0.95} for name in pilot.values})
    rewards, unit = pilot.groups(8).rewards, pilot.scale
    none = np.full(n_values, np.inf)
    found = repair(palette, pilot, 8, "interpolate")
    fraction = explicit_fraction(rewards, pilot.base, asked, none, unit, 1.0)
    np.testing.assert_allclose(found.fraction, fraction, atol=1e-8)
    levels = np.minimum(pilot.base, asked)
    greedy = repair(palette, pilot, 8, "greedy").limit
    for i, name in enumerate(pilot.values):
        target = levels.copy()
        target[i] = asked[i]
        share = explicit_fraction(rewards, levels, target, none, unit, 1.0)
        levels = levels + np.clip(share, 0.0, 1.0) * (target - levels)
        np.testing.assert_allclose(greedy[name], levels[i], atol=1e-6)
