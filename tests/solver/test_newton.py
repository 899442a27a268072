import itertools

import numpy as np
import pytest

from solver import Palette, PilotSet
from solver.dual import ServedDual
from solver.newton import complementary, kkt_residual, maximise
from tests.solver.problems import at_least, gaussian_pilot, names, random_choice_levels


def by_enumeration(matrix, linear, unsigned):
    """The maximiser over every choice of positive components."""
    k = len(linear)
    best, best_value = np.zeros(k), -np.inf
    for inside in itertools.product([False, True], repeat=k):
        free = np.array(inside) | unsigned
        y = np.zeros(k)
        y[free] = np.linalg.solve(matrix[np.ix_(free, free)], linear[free])
        value = linear @ y - y @ matrix @ y / 2
        if (y[~unsigned] >= 0).all() and value > best_value:
            best, best_value = y, value
    return best


@pytest.mark.parametrize("seed", range(30))
def test_the_sign_constrained_model_is_solved_exactly(seed):
    rng = np.random.default_rng(seed)
    k = rng.integers(1, 6)
    root = rng.normal(size=(k, k))
    matrix = root @ root.T + 1e-3 * np.eye(k)
    linear = rng.normal(size=k)
    unsigned = rng.random(k) < 0.2
    guess = rng.random(k) < 0.5
    np.testing.assert_allclose(
        complementary(matrix, linear, unsigned, guess),
        by_enumeration(matrix, linear, unsigned),
        atol=1e-9,
    )


@pytest.mark.parametrize("seed", range(20))
def test_palettes_with_a_known_choice_are_met_from_any_start(seed):
    rng = np.random.default_rng(seed)
    pilot = gaussian_pilot(seed, n_values=4)
    drawn = pilot.groups(8)
    levels = random_choice_levels(drawn.rewards, rng, sharpness=1.0)
    dual = ServedDual(drawn, at_least(levels - 0.02).resolve(pilot))
    ends = [maximise(dual, start, 100) for start in (np.zeros(4), rng.exponential(size=4) * 3)]
    for end in ends:
        assert end.end == "converged"
        assert end.residual <= 1e-8
        assert (end.multipliers >= 0).all()
    # The dual is strictly concave here: one solution.
    np.testing.assert_allclose(ends[0].multipliers, ends[1].multipliers, atol=1e-6)


def test_the_residual_is_that_of_the_definition():
    pilot = gaussian_pilot(0)
    palette = Palette({"v0": {"at_least": 0}, "v1": {"at_most": 0}, "v2": {"between": [-1, 1]}})
    dual = ServedDual(pilot.groups(8), palette.resolve(pilot))
    here = dual(np.zeros(3))
    expected = max(0.0, dual.lower[0], -dual.upper[1], dual.lower[2], -dual.upper[2])
    np.testing.assert_allclose(kkt_residual(dual, np.zeros(3), here), expected)
    point = np.array([0.5, -0.5, 0.5])
    here = dual(point)
    below, above = dual.lower - here.levels, here.levels - dual.upper
    expected = max(
        below[0] if below[0] >= 0 else min(-below[0], 0.5),
        above[1] if above[1] >= 0 else min(-above[1], 0.5),
        below[2] if below[2] >= 0 else min(-below[2], 0.5),
    )
    np.testing.assert_allclose(kkt_residual(dual, point, here), expected)


def test_a_start_of_the_wrong_sign_or_size_does_no_harm():
    pilot = gaussian_pilot(0)
    levels = pilot.base + 0.5 * pilot.within_std
    dual = ServedDual(pilot.groups(8), at_least(levels).resolve(pilot))
    right = maximise(dual, np.zeros(3), 100)
    for start in (np.full(3, -5.0), np.full(3, 1e308), np.full(3, 1e4)):
        end = maximise(dual, start, 100)
        assert end.end == "converged"
        np.testing.assert_allclose(end.multipliers, right.multipliers, atol=1e-6)


def test_the_step_limit_is_kept():
    pilot = gaussian_pilot(0)
    levels = pilot.base + 0.9 * pilot.within_std
    dual = ServedDual(pilot.groups(8), at_least(levels).resolve(pilot))
    end = maximise(dual, np.zeros(3), 1)
    assert (end.end, end.iterations) == ("step_limit", 1)


def test_nothing_to_solve_converges_at_once():
    pilot = gaussian_pilot(0)
    dual = ServedDual(pilot.groups(8), Palette({}).resolve(pilot))
    end = maximise(dual, np.zeros(0), 10)
    assert (end.end, end.iterations, end.residual) == ("converged", 0, 0.0)


def test_collinear_values_converge():
    rng = np.random.default_rng(0)
    r = rng.normal(size=(50, 8, 2))
    r = np.concatenate([r, r[..., :1], r.sum(axis=2, keepdims=True), -r[..., 1:]], axis=2)
    pilot = PilotSet(r, names(5))
    drawn = pilot.groups(8)
    levels = random_choice_levels(drawn.rewards, rng, 0.7)
    dual = ServedDual(drawn, at_least(levels).resolve(pilot))
    end = maximise(dual, np.zeros(5), 100)
    assert end.end == "converged"
    assert np.abs(end.multipliers).max() < 100
