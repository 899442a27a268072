"""The ways to choose: against closed forms, the solver's functions, the paper's procedure."""

from __future__ import annotations

import math

import numpy as np
import pytest

from server.evaluation.measures import cut, kl_and_ess
from server.evaluation.methods import (
    METHODS,
    Method,
    bounds_of,
    methods_of,
    paper_solution,
    senses_of,
    strength_for,
)
from server.promise import Promise
from solver import Palette, PilotSet, Status, solve, tilt
from tests.solver.map_reference import paper_multipliers

VALUES = ("helpful", "words", "free")
N = 8


@pytest.fixture(scope="module")
def pilot():
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(200, 16, 3)) @ np.array([[1.0, 0.3, 0], [0, 1, 0], [0, 0.2, 2.0]])
    return PilotSet(rng.normal(size=(200, 1, 3)) + spread, VALUES)


def promise_of(palette, pilot, n=N, max_kl=None):
    solution = solve(palette, pilot, n, max_kl=max_kl)
    assert solution.status is Status.OPTIMAL
    return Promise("met", palette, n, solution.multipliers, solution)


def by_name(palette, pilot, **options):
    return {one.name: one for one in methods_of(promise_of(palette, pilot, **options), pilot)}


def test_all_methods_in_order(pilot):
    found = methods_of(promise_of(Palette({"helpful": {"gain": 0.3}}), pilot), pilot)
    assert tuple(one.name for one in found) == METHODS
    assert all(one.reason is None for one in found)


def test_weights_are_those_that_the_server_draws_with(pilot):
    method = by_name(Palette({"helpful": {"gain": 0.3}, "words": {"gain": 0.2}}), pilot)["palette"]
    groups = cut(pilot.rewards[:20], N) + 1e6  # a level that all share changes nothing
    weights = method.weights(groups)
    for p, g in np.ndindex(weights.shape[:2]):
        logs = tilt.log_weights(method.multipliers, groups[p, g])
        np.testing.assert_allclose(weights[p, g], np.exp(logs), rtol=1e-6)


@pytest.mark.parametrize("on_floor", ["refuse", "best"])
def test_floors_are_those_of_the_server(pilot, on_floor):
    palette = Palette({"words": {"gain": 0.1}}, {"helpful": 1.0}, on_floor)
    method = by_name(palette, pilot)["palette"]
    groups = cut(pilot.rewards, N)
    weights = method.weights(groups)
    refused = 0
    for p, g in np.ndindex(weights.shape[:2]):
        mask = tilt.floor_mask(groups[p, g], [1.0, np.nan, np.nan], on_floor, pilot.scale)
        if not mask.any():
            refused += 1
            assert not weights[p, g].any()
            continue
        logs = tilt.log_weights(method.multipliers, groups[p, g], mask)
        np.testing.assert_allclose(weights[p, g], np.exp(logs), rtol=1e-9, atol=1e-15)
    assert (refused > 0) == (on_floor == "refuse")


def test_best_of_n_takes_the_largest_standardised_sum(pilot):
    palette = Palette({"helpful": {"gain": 0.2}, "words": {"at_most": float(pilot.base[1])}})
    method = by_name(palette, pilot)["best_of_n"]
    group = cut(pilot.rewards, N)[3, 1]
    z = group / pilot.scale
    best = int(np.argmax(z[:, 0] - z[:, 1]))
    assert method.weights(group[None, None]).ravel().tolist() == [
        float(i == best) for i in range(N)
    ]


def test_ties_share():
    method = Method("best_of_n", np.ones(1), np.ones(1), is_greedy=True)
    assert method.weights(np.array([[[[1.0], [2.0], [2.0]]]])).ravel().tolist() == [0, 0.5, 0.5]


def test_fixed_weights_cost_the_palettes_kl_on_the_calibration(pilot):
    promise = promise_of(Palette({"helpful": {"gain": 0.6}, "words": "keep"}), pilot)
    fixed = {one.name: one for one in methods_of(promise, pilot)}["fixed_weights"]
    groups = cut(pilot.rewards, N)
    assert kl_and_ess(fixed.weights(groups))[..., 0].mean() == pytest.approx(
        promise.solution.kl, rel=1e-6
    )
    z = fixed.multipliers * pilot.scale
    assert z[0] == pytest.approx(z[1])
    assert z[0] > 0
    assert z[2] == 0


def test_strength_of_nothing_and_of_everything(pilot):
    direction = np.array([1.0, 0.0, 0.0])
    assert strength_for(direction, N, 0.0, pilot) == 0.0
    assert strength_for(direction, N, 2 * math.log(N), pilot) >= 1e4


def test_senses():
    palette = Palette(
        {
            "a": "keep", "b": {"quantile": 0.6}, "c": {"at_most": 1.0}, "d": {"between": [0, 1]},
            "e": {"multiplier": -1.0}, "f": {"multiplier": 0.0}, "g": {"gain": -0.1},
        }
    )  # fmt: skip
    assert senses_of(palette, tuple("abcdefgh")).tolist() == [1, 1, -1, 0, -1, 0, 1, 0]


def test_a_palette_of_no_direction_has_no_best(pilot):
    low, high = float(pilot.base[1]) - 0.1, float(pilot.base[1]) + 0.1
    found = by_name(Palette({"words": {"between": [low, high]}}), pilot)
    for name in ("best_of_n", "fixed_weights"):
        assert found[name].multipliers is None
        assert "names no value" in found[name].reason
        with pytest.raises(ValueError, match="names no value"):
            found[name].weights(np.ones((1, 1, 2, 3)))


# the paper's λ


def test_paper_on_two_points_is_a_difference_of_logits():
    """Reward 1 in a share p of the pool, 0 elsewhere, level c: λ = logit c - logit p."""
    rewards = np.zeros((100, 4, 1))
    rewards[:30, 0] = 1.0  # the first answers are the pool
    rewards[:, 1:3] = [[1.0], [0.0]]
    pilot = PilotSet(rewards, ["good"])
    palette = Palette({"good": {"at_least": 0.5}})
    solution = solve(palette, pilot, 4)
    found = paper_solution(palette, solution, pilot)
    assert found.multipliers[0] == pytest.approx(0.0 - math.log(0.3 / 0.7), rel=1e-7)


def test_paper_is_the_published_procedure(pilot):
    """150 Adam steps leave it 0.04 short here; given time it comes to the exact optimum."""
    palette = Palette({"helpful": {"gain": 0.4}, "words": {"gain": 0.2}, "free": {"gain": 0.1}})
    solution = solve(palette, pilot, N)
    exact = paper_solution(palette, solution, pilot)
    levels = [solution.targets[name] for name in VALUES]
    theirs, is_feasible = paper_multipliers(pilot.rewards[:, 0], levels, n_steps=3000)
    assert is_feasible
    np.testing.assert_allclose(exact.multipliers, theirs, atol=1e-3)


def test_paper_asks_for_the_levels_that_are_served(pilot):
    """Given multipliers stay, a KL budget lowers the levels, upper and two-sided targets too."""
    base = pilot.base
    palette = Palette(
        {
            "helpful": {"gain": 1.0},
            "words": {"at_most": float(base[1]) - 0.2},
            "free": {"multiplier": 0.1},
        }
    )
    promise = promise_of(palette, pilot, max_kl=0.2)
    solution = promise.solution
    assert solution.fraction < 1
    found = paper_solution(palette, solution, pilot)
    assert found.multipliers[2] == pytest.approx(0.1)
    assert found.multipliers[0] > 0 > found.multipliers[1]
    assert dict(found.targets) == dict(solution.targets)
    assert bounds_of(palette, solution, "words") == (-math.inf, solution.targets["words"])
    assert bounds_of(palette, solution, "helpful") == (solution.targets["helpful"], math.inf)


def test_paper_out_of_reach_says_so():
    rewards = np.zeros((50, 4, 1))
    rewards[:, 1] = 1.0  # the first answers, which are the pool, have none of it
    pilot = PilotSet(rewards, ["good"])
    found = by_name(Palette({"good": {"at_least": 0.4}}), pilot, n=4)
    assert found["paper"].multipliers is None
    assert "infeasible" in found["paper"].reason
    assert found["palette"].reason is None
