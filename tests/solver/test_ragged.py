import math
import pickle

import numpy as np
import pytest

from solver import (
    Palette,
    PilotError,
    PilotSet,
    Status,
    frontier,
    interference,
    min_candidates,
    prices,
    repair,
    solve,
)
from solver.ragged import quantile_weights, quantiles
from tests.solver.problems import gaussian_pilot, names

COUNTS = (12, 5, 12, 1, 8, 8, 5)


def ragged_pilot(seed=0, counts=COUNTS, width=12, n_values=3):
    full = gaussian_pilot(seed, len(counts), width, n_values)
    rewards = np.array(full.rewards)
    for row, n in zip(rewards, counts, strict=True):
        row[n:] = 1e6  # must never be read
    return PilotSet(rewards, full.values, counts=counts)


def traffic(seed, n_prompts=400, counts=(32, 16)):
    """Half of the prompts with 32 answers, half with 16, which do not differ otherwise."""
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(n_prompts, 32, 2)) + 0.5 * rng.normal(size=(n_prompts, 1, 2))
    rewards[..., 1] = np.exp(0.5 * rewards[..., 1])  # skewed
    return PilotSet(rewards, names(2), counts=np.resize(counts, n_prompts))


def test_full_counts_are_no_counts():
    full = gaussian_pilot(1)
    same = PilotSet(full.rewards, full.values, counts=[16] * 40)
    assert same.counts is None
    assert same.fingerprint == full.fingerprint


def test_statistics_against_plain_loops():
    pilot = ragged_pilot()
    own = [pilot.rewards[i, :n] for i, n in enumerate(COUNTS)]
    means = np.array([rows.mean(axis=0) for rows in own])
    np.testing.assert_allclose(pilot.prompt_means, means, rtol=1e-12)
    np.testing.assert_allclose(pilot.base, means.mean(axis=0), rtol=1e-12)
    covariances = [np.cov(rows.T) for rows in own if len(rows) > 1]  # unbiased
    covariance = np.mean(covariances, axis=0) * 11 / 12  # of 12 answers
    np.testing.assert_allclose(pilot.within_std, np.sqrt(np.diag(covariance)), rtol=1e-12)
    unit = pilot.within_std
    np.testing.assert_allclose(pilot.correlation, covariance / unit / unit[:, None], rtol=1e-12)
    assert (pilot.n_prompts, pilot.n_candidates, pilot.n_values) == (7, 8, 3)


@pytest.mark.parametrize("q", [0.0, 0.2, 0.5, 0.83, 1.0])
def test_quantiles_are_means_of_the_prompts_own(q):
    pilot = ragged_pilot()
    own = [quantiles(pilot.rewards[..., i], pilot.counts, q) for i in range(3)]
    np.testing.assert_allclose(pilot.quantile(q), np.mean(own, axis=1), rtol=1e-11)
    np.testing.assert_allclose(pilot.quantile(q, 1), np.mean(own, axis=1)[1], rtol=1e-11)
    for i in (0, 2):  # full ones
        np.testing.assert_allclose(
            [column[i] for column in own], np.quantile(pilot.rewards[i], q, axis=0), rtol=1e-12
        )


@pytest.mark.parametrize(("n", "width"), [(1, 4), (2, 4), (3, 8), (8, 16), (16, 32), (16, 128)])
def test_quantile_weights_move_with_the_rewards(n, width):
    for q in (0.0, 0.05, 0.5, 0.9, 1.0):
        weights = quantile_weights(q, n, width)
        assert weights.shape == (n,)
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)
        np.testing.assert_allclose(weights[::-1], quantile_weights(1 - q, n, width), atol=1e-12)


def test_pooled_quantiles_count_every_prompt_alike():
    pilot = ragged_pilot()
    for i in range(3):
        for q in (0.1, 0.5, 0.9):
            level = pilot.traffic_quantile(q)[i]
            below = [(pilot.rewards[p, :n, i] <= level).mean() for p, n in enumerate(COUNTS)]
            # one answer of the prompt with a single one is a seventh of all
            assert abs(np.mean(below) - q) <= 1 / 7
    full = gaussian_pilot(3, 6, 5)
    wide = np.concatenate([full.rewards, full.rewards[:, :1]], axis=1)
    cut = PilotSet(wide, full.values, counts=[5] * 6)
    for q in (0.0, 0.13, 0.5, 1.0):
        np.testing.assert_allclose(
            cut.traffic_quantile(q), np.quantile(full.rewards.reshape(-1, 3), q, axis=0), rtol=1e-9
        )


@pytest.mark.parametrize(("n", "tolerance"), [(8, 0.07), (16, 0.01)])
def test_levels_do_not_depend_on_how_many_answers_there_are(n, tolerance):
    """What n answers resolve to is what 32 do: within 4 sampling errors, and what is stated.

    numpy's 80 % quantile of 8 normal answers is milder than that of 32 by 0.10 deviations, that of
    16 by 0.04. The first value is normal; the skewed second is what needs the tolerance.
    """
    many, few = [], []
    for seed in range(40):
        whole = traffic(seed, 1000, (32,))
        part = PilotSet(whole.rewards, whole.values, counts=[n] * 1000)
        for found, pilot in ((many, whole), (few, part)):
            found.append([pilot.quantile(0.8), pilot.quantile(0.3), pilot.within_std, pilot.base])
    gap = (np.array(few) - np.array(many)) / np.array(many)[:, 2:3]
    error = gap.std(axis=0, ddof=1) / math.sqrt(len(gap))
    assert (error < 0.006).all()
    assert (np.abs(gap.mean(axis=0)) < 4 * error + tolerance).all()
    plain = np.quantile(part.rewards[:, :n], 0.8, axis=1).mean(axis=0) - whole.quantile(0.8)
    assert (plain / whole.within_std < -0.02).all()


def test_groups_are_of_prompts_that_have_as_many():
    pilot = ragged_pilot()
    for n, groups in ((1, None), (4, None), (5, 40), (8, 3), (8, None)):
        drawn = pilot.groups(n, groups=groups)
        prompt = drawn.sample // 12
        np.testing.assert_array_equal(prompt, np.repeat(drawn.prompt[:, None], n, axis=1))
        assert (drawn.sample % 12 < np.array(COUNTS)[prompt]).all()
        assert all(len(set(row)) == n for row in drawn.sample.tolist())
        share = np.bincount(drawn.prompt, minlength=7)[np.array(COUNTS) >= n]
        assert share.max() - share.min() <= (groups is not None)
        assert drawn.n_groups == (groups or drawn.n_groups)
    assert pilot.groups(4).n_groups == 12  # 3 + 1 + 3 + 2 + 2 + 1 disjoint ones, over 6 prompts


def test_a_group_is_not_promised_of_a_minority():
    with pytest.raises(PilotError, match="ask for at most 8"):
        ragged_pilot().groups(9)
    with pytest.raises(PilotError, match="ask for at most 8"):
        ragged_pilot().groups(math.inf)


def test_files_and_pickles_keep_the_counts(tmp_path):
    pilot = ragged_pilot()
    pilot.save(tmp_path / "pilot.npz")
    for back in (PilotSet.load(tmp_path / "pilot.npz"), pickle.loads(pickle.dumps(pilot))):
        assert back.fingerprint == pilot.fingerprint
        np.testing.assert_array_equal(back.counts, COUNTS)
    other = ragged_pilot(counts=(*COUNTS[:-1], 6))
    cut = PilotSet(other.rewards, other.values, counts=COUNTS)
    assert cut.fingerprint == pilot.fingerprint  # what is not read does not count
    assert other.fingerprint != pilot.fingerprint


@pytest.mark.parametrize(
    "counts", [[1, 2], [0] * 7, [13] * 7, [2.0] * 7, 5, [[3]] * 7, [True] * 7, ["a"] * 7]
)
def test_impossible_counts_are_refused(counts):
    with pytest.raises(PilotError, match="counts"):
        PilotSet(gaussian_pilot(0, 7, 12).rewards, names(3), counts=counts)
    with pytest.raises(PilotError, match="counts"):
        PilotSet(np.zeros((3, 1)), ["a"], pooled=True, counts=[1, 1, 1])


PALETTE = Palette({"v0": {"quantile": 0.8}, "v1": {"gain": 0.4}})


def test_errors_are_those_over_many_draws():
    """Errors of levels and multipliers against their spread over 150 ragged pilot sets.

    The spread of 150 draws is known to 6 %; four of its errors are allowed, and 5 % for bias.
    The level promised is fixed, so the error of `expected` is that of the level served at these
    multipliers: told by a large independent set.
    """
    truth = traffic(10_000, 4000, (32,))
    drawn = truth.groups(8)
    rewards = drawn.rewards
    misses, multipliers, claimed = [], [], []
    for seed in range(150):
        pilot = traffic(seed)
        solution = solve(PALETTE, pilot, 8)
        assert solution.status is Status.OPTIMAL
        logits = rewards @ solution.multipliers
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        served = np.einsum("gn,gnm->m", weights, rewards) / len(rewards)
        cost = prices(PALETTE, pilot, 8, solution=solution)
        misses.append(solution.expected - served)
        multipliers.append(solution.multipliers)
        claimed.append([solution.stderr, cost.multiplier_stderr])
    spread = np.stack([np.std(misses, axis=0), np.std(multipliers, axis=0)])
    ratio = np.sqrt(np.mean(np.square(claimed), axis=0)) / spread
    np.testing.assert_allclose(ratio, 1.0, atol=0.29)
    # The estimate is unbiased: its mean miss is within four errors, of the truth's own too.
    error = np.hypot(np.std(misses, axis=0) / math.sqrt(150), np.mean(claimed, axis=0)[0] / 3.2)
    assert (np.abs(np.mean(misses, axis=0)) < 4 * error).all()


@pytest.mark.parametrize(
    "target", ["keep", {"gain": 0.3}, {"quantile": 0.7}, {"quantile": 0.6, "of": "traffic"}]
)
def test_a_ragged_set_with_equal_counts_prices_as_the_plain_one(target):
    """With 16 of 17 answers everywhere only the reference size differs, by a hair."""
    full = gaussian_pilot(5, 60, 16)
    wide = np.concatenate([full.rewards, np.zeros((60, 1, 3))], axis=1)
    cut = PilotSet(wide, full.values, counts=[16] * 60)
    palette = Palette({"v0": target, "v2": {"gain": 0.3}})
    found = []
    for pilot in (full, cut):
        solution = solve(palette, pilot, 8, groups=6000)
        cost = prices(palette, pilot, 8, solution=solution, groups=6000)
        found.append([solution.multipliers, solution.stderr, cost.multiplier_stderr])
    np.testing.assert_allclose(found[1], found[0], rtol=0.06, atol=0.02)


def test_everything_else_works_on_a_ragged_set():
    pilot = traffic(1)
    assert min_candidates(PALETTE, pilot) <= 8
    beyond = Palette({"v0": {"gain": 9.0}})
    assert solve(beyond, pilot, 8).status is Status.INFEASIBLE
    mended = repair(beyond, pilot, 8)
    assert mended.solution.status is Status.OPTIMAL
    assert len(frontier(Palette({}), pilot, ("v0", "v1"), candidates=8, n_points=3).points) >= 2
    assert math.isfinite(interference(pilot).mutual_information[0, 1])
    whole = solve(PALETTE, pilot, 32)  # half of the prompts have as many
    assert whole.status is Status.OPTIMAL
