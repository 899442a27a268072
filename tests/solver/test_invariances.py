from dataclasses import dataclass, replace

import numpy as np
from hypothesis import assume, given, settings
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
@settings(max_examples=40)
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
@settings(max_examples=40)
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
@settings(max_examples=30)
def test_levels_of_prompts_do_not_matter_when_their_mean_stays(seed):
    pilot = random_pilot(seed)
    levels = random_targets(seed, pilot)
    shift = np.random.default_rng(seed).normal(size=(12, 1, 3)) * 10
    moved = PilotSet(pilot.rewards + shift - shift.mean(axis=0), pilot.values)
    assert_same(solved(pilot, levels), solved(moved, levels))


@given(seeds)
@settings(max_examples=30)
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
@settings(max_examples=30)
def test_stacking_the_pilot_set_on_itself(seed):
    pilot = random_pilot(seed)
    levels = random_targets(seed, pilot)
    stacked = PilotSet(np.concatenate([pilot.rewards] * 2), pilot.values)
    assert_same(solved(pilot, levels), solved(stacked, levels))


@given(seeds)
@settings(max_examples=30)
def test_a_value_already_met_changes_nothing(seed):
    pilot = random_pilot(seed)
    levels = random_targets(seed, pilot)
    loose = levels.copy()
    loose[2] = pilot.rewards[..., 2].min() - 1
    free = Palette({f"v{i}": {"at_least": float(levels[i])} for i in range(2)})
    assert_same(solve(free, pilot, N_CANDIDATES), solved(pilot, loose))


@given(seeds, st.floats(0.1, 0.9))
@settings(max_examples=40)
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


# Below, every number is a multiple of a power of two, and sums of them are exact: what changes
# nothing on paper must not change the verdict, not even of a palette exactly on the boundary.
PLACES = ("inside", "limit", "beyond", "refused")
STATUSES = {
    "inside": {Status.OPTIMAL, Status.BOUNDARY},
    "limit": {Status.OPTIMAL, Status.BOUNDARY},
    "beyond": {Status.INFEASIBLE},
    "refused": {Status.INFEASIBLE},
}
exactly = settings(max_examples=60)


@dataclass(frozen=True)
class Whole:
    """A palette of lower (side 1) and upper (side -1) targets on whole rewards."""

    rewards: np.ndarray
    side: np.ndarray
    levels: np.ndarray
    floor: float

    @classmethod
    def draw(cls, seed, place):
        rng = np.random.default_rng(seed)
        shape = [(1, 8, 2), (4, 1, 2), (1, 1, 1), (4, 4, 3), (8, 2, 2), (2, 8, 1)][seed % 6]
        rewards = rng.integers(-2, 3, size=shape).astype(float)  # ties
        if seed % 5 == 0:
            rewards[..., 0] = 2.0
        side = rng.choice([-1.0, 1.0], size=shape[2])
        score = rewards @ (side * rng.integers(1, 4, size=shape[2]))
        vertex = rewards[np.arange(shape[0]), score.argmax(axis=1)].mean(axis=0)
        share = {"inside": 0.5, "limit": 1.0, "beyond": 1.0, "refused": 0.0}[place]
        base = rewards.mean(axis=(0, 1))
        levels = base + share * (vertex - base) + side * 2.0**-20 * (place == "beyond")
        return cls(rewards, side, levels, 100.0 if place == "refused" else -100.0)

    def solve(self, **options):
        pilot = PilotSet(self.rewards, names(len(self.side)))
        targets = {
            name: {"at_least" if side > 0 else "at_most": level}
            for name, side, level in zip(pilot.values, self.side, self.levels.tolist(), strict=True)
        }
        palette = Palette(targets, {"v0": self.floor} if self.floor > 0 else {})
        return solve(palette, pilot, np.inf, **options)


def check_unchanged(problem, moved, place, times=1):
    for options in ({}, {"max_iterations": 1}):
        one, other = problem.solve(**options), moved.solve(**options)
        assert one.status is other.status
        if one.status is Status.OPTIMAL:
            np.testing.assert_allclose(one.kl, other.kl, atol=1e-6)
            np.testing.assert_allclose(one.ess * times, other.ess, rtol=1e-5)
        if one.certificate:
            assert other.certificate.asked > other.certificate.limit
        assert one.refused == other.refused
        if not options:
            assert one.status in STATUSES[place]


@given(seeds, st.sampled_from(PLACES))
@exactly
def test_order_at_every_status(seed, place):
    one = Whole.draw(seed, place)
    rng = np.random.default_rng(seed)
    order = np.append(0, 1 + rng.permutation(len(one.side) - 1))  # the floor is on the first
    rewards = rng.permutation(one.rewards[..., order])[:, rng.permutation(one.rewards.shape[1])]
    moved = replace(one, rewards=rewards, side=one.side[order], levels=one.levels[order])
    check_unchanged(one, moved, place)


@given(seeds, st.sampled_from(PLACES))
@exactly
def test_repeats_at_every_status(seed, place):
    one = Whole.draw(seed, place)
    twice = np.arange(len(one.side)).repeat(2)
    values = replace(
        one, rewards=one.rewards[..., twice], side=one.side[twice], levels=one.levels[twice]
    )
    check_unchanged(one, values, place)
    check_unchanged(one, replace(one, rewards=np.tile(one.rewards, (2, 1, 1))), place)
    candidates = replace(one, rewards=np.tile(one.rewards, (1, 2, 1)))
    check_unchanged(one, candidates, place, times=1 if place == "refused" else 2)


@given(seeds, st.sampled_from(PLACES), st.sampled_from([-20, 0, 20]), st.integers(-1000, 1000))
@exactly
def test_units_offsets_and_signs_at_every_status(seed, place, exponent, offset):
    one = Whole.draw(seed, place)
    # A value that no choice can change has no spread to measure small levels by, so they count in
    # terms of its size: see test_a_constant_value_of_a_small_unit_cannot_be_raised.
    assume((exponent >= 0 and offset == 0) or np.ptp(one.rewards, axis=1).any(axis=0).all())
    unit = 2.0**exponent  # about a millionth, or a million
    moved = replace(
        one,
        rewards=(one.rewards + offset) * unit,
        levels=(one.levels + offset) * unit,
        floor=one.floor if one.floor < 0 else (one.floor + offset) * unit,
    )
    if one.floor < 0 or moved.floor > 0:
        check_unchanged(one, moved, place)
    if one.floor < 0:
        turned = replace(one, rewards=-one.rewards, levels=-one.levels, side=-one.side)
        check_unchanged(one, turned, place)


@given(seeds, st.sampled_from(PLACES))
@exactly
def test_a_constant_for_each_prompt_moves_the_target_by_its_mean(seed, place):
    one = Whole.draw(seed, place)
    constant = np.random.default_rng(seed).integers(-50, 50, size=(len(one.rewards), 1, 1))
    if one.floor > 0:
        constant = np.minimum(constant, 0)
    moved = replace(one, rewards=one.rewards + constant, levels=one.levels + constant.mean())
    check_unchanged(one, moved, place)
