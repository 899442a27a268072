"""Curves of two values within a budget of divergence."""

import math

import numpy as np
import pytest
from scipy import optimize

from solver import Palette, PilotSet, Status, solve
from solver.frontiers import frontier
from tests.solver.curves import PAIR, N, check_served, check_shape, curve_of, explicit_most, served
from tests.solver.problems import at_least, gaussian_pilot


@pytest.mark.parametrize("max_kl", [0.02, 0.4, 1.5])
@pytest.mark.parametrize("seed", range(3))
def test_a_budget_curve_is_that_of_a_plain_search(max_kl, seed):
    """Every optimum under a budget is a softmax with multipliers in some direction φ."""
    pilot = gaussian_pilot(seed, n_prompts=6, n_values=2, correlation=-0.3 * seed)
    rewards = pilot.groups(N).rewards
    found = frontier(Palette({}), pilot, PAIR, N, n_points=7, max_kl=max_kl)

    def at(angle):
        way = np.array([math.cos(angle), math.sin(angle)])
        size = optimize.brentq(lambda s: served(rewards, s * way)[1] - max_kl, 0, 500, xtol=1e-13)
        return served(rewards, size * way)[0]

    curve = curve_of(found)
    np.testing.assert_allclose(curve[0], at(math.pi / 2), atol=1e-6)
    np.testing.assert_allclose(curve[-1], at(0.0), atol=1e-6)
    assert found.points[0].exchange < 1e-6
    assert found.points[-1].exchange > 1e6
    for (a, b), point in list(zip(curve, found.points, strict=True))[1:-1]:
        angle = optimize.brentq(lambda x, a=a: at(x)[0] - a, 0, math.pi / 2, xtol=1e-12)
        np.testing.assert_allclose(b, at(angle)[1], atol=1e-6)
        np.testing.assert_allclose(point.exchange, 1 / math.tan(angle), rtol=1e-4)
        prices = point.solution.multipliers
        np.testing.assert_allclose(point.exchange, prices[0] / prices[1], rtol=1e-5)
    for point in found.points:
        assert (1 - 1e-6) * max_kl <= point.solution.kl <= (1 + 1e-9) * max_kl
        limit = [point.limit[name] for name in PAIR]
        np.testing.assert_allclose(point.solution.expected, limit, atol=1e-7)
    check_served(found, pilot)
    check_shape(found)


@pytest.mark.parametrize("seed", range(2))
def test_a_budget_curve_holds_the_others(seed):
    pilot = gaussian_pilot(seed, n_prompts=6, n_values=3, correlation=-0.3)
    rewards, max_kl = pilot.groups(N).rewards, 0.5
    palette = Palette({"v2": {"gain": 0.3}})
    floor = palette.resolve(pilot).lower[2]
    found = frontier(palette, pilot, PAIR, N, n_points=5, max_kl=max_kl)
    for point in found.points[1:-1]:
        a = point.limit["v0"]
        best = optimize.minimize(
            lambda x: -served(rewards, x)[0][1],
            [0.3, 0.3, 0.3],
            method="SLSQP",
            bounds=[(0, 50)] * 3,
            constraints=[
                {"type": "ineq", "fun": lambda x: max_kl - served(rewards, x)[1]},
                {"type": "ineq", "fun": lambda x, a=a: served(rewards, x)[0][0] - a},
                {"type": "ineq", "fun": lambda x: served(rewards, x)[0][2] - floor},
            ],
            options={"ftol": 1e-12, "maxiter": 300},
        )
        assert best.success
        np.testing.assert_allclose(point.limit["v1"], -best.fun, atol=1e-5)
        assert point.solution.expected[2] >= floor - 1e-8
    check_served(found, pilot)
    check_shape(found)


def test_where_the_limit_comes_before_the_budget():
    """Of two grades, best of eight costs less than the budget; the rest buys the other value."""
    rng = np.random.default_rng(0)
    pilot = PilotSet((rng.normal(size=(20, 16, 2)) > 0.3).astype(float), PAIR)
    rewards = pilot.groups(N).rewards
    for max_kl in (1.25, 1.4, 1.5, 1.7):
        found = frontier(Palette({}), pilot, PAIR, N, n_points=9, max_kl=max_kl)
        kinds = []
        for (a, b), point in zip(curve_of(found), found.points, strict=True):
            exact, _ = explicit_most(rewards, 1, [(0, 1, a)])
            is_limit = abs(b - exact) < 1e-7
            kinds.append(is_limit)
            assert b <= exact + 1e-7
            if not is_limit:
                assert point.solution.kl >= (1 - 1e-6) * max_kl
        check_served(found, pilot)
        check_shape(found)
        assert any(kinds) == (max_kl > 1.26)
    loose = frontier(Palette({}), pilot, PAIR, N, max_kl=2.0)
    ends = frontier(Palette({}), pilot, PAIR, N)
    span = np.abs(curve_of(ends)[0] - curve_of(ends)[-1])
    assert (np.abs(curve_of(loose) - curve_of(ends))[[0, -1]] < 0.05 * span).all()


def test_a_budget_that_ends_at_the_limit_is_served_inside():
    """The first end's budget lasts to 1e-6 of the limit, where a fresh solve sees the boundary."""
    a = [[0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0]]
    b = [[-2.4, 0.8, -0.1, -0.6], [0.6, -2.0, 0.7, -0.6]]
    pilot = PilotSet(np.stack([a, b], axis=-1), PAIR)
    levels, max_kl = served(pilot.groups(4).rewards, np.array([0.0, 110.0]))
    found = frontier(Palette({}), pilot, PAIR, 4, n_points=6, max_kl=max_kl)
    np.testing.assert_allclose(list(found.points[0].limit.values()), levels, atol=1e-6)
    assert solve(at_least(levels), pilot, 4).status is Status.BOUNDARY
    check_served(found, pilot)
    check_shape(found, pilot.scale)


@pytest.mark.parametrize("max_kl", [0.8, 1.5])
def test_given_multipliers_are_part_of_what_the_budget_pays(max_kl):
    pilot = gaussian_pilot(0)
    found = frontier(Palette({"v2": {"multiplier": 0.4}}), pilot, PAIR, N, max_kl=max_kl)
    assert len(found.points) == 11
    check_served(found, pilot)
    for point in found.points:
        np.testing.assert_allclose(point.solution.kl, max_kl, rtol=1e-6)
        np.testing.assert_allclose(point.solution.multipliers[2], 0.4)


def test_a_budget_beyond_every_choice_is_none():
    pilot = gaussian_pilot(0, n_prompts=10)
    free = frontier(Palette({}), pilot, PAIR, N, n_points=4)
    bound = frontier(Palette({}), pilot, PAIR, N, n_points=4, max_kl=math.log(N))
    assert (curve_of(free) == curve_of(bound)).all()
    assert bound.max_kl == math.log(N)
