"""The statistics of an evaluation, against simulation with a known truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import ndtr

from server.evaluation.measures import (
    Mean,
    cut,
    delivery,
    improves,
    kl_and_ess,
    mean_over_prompts,
    quantile_of,
    served_levels,
    share,
    win_rates,
)
from server.evaluation.methods import Method
from solver import Palette, PilotSet, Status, solve, tilt

ONE = np.ones(1)


def tilted(multiplier, scale=ONE):
    return Method("", np.array([multiplier]), scale)


def sampled(rng, n_prompts, n_candidates):
    """Return rewards (n_prompts, n_candidates, 1): prompts of a spread of 1, answers of 1."""
    return rng.normal(size=(n_prompts, 1, 1)) + rng.normal(size=(n_prompts, n_candidates, 1))


def means_of(rewards, method, n):
    groups = cut(rewards, n)
    rows = served_levels(method.weights(groups), groups)
    everything = np.ones(rows.shape[:2], dtype=bool)
    return mean_over_prompts(rows, everything, np.arange(len(rows)))


def test_cut_takes_each_candidate_once():
    samples = np.arange(2 * 7).reshape(2, 7, 1)
    groups = cut(samples, 3)
    assert groups.shape == (2, 2, 3, 1)
    assert groups[1, 1].ravel().tolist() == [10, 11, 12]


def test_intervals_of_a_known_choice_cover_its_level():
    """600 samples: 95 % of the intervals hold the truth, give or take 3 standard errors."""
    rng = np.random.default_rng(0)
    method, n = tilted(0.8), 4
    truth = means_of(sampled(rng, 400_000, n), method, n).mean[0]
    n_covered = 0
    for _ in range(600):
        found = means_of(sampled(rng, 40, 8), method, n)
        n_covered += abs(found.mean[0] - truth) <= found.half_width()[0]
    assert abs(n_covered / 600 - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 600)


def test_promise_and_delivery_have_both_errors():
    """λ solved on one sample, served on another: the interval has both, and it needs both."""
    rng = np.random.default_rng(1)
    palette, n = Palette({"good": {"at_least": 0.4}}), 4
    with_both, with_one, n_trials = 0, 0, 400
    for _ in range(n_trials):
        solution = solve(palette, PilotSet(sampled(rng, 60, 8), ["good"]), n)
        assert solution.status is Status.OPTIMAL
        found = means_of(sampled(rng, 60, 8), tilted(solution.multipliers[0]), n)
        error = abs(found.mean[0] - 0.4)
        with_both += error <= found.half_width(solution.stderr)[0]
        with_one += error <= found.half_width()[0]
    spread = 3 * math.sqrt(0.95 * 0.05 / n_trials)
    assert abs(with_both / n_trials - 0.95) < spread
    # With samples of the same size each interval alone is short by a factor √2: 83 %.
    assert abs(with_one / n_trials - 0.834) < 3 * math.sqrt(0.834 * 0.166 / n_trials)


def test_repeated_prompts_count_once():
    """Each prompt is there five times: by cluster, intervals cover; by line, they do not."""
    rng = np.random.default_rng(2)
    by_cluster = by_line = 0
    for _ in range(400):
        means = np.repeat(rng.normal(size=30), 5)
        rows = (means + 0.1 * rng.normal(size=150))[:, None, None]
        everything = np.ones((150, 1), dtype=bool)
        found = mean_over_prompts(rows, everything, np.repeat(np.arange(30), 5))
        by_cluster += abs(found.mean[0]) <= found.half_width()[0]
        other = mean_over_prompts(rows, everything, np.arange(150))
        by_line += abs(other.mean[0]) <= other.half_width()[0]
    assert abs(by_cluster / 400 - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 400)
    assert by_line / 400 < 0.75


def test_refused_groups_are_left_out():
    rows = np.array([[[1.0], [9.0]], [[3.0], [5.0]]])
    is_served = np.array([[True, False], [True, True]])
    found = mean_over_prompts(rows, is_served, np.arange(2))
    assert found.mean[0] == 3.0
    assert found.n_clusters == 2


def test_a_single_prompt_has_no_interval():
    found = mean_over_prompts(np.ones((1, 1, 1)), np.ones((1, 1), dtype=bool), np.zeros(1, int))
    assert not np.isfinite(found.half_width()[0])


def test_nothing_served_is_no_number():
    found = mean_over_prompts(np.ones((2, 1, 1)), np.zeros((2, 1), dtype=bool), np.arange(2))
    assert np.isnan(found.mean[0])
    assert found.n_clusters == 0


def test_variances_add_up():
    found = Mean(np.zeros(1), np.array([3.0]), 1_000_000)
    assert found.half_width(4.0)[0] == pytest.approx(1.959964 * 5.0, rel=1e-5)


def test_quantiles_are_students():
    assert quantile_of(11) == pytest.approx(2.228139)  # tables of t, 10 degrees of freedom
    assert quantile_of(10**7) == pytest.approx(1.959964, abs=1e-5)
    assert quantile_of(1) == math.inf


# wins


@pytest.mark.parametrize("multiplier", [0.0, 0.5, 1.5, 50.0])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_win_rate_is_that_of_a_choice_among_one_less_against_a_fresh_answer(multiplier, n):
    rng = np.random.default_rng(3)
    groups, method = rng.normal(size=(20_000, 1, n, 1)), tilted(multiplier)
    others = rng.normal(size=(100_000, 1, n - 1, 1))
    truth = served_levels(method.weights(others), ndtr(others)).mean()
    # 3 standard errors of a mean of 20,000 of the differences of indicators are below 0.008.
    assert win_rates(method.weights, groups).mean() == pytest.approx(truth, abs=0.008)


def test_win_rates_that_are_exact():
    groups = np.random.default_rng(4).normal(size=(10, 2, 8, 3))
    base = Method("", np.zeros(3), np.ones(3))
    np.testing.assert_allclose(win_rates(base.weights, groups).mean(), 0.5, rtol=1e-12)
    best = Method("", np.array([1.0, 0, 0]), np.ones(3), is_greedy=True)
    # The best of the other seven loses to the one that is the best of all.
    np.testing.assert_allclose(win_rates(best.weights, groups)[..., 0], 7 / 8, rtol=1e-12)


def test_equal_answers_win_half_and_one_alone_has_no_other():
    np.testing.assert_allclose(win_rates(tilted(1.0).weights, np.ones((3, 1, 4, 1))), 0.5)
    assert win_rates(tilted(1.0).weights, np.zeros((2, 1, 1, 1))).tolist() == [[[0.5]], [[0.5]]]


def test_wins_under_a_floor_are_those_of_served_answers():
    """One of three clears the floor: where it is the fresh one, nothing is served."""
    method = Method("", np.zeros(1), ONE, floors=np.array([2.5]))
    assert win_rates(method.weights, np.array([[[[1.0], [2.0], [3.0]]]])).item() == 1.0


# KL and ESS


def test_kl_and_ess_are_the_solvers():
    rng = np.random.default_rng(5)
    groups = rng.normal(size=(20, 1, 6, 2))
    method = Method("", np.array([1.3, -0.4]), np.ones(2))
    found = kl_and_ess(method.weights(groups))
    for group, (kl, ess) in zip(groups[:, 0], found[:, 0], strict=True):
        logs = tilt.log_weights(method.multipliers, group)
        assert kl == pytest.approx(tilt.kl(logs), rel=1e-9)
        assert ess == pytest.approx(tilt.ess(logs), rel=1e-9)


def test_best_of_n_costs_log_n():
    groups = np.random.default_rng(6).normal(size=(5, 1, 8, 1))
    weights = Method("", ONE, ONE, is_greedy=True).weights(groups)
    np.testing.assert_allclose(kl_and_ess(weights)[..., 0], math.log(8), rtol=1e-12)
    np.testing.assert_allclose(kl_and_ess(weights)[..., 1], 1.0, rtol=1e-12)


# shares, and who improves


def test_share_covers():
    """Wilson's interval for 30 prompts covers a chance of 0.8 about 95 % of the time."""
    rng = np.random.default_rng(7)
    n_covered = 0
    for _ in range(2000):
        _, low, high = share(rng.random(30) < 0.8)
        n_covered += low <= 0.8 <= high
    assert abs(n_covered / 2000 - 0.95) < 0.025


def test_share_of_all_and_none():
    p, low, high = share(np.ones(10, dtype=bool))
    assert (p, high) == (1.0, pytest.approx(1.0))
    assert 0.6 < low < 0.8
    assert share(np.zeros(10, dtype=bool))[:2] == (0.0, pytest.approx(0.0))
    assert all(math.isnan(x) for x in share(np.zeros(0, dtype=bool)))


def test_improves_by_hand():
    gains = np.array(
        [
            [0.1, -0.1, 9.0],  # more of the first, less of the second: both wanted
            [0.1, 0.1, 9.0],  # the second is worse
            [0.0, -0.1, 9.0],  # the first is the same
            [-0.1, -0.1, 9.0],
            [1e-12, -0.1, 9.0],  # rounding
        ]
    )
    senses = np.array([1.0, -1.0, 0.0])  # the third is free
    assert improves(gains, senses, np.ones(3)).tolist() == [True, False, False, False, False]


def test_nothing_improves_where_nothing_counts():
    assert not improves(np.ones((3, 2)), np.zeros(2), np.ones(2)).any()


@pytest.mark.parametrize(
    ("level", "asked", "multiplier", "error"),
    [
        (1.2, (1.0, math.inf), 0.5, 0.2),
        (0.9, (1.0, math.inf), 0.5, -0.1),
        (1.2, (1.0, math.inf), 0.0, 0.0),  # more than was asked for, and nothing pulls
        (0.9, (1.0, math.inf), 0.0, -0.1),
        (1.2, (-math.inf, 1.0), -0.5, -0.2),  # too long: a shortfall of what was asked
        (0.9, (-math.inf, 1.0), 0.0, 0.0),
        (1.2, (-math.inf, 1.0), 0.0, -0.2),
        (0.5, (0.0, 1.0), 0.0, 0.0),
        (-0.1, (0.0, 1.0), 0.0, -0.1),
        (1.1, (0.0, 1.0), 0.0, -0.1),
    ],
)
def test_delivery_by_hand(level, asked, multiplier, error):
    assert delivery(level, asked, multiplier) == pytest.approx(error)
