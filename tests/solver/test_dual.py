import numpy as np
import pytest

from solver import Palette, PilotSet, solve
from solver import groups as groups_module
from solver.dual import ServedDual
from solver.serving import serve
from tests.solver.problems import at_least, gaussian_pilot, names, support


def plain_dual(rewards, multipliers, allowed=None):
    """Mean log-partition, mean served rewards and mean covariance, one group at a time."""
    values, levels, covariances = [], [], []
    for g, group in enumerate(rewards):
        keep = slice(None) if allowed is None else allowed[g]
        weights = np.exp(group[keep] @ multipliers)
        values.append(np.log(weights.sum()))
        weights /= weights.sum()
        mean = weights @ group[keep]
        levels.append(mean)
        covariances.append(np.cov(group[keep].T, aweights=weights, ddof=0))
    return np.mean(values), np.mean(levels, axis=0), np.mean(covariances, axis=0)


@pytest.fixture
def pilot():
    return gaussian_pilot(0, n_prompts=20, n_candidates=8)


def test_one_pass_agrees_with_the_plain_formulas(pilot):
    drawn = pilot.groups(4)
    dual = ServedDual(drawn, at_least([0.0, 0.5, 1.0]).resolve(pilot))
    point = np.array([0.3, 0.0, 1.2])
    here = dual(point)
    per_unit = point / pilot.scale
    log_partition, levels, covariance = plain_dual(drawn.rewards, per_unit)
    np.testing.assert_allclose(pilot.base + pilot.scale * here.levels, levels, rtol=1e-12)
    np.testing.assert_allclose(
        here.hessian * pilot.scale * pilot.scale[:, None], covariance, atol=1e-12
    )
    # The dual is that of rewards shifted by the base, which λ·c − Λ does not see.
    value = per_unit @ np.array([0.0, 0.5, 1.0]) - log_partition
    np.testing.assert_allclose(here.value, value, rtol=1e-12)
    np.testing.assert_allclose(
        here.support, support(drawn.rewards - pilot.base, per_unit), rtol=1e-12
    )


def test_derivatives_against_differences(pilot):
    dual = ServedDual(pilot.groups(4), at_least([0.0, 0.5, 1.0]).resolve(pilot), ridge=0.3)
    point = np.array([0.3, 0.4, 1.2])
    here = dual(point)
    h = 1e-5
    for i in range(3):
        step = np.zeros(3)
        step[i] = h
        ahead, behind = dual(point + step), dual(point - step)
        slope = dual.lower[i] - here.levels[i] - 0.3 * point[i]
        # central differences: error h² times a third derivative, and rounding 1e-16/h
        np.testing.assert_allclose((ahead.value - behind.value) / (2 * h), slope, atol=1e-9)
        np.testing.assert_allclose(
            (ahead.levels - behind.levels) / (2 * h), here.hessian[i], atol=1e-9
        )


def test_blocks_do_not_change_the_result(pilot, monkeypatch):
    constraints = Palette({"v0": "keep", "v2": "keep"}, floors={"v1": 0.0}).resolve(pilot)
    point = np.array([0.7, 0.2])
    whole = ServedDual(pilot.groups(4), constraints)
    monkeypatch.setattr(groups_module, "BLOCK_NUMBERS", 100)
    cut = ServedDual(gaussian_pilot(0, n_prompts=20, n_candidates=8).groups(4), constraints)
    assert len(cut.groups.blocks) > 3 * len(whole.groups.blocks)
    np.testing.assert_allclose(cut(point).hessian, whole(point).hessian, rtol=1e-12)
    np.testing.assert_allclose(cut(point).value, whole(point).value, rtol=1e-12)
    np.testing.assert_allclose(serve(cut, point).expected, serve(whole, point).expected, rtol=1e-12)
    np.testing.assert_allclose(cut.vertex(point), whole.vertex(point), rtol=1e-12)


@pytest.mark.parametrize(
    "palette",
    [
        Palette({"v0": {"quantile": 0.7}, "v2": "keep"}),
        Palette({"v0": {"gain": 0.3}, "v1": {"multiplier": 0.4}}, floors={"v1": 0.0}),
        Palette({"v0": {"gain": 9.0}}),
    ],
)
def test_blocks_made_anew_in_each_pass_give_the_same(palette, monkeypatch):
    """A million groups are too many to keep; a few are enough to see that it is the same sum."""
    monkeypatch.setattr(groups_module, "BLOCK_NUMBERS", 100)
    kept = solve(palette, gaussian_pilot(0), 4)
    monkeypatch.setattr(groups_module, "HELD_NUMBERS", 0)
    pilot = gaussian_pilot(0)
    assert pilot.groups(4).held is None
    made = solve(palette, pilot, 4)
    assert made.status is kept.status
    np.testing.assert_array_equal(made.multipliers, kept.multipliers)
    np.testing.assert_array_equal(made.stderr, kept.stderr)
    assert (made.refused, made.kl, made.certificate) == (kept.refused, kept.kl, kept.certificate)


def test_at_rest_nothing_needs_a_pass(pilot):
    """The uniform choice has a closed form; a hair beside it, one pass gives the same."""
    dual = ServedDual(pilot.groups(4), at_least([0.0, 0.5, 1.0]).resolve(pilot))
    rest, beside = dual(np.zeros(3)), dual(np.full(3, 1e-9))
    np.testing.assert_allclose(rest.hessian, beside.hessian, atol=1e-8)
    np.testing.assert_allclose(rest.levels, beside.levels, atol=1e-8)
    np.testing.assert_allclose(rest.value, beside.value, atol=1e-8)
    assert rest.is_finite


def test_a_given_multiplier_tilts_the_groups(pilot):
    palette = Palette({"v0": {"at_least": 0.0}, "v1": {"multiplier": -0.8}})
    drawn = pilot.groups(4)
    dual = ServedDual(drawn, palette.resolve(pilot))
    here = dual(np.array([0.5]))
    _, levels, _ = plain_dual(drawn.rewards, np.array([0.5 / pilot.scale[0], -0.8, 0.0]))
    np.testing.assert_allclose(pilot.base[0] + pilot.scale[0] * here.levels[0], levels[0])
    served = serve(dual, np.array([0.5]))
    np.testing.assert_allclose(served.expected, levels, rtol=1e-12)
    # The support function is that of the solved values alone.
    np.testing.assert_allclose(
        here.support, support(drawn.rewards - pilot.base, np.array([0.5 / pilot.scale[0], 0, 0]))
    )


def test_floors_refuse_candidates_and_groups(pilot):
    drawn = pilot.groups(4)
    floor = float(np.quantile(drawn.rewards[..., 1], 0.6))
    palette = Palette({"v0": {"at_least": 0.0}}, floors={"v1": floor})
    dual = ServedDual(drawn, palette.resolve(pilot))
    allowed = drawn.rewards[..., 1] >= floor
    kept = allowed.any(axis=1)
    assert 0 < kept.sum() < drawn.n_groups
    np.testing.assert_allclose(dual.refused, 1 - kept.mean())
    _, levels, _ = plain_dual(
        drawn.rewards[kept], np.array([0.5 / pilot.scale[0], 0, 0]), allowed[kept]
    )
    served = serve(dual, np.array([0.5]))
    np.testing.assert_allclose(served.expected, levels, rtol=1e-12)
    here = dual(np.array([0.5]))
    np.testing.assert_allclose(dual.origin[0] + pilot.scale[0] * here.levels[0], levels[0])


def test_the_best_is_served_where_floors_leave_none():
    rewards = np.array([[[0.0, -1.0], [5.0, -3.0], [1.0, -2.0]]])
    pilot = PilotSet(rewards, names(2))
    palette = Palette({"v0": {"multiplier": 9.0}}, floors={"v1": 0.0}, on_floor="best")
    dual = ServedDual(pilot.groups(3), palette.resolve(pilot))
    assert dual.refused == 0
    np.testing.assert_allclose(serve(dual, np.zeros(0)).expected, [0.0, -1.0], atol=1e-12)


def test_huge_multipliers_and_rewards_stay_finite():
    pilot = PilotSet(gaussian_pilot(0).rewards * 1e6 + 1e6, names(3))
    dual = ServedDual(pilot.groups(8), Palette(dict.fromkeys(names(3), "keep")).resolve(pilot))
    assert dual(np.full(3, 1e6)).is_finite
    assert not dual(np.full(3, 1e308)).is_finite


def test_the_vertex_is_the_support_function(pilot):
    drawn = pilot.groups(4)
    dual = ServedDual(drawn, at_least([0, 0, 0]).resolve(pilot))
    direction = np.array([0.3, -0.5, 1.0])
    vertex = pilot.base + pilot.scale * dual.vertex(direction)
    per_unit = direction / pilot.scale
    np.testing.assert_allclose(per_unit @ vertex, support(drawn.rewards, per_unit), rtol=1e-12)
