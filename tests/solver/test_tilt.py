import numpy as np
import pytest
from scipy import stats

from solver import SolverError
from solver.tilt import draw, ess, expected, floor_mask, kl, log_weights


def test_weights_are_the_softmax():
    rewards = np.array([[0.0, 1.0], [1.0, 0.0], [2.0, -1.0]])
    log_w = log_weights([0.5, 0.2], rewards)
    plain = np.exp(rewards @ [0.5, 0.2])
    plain /= plain.sum()
    np.testing.assert_allclose(np.exp(log_w), plain, rtol=1e-14)
    np.testing.assert_allclose(ess(log_w), 1 / (plain**2).sum())
    np.testing.assert_allclose(kl(log_w), (plain * np.log(3 * plain)).sum())
    np.testing.assert_allclose(expected(log_w, rewards), plain @ rewards)


def test_a_mask_takes_candidates_out():
    log_w = log_weights([1.0], [[0.0], [5.0], [0.0]], mask=[True, False, True])
    np.testing.assert_allclose(np.exp(log_w), [0.5, 0, 0.5])
    np.testing.assert_allclose(ess(log_w), 2)
    np.testing.assert_allclose(kl(log_w), np.log(1.5))
    with pytest.raises(SolverError, match="no candidate may be served"):
        log_weights([1.0], [[0.0]], mask=[False])


def test_extremes():
    rewards = np.array([[1e6], [1e6 + 1], [-1e6]])
    log_w = log_weights([1.0], rewards)
    np.testing.assert_allclose(np.exp(log_w[1] - log_w[0]), np.e, rtol=1e-12)
    assert ess(log_weights([1e6], rewards)) == 1.0
    np.testing.assert_allclose(kl(log_weights([0.0], rewards)), 0.0, atol=1e-15)
    np.testing.assert_allclose(kl(log_weights([1e6], rewards)), np.log(3))
    assert log_weights([2.0], [[3.0]]).tolist() == [0.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rewards_that_are_not_finite_are_an_error(bad):
    with pytest.raises(SolverError):
        log_weights([1.0, 0.0], [[0.0, 0.0], [bad, 0.0]])
    with pytest.raises(SolverError):
        log_weights([1.0, 0.0], [[bad, 0.0], [0.0, 0.0]])


def test_exponents_that_overflow_are_an_error():
    with pytest.raises(SolverError, match="lower the multipliers"):
        log_weights([1e308], [[0.0], [1e10]])


def test_floors():
    rewards = np.array([[[0.0, 5.0], [1.0, 0.0]], [[-1.0, 0.0], [-2.0, 9.0]]])
    floors = [0.5, np.nan]
    assert floor_mask(rewards, floors).tolist() == [[False, True], [False, False]]
    assert floor_mask(rewards, floors, "best").tolist() == [[False, True], [True, False]]
    both = floor_mask(rewards[1], [0.5, 9.0], "best", scale=[1.0, 100.0])
    assert both.tolist() == [True, False]
    both = floor_mask(rewards[1], [0.5, 9.0], "best", scale=[100.0, 1.0])
    assert both.tolist() == [False, True]
    assert floor_mask(rewards, [np.nan, np.nan]).all()
    tie = floor_mask([[0.0], [0.0]], [1.0], "best")
    assert tie.tolist() == [True, False]


def test_a_floor_is_reached_by_the_reward_itself():
    assert floor_mask([[0.1 + 0.2]], [0.1 + 0.2]).tolist() == [True]


def test_the_draw_follows_the_weights():
    log_w = log_weights([1.0], [[0.0], [0.5], [1.0], [-3.0]])
    n = 20_000
    counts = np.bincount([draw(log_w, seed)[0] for seed in range(n)], minlength=4)
    # With these fixed seeds the test is deterministic; a correct draw passes with probability
    # 1 - 1e-4 over the choice of seeds.
    assert stats.chisquare(counts, n * np.exp(log_w)).pvalue > 1e-4


def test_the_second_draw_is_without_replacement():
    log_w = np.log([0.6, 0.3, 0.1])
    n = 20_000
    pairs = np.array([draw(log_w, seed, n=2) for seed in range(n)])
    counts = np.bincount(pairs[:, 0] * 3 + pairs[:, 1], minlength=9)
    w = np.exp(log_w)
    chance = np.array([[w[i] * w[j] / (1 - w[i]) for j in range(3)] for i in range(3)])
    np.fill_diagonal(chance, 0)
    used = chance.ravel() > 0
    assert counts[~used].sum() == 0
    assert stats.chisquare(counts[used], n * chance.ravel()[used]).pvalue > 1e-4


def test_a_seed_decides_and_impossible_candidates_are_never_drawn():
    log_w = np.array([-np.inf, np.log(0.5), -np.inf, np.log(0.5)])
    assert draw(log_w, 7).tolist() == draw(log_w, 7).tolist()
    assert sorted(draw(log_w, 7, n=4).tolist()) == [1, 3]
    assert draw(np.zeros(1), 0).tolist() == [0]
    assert len(draw(np.zeros(8), 0, n=8)) == 8
