import math

import numpy as np
import pytest

from solver import PilotError, PilotSet
from solver.pilot import KEPT_GROUPS
from tests.solver.problems import gaussian_pilot, names


def test_by_default_every_candidate_is_used_once():
    pilot = gaussian_pilot(0, n_prompts=6, n_candidates=12)
    drawn = pilot.groups(4)
    assert drawn.rewards.shape == (18, 4, 3)
    assert sorted(drawn.sample.ravel().tolist()) == list(range(72))
    np.testing.assert_array_equal(drawn.sample // 12, np.repeat(drawn.prompt[:, None], 4, axis=1))
    np.testing.assert_array_equal(np.bincount(drawn.prompt), 3)


def test_what_does_not_divide_is_left_over():
    drawn = gaussian_pilot(0, n_prompts=6, n_candidates=13).groups(4)
    assert drawn.rewards.shape == (18, 4, 3)
    assert len(set(drawn.sample.ravel().tolist())) == 72


def test_more_groups_than_the_data_cut_into_reuse_it_evenly():
    pilot = gaussian_pilot(0, n_prompts=6, n_candidates=12)
    drawn = pilot.groups(4, groups=100)
    assert drawn.n_groups == 100
    counts = np.bincount(drawn.prompt, minlength=6)
    assert counts.max() - counts.min() <= 1
    assert all(len(set(row)) == 4 for row in drawn.sample.tolist())
    np.testing.assert_array_equal(drawn.sample // 12, np.repeat(drawn.prompt[:, None], 4, axis=1))
    assert drawn.n_independent == 6


def test_fewer_groups_than_prompts():
    drawn = gaussian_pilot(0, n_prompts=6, n_candidates=12).groups(4, groups=4)
    assert len(set(drawn.prompt.tolist())) == 4


def test_the_whole_prompt_is_one_group():
    pilot = gaussian_pilot(0, n_prompts=6, n_candidates=12)
    for n in (12, math.inf):
        np.testing.assert_array_equal(pilot.groups(n).rewards, pilot.rewards)


def test_a_pool_is_cut_without_replacement_within_a_group():
    pilot = PilotSet(np.arange(103.0)[:, None], names(1), pooled=True)
    drawn = pilot.groups(5)
    assert drawn.n_groups == 500
    assert all(len(set(row)) == 5 for row in drawn.sample.tolist())
    counts = np.bincount(drawn.sample.ravel(), minlength=103)
    # 25 cuts of 20 groups leave out 3 samples each
    assert counts.min() >= 18
    assert counts.max() <= 25
    assert drawn.n_independent == 20


def test_a_large_pool_is_cut_four_times():
    pilot = PilotSet(np.arange(2000.0)[:, None], names(1), pooled=True)
    np.testing.assert_array_equal(np.bincount(pilot.groups(5).sample.ravel()), 4)


def test_an_infinite_group_of_a_pool_is_the_pool():
    pilot = PilotSet(np.arange(10.0)[:, None], names(1), pooled=True)
    np.testing.assert_array_equal(pilot.groups(math.inf).rewards[0], pilot.rewards)


def test_excesses_restore_the_rewards():
    pilot = gaussian_pilot(0, n_prompts=30, n_candidates=8)
    drawn = pilot.groups(4)
    excess = np.concatenate([block.transpose(2, 1, 0) for block in drawn.blocks])
    restored = drawn.base + drawn.means[:, None] + excess * drawn.scale
    np.testing.assert_allclose(restored, drawn.rewards, atol=1e-13)
    assert sum(part.stop - part.start for part in drawn.slices) == drawn.n_groups


def test_seeds_decide_and_repeat():
    pilot = gaussian_pilot(0)
    again = gaussian_pilot(0)
    np.testing.assert_array_equal(pilot.groups(4).sample, again.groups(4).sample)
    assert (pilot.groups(4).sample != pilot.groups(4, seed=1).sample).any()
    assert pilot.groups(4) is pilot.groups(4)


def test_only_a_few_groups_are_kept():
    pilot = gaussian_pilot(0)
    for n in range(1, 17):
        pilot.groups(n)
    assert len(pilot._groups) <= KEPT_GROUPS


@pytest.mark.parametrize("n", [0, -1, 2.5, math.nan, True, 17])
def test_impossible_sizes_are_refused(n):
    with pytest.raises(PilotError, match="candidates"):
        gaussian_pilot(0).groups(n)


def test_too_many_candidates_say_how_many_there_are():
    with pytest.raises(PilotError, match="ask for at most 16"):
        gaussian_pilot(0).groups(17)
    with pytest.raises(PilotError, match="has 10 samples"):
        PilotSet(np.arange(10.0)[:, None], names(1), pooled=True).groups(11)


@pytest.mark.parametrize("seed", [-1, 1.5, None, True])
def test_impossible_seeds_are_refused(seed):
    with pytest.raises(PilotError, match="seed"):
        gaussian_pilot(0).groups(4, seed=seed)


@pytest.mark.parametrize("groups", [0, -3, True, 2.5])
def test_impossible_numbers_of_groups_are_refused(groups):
    with pytest.raises(PilotError, match="groups"):
        gaussian_pilot(0).groups(4, groups=groups)
