import json

import numpy as np
import pytest

from solver import Palette, PaletteError, Status, UnknownValueError, repair, solve
from tests.solver.problems import at_least, explicit_fraction, explicit_margin, gaussian_pilot

N = 8
NO_UPPER = np.full(3, np.inf)


def explicit_distance(rewards, levels, unit):
    """Standardised distance to the levels below an achievable point, by a projected descent."""
    n_groups, n, _ = rewards.shape
    weights = np.full((n_groups, n), 1.0 / n)
    best = np.inf
    for k in range(20_000):  # Frank-Wolfe with exact line search: an upper bound, slow but sure
        served = np.einsum("gn,gnm->m", weights, rewards) / n_groups
        slack = np.maximum((levels - served) / unit, 0)
        best = min(best, float(np.linalg.norm(slack)))
        pick = (rewards @ (slack / unit)).argmax(axis=1)
        vertex = rewards[np.arange(n_groups), pick].mean(axis=0)
        ahead = (vertex - served) / unit
        lower = float(np.linalg.norm(slack) - slack @ ahead / max(np.linalg.norm(slack), 1e-300))
        if best - lower < 1e-4:
            return lower, best
        step = np.clip(slack @ ahead / (ahead @ ahead), 0, 1) if k < 50 else 2 / (k + 2)
        weights *= 1 - step
        weights[np.arange(n_groups), pick] += step
    return lower, best


def out_of_reach(seed):
    pilot = gaussian_pilot(seed, n_prompts=10, n_values=3)
    gains = np.random.default_rng(seed).uniform(0.3, 1.5, size=3)
    levels = pilot.base + gains * pilot.scale
    return pilot, levels


@pytest.mark.parametrize("seed", range(8))
def test_interpolation_is_exact_and_served(seed):
    pilot, levels = out_of_reach(seed)
    found = repair(at_least(levels), pilot, N, "interpolate")
    rewards = pilot.groups(N).rewards
    exact = explicit_fraction(rewards, pilot.base, levels, NO_UPPER, pilot.scale, 1.0)
    np.testing.assert_allclose(found.fraction, exact, atol=1e-7)
    on_the_way = pilot.base + found.fraction * (levels - pilot.base)
    np.testing.assert_allclose(list(found.limit.values()), on_the_way, rtol=1e-9)
    assert found.solution.status is Status.OPTIMAL
    if exact < 1:
        served = pilot.base + 0.99 * found.fraction * (levels - pilot.base)
        np.testing.assert_allclose(list(found.levels.values()), served, rtol=1e-9)
        assert found.solution.ess > 1.0
        np.testing.assert_allclose(found.solution.expected, served, atol=1e-7)


@pytest.mark.parametrize("seed", range(8))
def test_nearest_is_nearest_and_served(seed):
    pilot, levels = out_of_reach(seed)
    found = repair(at_least(levels), pilot, N, "nearest")
    rewards = pilot.groups(N).rewards
    lower, upper = explicit_distance(rewards, levels, pilot.scale)
    assert lower - 1e-6 <= found.distance <= upper + 1e-6
    limit = np.array(list(found.limit.values()))
    moved = np.linalg.norm((limit - levels) / pilot.scale)
    np.testing.assert_allclose(moved, found.distance, atol=1e-7)
    # achievable, and on the boundary when anything had to give
    margin = explicit_margin(rewards, limit, NO_UPPER, pilot.scale)
    if found.distance:
        assert abs(margin) < 1e-6
    assert found.solution.status is Status.OPTIMAL


@pytest.mark.parametrize("first", ["v0", "v1", "v2"])
def test_greedy_gives_the_first_value_all_there_is(first):
    pilot, levels = out_of_reach(1)
    levels = pilot.base + 1.6 * pilot.scale
    found = repair(at_least(levels), pilot, N, "greedy", priorities=[first])
    rewards = pilot.groups(N).rewards
    i = int(first[1])
    alone = levels.copy()
    alone[[j for j in range(3) if j != i]] = pilot.base[[j for j in range(3) if j != i]]
    exact = explicit_fraction(rewards, pilot.base, alone, NO_UPPER, pilot.scale, 1.0)
    np.testing.assert_allclose(
        found.limit[first], pilot.base[i] + exact * (levels[i] - pilot.base[i]), atol=1e-6
    )
    limit = np.array([found.limit[name] for name in pilot.values])
    assert abs(explicit_margin(rewards, limit, NO_UPPER, pilot.scale)) < 1e-6
    assert found.solution.status is Status.OPTIMAL
    assert found.fraction is None
    assert found.distance is None


def test_greedy_orders_differ():
    pilot, _ = out_of_reach(1)
    palette = at_least(pilot.base + 1.2 * pilot.scale)
    one = repair(palette, pilot, N, "greedy", priorities=["v0"])
    other = repair(palette, pilot, N, "greedy", priorities=["v2", "v1"])
    assert one.limit["v0"] > other.limit["v0"] + 0.01
    assert other.limit["v2"] > one.limit["v2"] + 0.01


@pytest.mark.parametrize("method", ["interpolate", "nearest", "greedy"])
def test_all_kinds_of_targets_are_repaired(method):
    pilot = gaussian_pilot(0, n_values=5)
    high = (pilot.base + 1.5 * pilot.scale).tolist()
    low = (pilot.base - 1.5 * pilot.scale).tolist()
    palette = Palette(
        {
            "v0": {"at_least": high[0]},
            "v1": {"at_most": low[1]},
            "v2": {"between": [high[2], high[2] + 1]},
            "v3": "keep",
            "v4": {"multiplier": 0.1},
        },
        floors={"v3": low[3] - 1},
    )
    found = repair(palette, pilot, N, method)
    assert found.solution.status is Status.OPTIMAL
    assert dict(found.palette.floors) == dict(palette.floors)
    wire = found.palette.to_dict()["targets"]
    assert [*wire["v0"], *wire["v1"], *wire["v2"], *wire["v3"]] == [
        "at_least", "at_most", "between", "at_least",
    ]  # fmt: skip
    assert wire["v4"] == {"multiplier": 0.1}
    assert solve(found.palette, pilot, N).status is Status.OPTIMAL
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("method", ["interpolate", "nearest", "greedy"])
def test_what_is_within_reach_stays(method):
    pilot = gaussian_pilot(0)
    palette = at_least(pilot.base + 0.1 * pilot.scale)
    found = repair(palette, pilot, N, method)
    assert found.palette == palette
    assert found.fraction in (1.0, None)
    assert found.distance in (0.0, None)
    assert found.solution.status is Status.OPTIMAL


@pytest.mark.parametrize("method", ["interpolate", "nearest", "greedy"])
def test_extremes_are_repaired_too(method):
    pilot = gaussian_pilot(0)
    top = pilot.groups(N).rewards[..., 0].max(axis=1).mean()
    for levels in ([top], [1e9], pilot.base + np.array([0, 0, 50])):
        found = repair(at_least(levels), pilot, N, method)
        assert found.solution.status is Status.OPTIMAL
    single = repair(at_least(pilot.base + 1), pilot, 1, method)
    assert single.solution.status is Status.OPTIMAL
    np.testing.assert_allclose(single.solution.expected, pilot.base)
    nobody = repair(Palette({"v0": "keep"}, floors={"v0": 1e9}), pilot, N, method)
    assert nobody.solution.status is Status.INFEASIBLE


def test_a_budget_is_kept_in_the_repair():
    pilot, _ = out_of_reach(0)
    palette = at_least(pilot.base + 2 * pilot.scale)
    found = repair(palette, pilot, N, max_kl=0.2)
    assert found.solution.kl <= 0.2
    assert found.solution.limited_by == "max_kl"


def test_mistakes_are_named():
    pilot = gaussian_pilot(0)
    palette = at_least(pilot.base)
    with pytest.raises(PaletteError, match="none of") as caught:
        repair(palette, pilot, N, "closest")
    assert caught.value.param == "repair.method"
    with pytest.raises(UnknownValueError, match="Did you mean"):
        repair(palette, pilot, N, "greedy", priorities=["v9"])
    with pytest.raises(PaletteError, match="twice"):
        repair(palette, pilot, N, "greedy", priorities=["v1", "v1"])
