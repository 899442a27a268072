"""Values that move together: finite, shortest multipliers, whatever way they are collinear."""

import numpy as np
import pytest
from scipy import optimize

from solver import Palette, PilotSet, Status, solve
from tests.solver.problems import gaussian_pilot, names


def with_columns(pilot, mixes, offset=1.0):
    """The pilot with more values, each a combination of those it has."""
    extra = [pilot.rewards @ mix + offset for mix in mixes]
    rewards = np.concatenate([pilot.rewards, np.stack(extra, axis=-1)], axis=-1)
    return PilotSet(rewards, names(rewards.shape[-1]))


def shortest(pilot, multipliers, mixes, lower):
    """Least standardised norm among the multipliers with the same tilt and the same λ·c."""
    m = len(multipliers)
    tilt = np.hstack([np.eye(pilot.n_values - len(mixes)), np.array(mixes).T])
    equal = np.vstack([tilt, lower - pilot.base])
    # A heavy penalty stands for the equations: its error is about one over its weight squared.
    system = np.vstack([1e4 * equal / pilot.scale, np.eye(m)])
    wanted = np.append(1e4 * equal @ multipliers, np.zeros(m))
    return optimize.nnls(system, wanted)[0] / pilot.scale


@pytest.mark.parametrize(
    "mixes",
    [
        [(1.0, 0.0, 0.0)],
        [(2.5, 0.0, 0.0), (0.5, 0.0, 0.0)],
        [(1.0, 1.0, 0.0)],
        [(1.0, 1.0, 1.0), (0.0, 0.3, 2.0)],
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_of_all_optimal_multipliers_the_shortest(mixes, seed):
    pilot = gaussian_pilot(seed)
    gains = np.array([0.5, 0.3, 0.4]) * pilot.scale
    alone = solve(
        Palette({"v0": {"gain": 0.5}, "v1": {"gain": 0.3}, "v2": {"gain": 0.4}}), pilot, 8
    )
    assert alone.status is Status.OPTIMAL
    more = with_columns(pilot, mixes)
    lower = more.base + np.concatenate([gains, np.array(mixes) @ gains])
    palette = Palette({f"v{i}": {"at_least": float(c)} for i, c in enumerate(lower)})
    solution = solve(palette, more, 8)
    assert solution.status is Status.OPTIMAL
    assert solution.kkt_residual <= 1e-8
    np.testing.assert_allclose(solution.kl, alone.kl, atol=1e-9)
    tilt = solution.multipliers[:3] + np.array(mixes).T @ solution.multipliers[3:]
    np.testing.assert_allclose(tilt, alone.multipliers, atol=1e-6)
    best = shortest(more, solution.multipliers, mixes, lower)
    np.testing.assert_allclose(
        np.linalg.norm(solution.multipliers * more.scale),
        np.linalg.norm(best * more.scale),
        rtol=1e-6,
    )
    np.testing.assert_allclose(solution.multipliers, best, atol=1e-5)


def test_a_repeated_value_shares_its_multiplier():
    pilot = with_columns(gaussian_pilot(0), [(2.0, 0.0, 0.0)])
    palette = Palette({"v0": {"gain": 0.5}, "v3": {"gain": 0.5}})
    solution = solve(palette, pilot, 8)
    scaled = solution.multipliers * pilot.scale
    np.testing.assert_allclose(scaled[0], scaled[3], rtol=1e-9)


def test_the_start_does_not_decide():
    pilot = with_columns(gaussian_pilot(0), [(1.0, 1.0, 0.0)])
    lower = pilot.base + np.append([0.5, 0.3, 0.0], 0.8) * np.append(pilot.scale[:3], 1.0)
    lower[3] = pilot.base[3] + 0.5 * pilot.scale[0] + 0.3 * pilot.scale[1]
    palette = Palette({f"v{i}": {"at_least": float(lower[i])} for i in (0, 1, 3)})
    cold = solve(palette, pilot, 8)
    warm = solve(palette, pilot, 8, warm_start=[0.0, 0.0, 0.0, 5.0])
    np.testing.assert_allclose(cold.multipliers, warm.multipliers, atol=1e-6)


def test_opposite_values_meet_at_one_level():
    pilot = with_columns(gaussian_pilot(1), [(-1.0, 0.0, 0.0)])
    level = float(pilot.base[0] + 0.4 * pilot.scale[0])
    palette = Palette({"v0": {"at_least": level}, "v3": {"at_least": 1.0 - level}})
    solution = solve(palette, pilot, 8)
    assert solution.status is Status.OPTIMAL
    np.testing.assert_allclose(solution.expected[0], level, atol=1e-7)
    assert np.abs(solution.multipliers).max() < 10.0
    apart = Palette({"v0": {"at_least": level}, "v3": {"at_least": 1.01 - level}})
    refused = solve(apart, pilot, 8)
    assert refused.status is Status.INFEASIBLE
    assert refused.certificate.asked > refused.certificate.limit


@pytest.mark.parametrize("noise", [1e-3, 1e-5, 1e-7])
def test_nearly_collinear_values_do_not_explode(noise):
    """Two measures of one thing, both asked for at the same quantile."""
    pilot = gaussian_pilot(2, n_prompts=60)
    rng = np.random.default_rng(0)
    twin = pilot.rewards[..., :1] + noise * rng.normal(size=(60, 16, 1))
    both = PilotSet(np.concatenate([pilot.rewards, twin], axis=-1), names(4))
    palette = Palette({name: {"quantile": 0.65} for name in ("v0", "v1", "v3")})
    alone = solve(Palette({name: {"quantile": 0.65} for name in ("v0", "v1")}), pilot, 8)
    solution = solve(palette, both, 8)
    assert solution.status is Status.OPTIMAL
    total = solution.multipliers[0] + solution.multipliers[3]
    np.testing.assert_allclose(total, alone.multipliers[0], rtol=5 * noise**0.5)
    assert solution.multipliers.min() >= 0.0
