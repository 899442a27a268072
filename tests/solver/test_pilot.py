import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from solver import PilotError, PilotSet
from tests.solver.problems import gaussian_pilot, names


def test_statistics_against_plain_numpy():
    pilot = gaussian_pilot(1, n_prompts=7, n_candidates=9)
    r = pilot.rewards
    np.testing.assert_allclose(pilot.base, r.mean(axis=(0, 1)), rtol=1e-13)
    np.testing.assert_allclose(pilot.within_std, np.sqrt(r.var(axis=1).mean(axis=0)), rtol=1e-13)
    centred = (r - r.mean(axis=1, keepdims=True)).reshape(-1, 3)
    np.testing.assert_allclose(pilot.correlation, np.corrcoef(centred.T), rtol=1e-12)
    assert (pilot.n_prompts, pilot.n_candidates, pilot.n_values) == (7, 9, 3)


@given(st.floats(0, 1), st.integers(1, 6), st.integers(1, 6))
def test_quantiles_are_numpys(q, n_prompts, n_candidates):
    rng = np.random.default_rng(n_prompts * 10 + n_candidates)
    # few distinct numbers: ties
    rewards = rng.integers(0, 4, size=(n_prompts, n_candidates, 2)).astype(float)
    pilot = PilotSet(rewards, names(2))
    np.testing.assert_allclose(
        pilot.quantile(q), np.quantile(rewards, q, axis=1).mean(axis=0), atol=1e-12
    )
    np.testing.assert_allclose(
        pilot.traffic_quantile(q), np.quantile(rewards.reshape(-1, 2), q, axis=0), atol=1e-12
    )


def test_a_pool_is_one_answer_a_prompt():
    samples = np.random.default_rng(2).normal(size=(50, 2))
    pilot = PilotSet(samples, names(2), pooled=True)
    assert (pilot.n_prompts, pilot.n_candidates) == (50, 1)
    np.testing.assert_allclose(pilot.within_std, samples.std(axis=0))
    np.testing.assert_allclose(pilot.quantile(0.7), np.quantile(samples, 0.7, axis=0))
    np.testing.assert_allclose(pilot.traffic_quantile(0.7), np.quantile(samples, 0.7, axis=0))


def test_a_constant_value_has_a_usable_scale():
    rewards = np.random.default_rng(3).normal(size=(4, 5, 3))
    rewards[..., 1] = 0.1
    rewards[..., 2] = 0.1 + np.arange(4)[:, None]  # constant within each prompt only
    pilot = PilotSet(rewards, names(3))
    np.testing.assert_array_equal(pilot.within_std[1:], 0)
    assert pilot.is_constant.tolist() == [False, True, True]
    assert (pilot.scale > 0).all()
    assert np.isfinite(pilot.correlation).all()
    np.testing.assert_array_equal(np.diag(pilot.correlation), 1)


def test_arrays_are_private_and_read_only():
    rewards = np.zeros((2, 2, 1))
    pilot = PilotSet(rewards, ["a"])
    rewards[:] = 1
    assert not pilot.rewards.any()
    with pytest.raises(ValueError, match="read-only"):
        pilot.rewards[0] = 1


def test_the_fingerprint_sees_everything_that_matters():
    base = PilotSet(np.zeros((2, 3, 1)), ["a"])
    same = PilotSet(np.zeros((2, 3, 1)).tolist(), ("a",), metadata={"model": "x"})
    assert base.fingerprint == same.fingerprint
    assert len(base.fingerprint) == 64
    others = [
        PilotSet(np.zeros((3, 2, 1)), ["a"]),
        PilotSet(np.zeros((2, 3, 1)), ["b"]),
        PilotSet(np.full((2, 3, 1), 1e-300), ["a"]),
        PilotSet(np.zeros((6, 1)), ["a"], pooled=True),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_pickling_keeps_the_rewards():
    pilot = gaussian_pilot(4)
    pilot.groups(4)
    returned = pickle.loads(pickle.dumps(pilot))
    assert returned.fingerprint == pilot.fingerprint
    np.testing.assert_array_equal(returned.groups(4).rewards, pilot.groups(4).rewards)


@pytest.mark.parametrize(
    ("rewards", "values", "pooled", "words"),
    [
        (np.zeros((2, 3)), ["a"], False, "shape"),
        (np.zeros((2, 3, 1)), ["a"], True, "shape"),
        (np.zeros((2, 3, 2)), ["a"], False, "shape"),
        (np.zeros((0, 3, 1)), ["a"], False, "holds nothing"),
        (np.zeros((2, 0, 1)), ["a"], False, "holds nothing"),
        ([[[1.0], [2.0]], [[1.0]]], ["a"], False, "same number of answers"),
        ([[["x"]]], ["a"], False, "not an array of numbers"),
        ([[[1.0], [math.nan]]], ["a"], False, "a is nan at prompt 0, answer 1"),
        ([[1.0], [math.inf]], ["a"], True, "a is inf at sample 1"),
        ([[[1.0], [-1e101]]], ["a"], False, "finite and within"),
        (np.zeros((1, 1, 2)), ["a", "a"], False, "appears twice"),
        (np.zeros((1, 1, 1)), [""], False, "not a name"),
        (np.zeros((1, 1, 1)), [3], False, "not a name"),
        (np.zeros((1, 1, 1)), "a", False, "expected the names"),
        (np.zeros((1, 1, 0)), [], False, "expected the names"),
    ],
)
def test_unusable_rewards_are_refused(rewards, values, pooled, words):
    with pytest.raises(PilotError, match=words):
        PilotSet(rewards, values, pooled=pooled)


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan])
def test_quantiles_outside_the_unit_interval_are_refused(q):
    with pytest.raises(PilotError, match="quantile"):
        gaussian_pilot(0).quantile(q)
