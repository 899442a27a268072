import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from solver import Palette, PilotSet, Status, solve
from tests.solver.problems import names

N_CANDIDATES = 8
seeds = st.integers(0, 10_000)


def random_pilot(seed, n_values=3):
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(12, N_CANDIDATES, n_values)) @ rng.normal(size=(n_values, n_values))
    if seed % 3 == 0:
        rewards = np.round(rewards)  # ties
    return PilotSet(rewards + rng.normal(size=(12, 1, n_values)), names(n_values))


def random_targets(seed, pilot):
    """Reward-unit levels, some out of reach."""
    rng = np.random.default_rng(seed + 1)
    gains = rng.uniform(-0.3, 0.8, size=pilot.n_values)
    return pilot.base + gains * pilot.scale


def solved(pilot, levels, n=N_CANDIDATES, **options):
    palette = Palette(
        {name: {"at_least": float(c)} for name, c in zip(pilot.values, levels, strict=True)}
    )
    return solve(palette, pilot, n, **options)


def assert_same(one, other, multipliers=True):
    assert one.status is other.status
    if one.status is Status.OPTIMAL:
        np.testing.assert_allclose(one.kl, other.kl, atol=1e-6)
        np.testing.assert_allclose(one.ess, other.ess, atol=1e-5)
        if multipliers:
            # a KKT residual of 1e-8 leaves about that over the least curvature
            np.testing.assert_allclose(one.multipliers, other.multipliers, rtol=1e-4, atol=1e-5)


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_order_of_values_prompts_and_candidates(seed):
    pilot = random_pilot(seed)
    levels = random_targets(seed, pilot)
    rng = np.random.default_rng(seed + 2)
    order = rng.permutation(3)
    rewards = rng.permutation(pilot.rewards[:, rng.permutation(N_CANDIDATES)])
    moved = PilotSet(rewards[..., order], [pilot.values[i] for i in order])
    one, other = solved(pilot, levels), solved(moved, levels[order])
    assert one.status is other.status
    if one.status is Status.OPTIMAL:
        np.testing.assert_allclose(one.multipliers[order], other.multipliers, rtol=1e-4, atol=1e-5)


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_units_and_offsets(seed):
    pilot = random_pilot(seed)
    levels = random_targets(seed, pilot)
    units, offsets = np.array([1e3, 1.0, 1e-3]), np.array([-5.0, 1e3, 0.0])
    moved = PilotSet(pilot.rewards * units + offsets, pilot.values)
    one, other = solved(pilot, levels), solved(moved, levels * units + offsets)
    assert one.status is other.status
    if one.status is Status.OPTIMAL:
        np.testing.assert_allclose(one.multipliers, other.multipliers * units, rtol=1e-4, atol=1e-5)


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_levels_of_prompts_do_not_matter_when_their_mean_stays(seed):
    pilot = random_pilot(seed)
    levels = random_targets(seed, pilot)
    shift = np.random.default_rng(seed).normal(size=(12, 1, 3)) * 10
    moved = PilotSet(pilot.rewards + shift - shift.mean(axis=0), pilot.values)
    assert_same(solved(pilot, levels), solved(moved, levels))


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_a_value_named_twice_counts_once(seed):
    pilot = random_pilot(seed, n_values=2)
    levels = random_targets(seed, pilot)
    twice = PilotSet(pilot.rewards[..., [0, 1, 0]], names(3))
    one, other = solved(pilot, levels), solved(twice, levels[[0, 1, 0]])
    assert_same(one, other, multipliers=False)
    if one.status is Status.OPTIMAL:
        together = other.multipliers[0] + other.multipliers[2]
        np.testing.assert_allclose(one.multipliers[0], together, rtol=1e-4, atol=1e-5)


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_stacking_the_pilot_set_on_itself(seed):
    pilot = random_pilot(seed)
    levels = random_targets(seed, pilot)
    stacked = PilotSet(np.concatenate([pilot.rewards] * 2), pilot.values)
    assert_same(solved(pilot, levels), solved(stacked, levels))


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_a_value_already_met_changes_nothing(seed):
    pilot = random_pilot(seed)
    levels = random_targets(seed, pilot)
    loose = levels.copy()
    loose[2] = pilot.rewards[..., 2].min() - 1
    free = Palette({f"v{i}": {"at_least": float(levels[i])} for i in range(2)})
    assert_same(solve(free, pilot, N_CANDIDATES), solved(pilot, loose))


@given(seeds, st.floats(0.1, 0.9))
@settings(max_examples=40, deadline=None)
def test_what_is_promised_is_served(seed, sharpness):
    """Whatever the palette: optimal means met with complementary slackness, else there is proof."""
    pilot = random_pilot(seed)
    levels = random_targets(seed, pilot)
    solution = solved(pilot, levels)
    if solution.status is Status.OPTIMAL:
        slack = (solution.expected - levels) / pilot.scale
        assert (slack >= -2e-8).all()
        assert (np.minimum(slack, solution.multipliers * pilot.scale) <= 2e-8).all()
    else:
        assert solution.status is Status.INFEASIBLE
        assert solution.certificate.asked > solution.certificate.limit
