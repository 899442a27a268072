import numpy as np
import pytest

from solver import Palette, PaletteError, PilotSet, Status, min_candidates, solve
from tests.solver.problems import at_least, gaussian_pilot, names


def test_the_smallest_number_is_the_smallest():
    pilot = gaussian_pilot(0, n_prompts=50)
    for gain in (0.3, 0.6, 1.0):
        palette = at_least(pilot.base + gain * pilot.scale * np.array([1, 1, 0]))
        n = min_candidates(palette, pilot)
        assert solve(palette, pilot, n).is_achievable
        assert solve(palette, pilot, n - 1).status is Status.INFEASIBLE


def test_a_level_with_a_known_number():
    # 0/1 answers, half of them 1: the best of N is 1 with probability 1 - C(8, N)/C(16, N).
    rewards = np.tile(np.repeat([0.0, 1.0], 8), (4000, 1))[..., None]
    pilot = PilotSet(rewards, names(1))
    # N = 3 gives 0.9 on average, up to 1 of many groups; N = 2 gives 0.77.
    assert min_candidates(at_least([0.85]), pilot) == 3
    assert min_candidates(at_least([0.5]), pilot) == 1
    assert min_candidates(at_least([1.0]), pilot) >= 7


def test_out_of_reach_is_none():
    pilot = gaussian_pilot(0)
    assert min_candidates(at_least(pilot.base + 5 * pilot.scale), pilot) is None
    needs_more = at_least(pilot.base + 0.8 * pilot.scale)
    assert min_candidates(needs_more, pilot, upper=2) is None
    assert min_candidates(needs_more, pilot, upper=10**6) == min_candidates(needs_more, pilot)
    with pytest.raises(PaletteError, match="upper"):
        min_candidates(needs_more, pilot, upper=0)


def test_a_pool_can_form_groups_of_many_sizes():
    pool = PilotSet(gaussian_pilot(0).rewards.reshape(-1, 3), names(3), pooled=True)
    palette = Palette({"v0": {"quantile": 0.9}, "v1": {"quantile": 0.9}})
    n = min_candidates(palette, pool)
    assert 8 < n < 256
    assert min_candidates(palette, pool, upper=4) is None


def test_a_search_leaves_the_groups_in_use_alone():
    pilot = gaussian_pilot(0)
    used = pilot.groups(7)
    min_candidates(at_least(pilot.base + 0.3), pilot)
    assert pilot.groups(7) is used
