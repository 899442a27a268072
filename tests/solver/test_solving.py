import dataclasses
import json
import math

import numpy as np
import pytest

from solver import Palette, PaletteError, PilotError, PilotSet, SolverError, Status, solve
from solver.dual import ServedDual
from solver.solving import decide
from solver.tilt import ess, expected, kl, log_weights
from tests.solver.problems import (
    at_least,
    gaussian_pilot,
    names,
    random_choice_levels,
    two_point_pilot,
)


@pytest.mark.parametrize("wanted", [0.31, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_two_points_give_a_logit(wanted, unit):
    """Share 0.3 of answers with the high reward: λ is a difference of logits over the gap."""
    pilot = two_point_pilot(0.3, low=-unit, high=2 * unit)
    solution = solve(at_least([-unit + 3 * unit * wanted]), pilot, 10)
    logit = math.log(wanted / (1 - wanted)) - math.log(0.3 / 0.7)
    assert solution.status is Status.OPTIMAL
    np.testing.assert_allclose(solution.multipliers, [logit / (3 * unit)], rtol=1e-6)
    np.testing.assert_allclose(solution.expected, [-unit + 3 * unit * wanted], rtol=1e-8)
    divergence = wanted * math.log(wanted / 0.3) + (1 - wanted) * math.log((1 - wanted) / 0.7)
    np.testing.assert_allclose(solution.kl, divergence, rtol=1e-6)


def test_upper_targets_have_negative_multipliers():
    pilot = two_point_pilot(0.6)
    solution = solve(Palette({"v0": {"at_most": 0.2}}), pilot, 10)
    logit = math.log(0.2 / 0.8) - math.log(0.6 / 0.4)
    np.testing.assert_allclose(solution.multipliers, [logit], rtol=1e-7)
    assert solution.targets == {"v0": 0.2}


@pytest.mark.parametrize(
    ("low", "high", "served"), [(0.7, 0.8, 0.7), (0.1, 0.2, 0.2), (0.5, 0.7, 0.6), (0.3, 0.3, 0.3)]
)
def test_between_pulls_to_the_nearer_end(low, high, served):
    pilot = two_point_pilot(0.6)
    solution = solve(Palette({"v0": {"between": [low, high]}}), pilot, 10)
    assert solution.status is Status.OPTIMAL
    np.testing.assert_allclose(solution.expected, [served], atol=1e-8)
    logit = math.log(served / (1 - served)) - math.log(0.6 / 0.4)
    np.testing.assert_allclose(solution.multipliers, [logit], atol=1e-6)
    assert solution.targets == {"v0": (low, high)}


def test_every_kind_at_once_is_met():
    pilot = gaussian_pilot(2, n_prompts=60, n_values=5)
    palette = Palette(
        {
            "v0": {"quantile": 0.6},
            "v1": {"at_most": float(pilot.base[1] - 0.2 * pilot.scale[1])},
            "v2": {"between": (pilot.base[2:3] + pilot.scale[2] * np.array([0.3, 0.4])).tolist()},
            "v3": {"multiplier": 0.2},
        }
    )
    solution = solve(palette, pilot, 16)
    assert solution.status is Status.OPTIMAL
    np.testing.assert_allclose(solution.expected[0], pilot.quantile(0.6)[0], rtol=1e-7)
    np.testing.assert_allclose(solution.expected[1], solution.targets["v1"], rtol=1e-7)
    np.testing.assert_allclose(solution.expected[2], solution.targets["v2"][0], rtol=1e-7)
    assert solution.multipliers[3] == pytest.approx(0.2, rel=1e-12)
    assert solution.multipliers[4] == 0.0
    assert "v3" not in solution.targets
    assert "v4" not in solution.targets


def test_the_numbers_are_those_of_the_choice_itself():
    pilot = gaussian_pilot(5, n_prompts=30, n_candidates=24)
    solution = solve(Palette({"v0": {"gain": 0.6}, "v2": {"gain": 0.4}}), pilot, 8)
    groups = pilot.groups(8)
    log_w = [log_weights(solution.multipliers, rewards) for rewards in groups.rewards]
    levels = np.array([expected(w, r) for w, r in zip(log_w, groups.rewards, strict=True)])
    np.testing.assert_allclose(solution.expected, levels.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(solution.ess, np.mean([ess(w) for w in log_w]), rtol=1e-10)
    np.testing.assert_allclose(solution.kl, np.mean([kl(w) for w in log_w]), rtol=1e-10)
    by_prompt = np.array([levels[groups.prompt == p].mean(axis=0) for p in range(30)])
    stderr = by_prompt.std(axis=0, ddof=1) / np.sqrt(30)
    np.testing.assert_allclose(solution.stderr, stderr, rtol=1e-10)


def test_keeping_the_base_costs_nothing_whatever_the_groups():
    # 16 candidates in groups of 5 leave one out; the base is still the pilot set's.
    pilot = gaussian_pilot(0)
    for n in (1, 3, 5, 16):
        solution = solve(Palette(dict.fromkeys(pilot.values, "keep")), pilot, n)
        assert solution.status is Status.OPTIMAL
        assert not solution.multipliers.any()
        np.testing.assert_allclose(solution.expected, pilot.base, rtol=1e-12)
        np.testing.assert_allclose(solution.ess, n)


def test_an_empty_palette_is_the_uniform_choice():
    solution = solve(Palette({}), gaussian_pilot(0), 4)
    assert solution.status is Status.OPTIMAL
    assert solution.targets == {}
    np.testing.assert_allclose([solution.ess, solution.kl], [4, 0], atol=1e-12)


def test_given_multipliers_are_served_as_they_are():
    pilot = gaussian_pilot(0)
    palette = Palette({"v0": {"multiplier": 0.7}, "v2": {"multiplier": -0.1}})
    solution = solve(palette, pilot, 8)
    assert solution.status is Status.OPTIMAL
    np.testing.assert_allclose(solution.multipliers, palette.multipliers(pilot.values))
    assert solution.expected[0] > pilot.base[0]
    # The largest multiplier and reward allowed: the best candidate, without overflow.
    huge = PilotSet(pilot.rewards * 1e98, pilot.values)
    best = solve(Palette({"v0": {"multiplier": 1e100}}), huge, 8)
    assert best.status is Status.OPTIMAL
    np.testing.assert_allclose(
        best.expected[0], huge.groups(8).rewards[..., 0].max(axis=1).mean(), rtol=1e-12
    )


def test_an_overflow_is_a_status():
    """The limits on rewards and multipliers keep it away; were it to happen, it would be said."""
    pilot = gaussian_pilot(0)
    asked = Palette({"v0": {"multiplier": 1.0}, "v1": "keep"}).resolve(pilot)
    asked = dataclasses.replace(asked, fixed=asked.fixed * 1e308)
    dual = ServedDual(pilot.groups(8), asked)
    assert decide(dual, np.zeros(1), 8, 100).status is Status.NOT_FINITE


def test_one_prompt_solves_its_own_answer():
    """Scope "answer": the request's candidates are the pilot set."""
    rewards = np.array([[[0.0, 3.0], [1.0, 2.0], [2.0, 2.0], [3.0, 0.0]]])
    pilot = PilotSet(rewards, names(2))
    solution = solve(Palette({"v0": {"quantile": 0.6}, "v1": {"at_least": 1.5}}), pilot, 4)
    assert solution.status is Status.OPTIMAL
    np.testing.assert_allclose(solution.expected[0], np.quantile(rewards[0, :, 0], 0.6))
    assert solution.expected[1] >= 1.5 - 1e-8
    np.testing.assert_array_equal(solution.stderr, 0)
    two = PilotSet(rewards[:, [0, 3]], names(2))
    assert solve(Palette({"v0": {"quantile": 0.9}}), two, 2).status is Status.OPTIMAL
    greedy = {"v0": {"quantile": 0.9}, "v1": {"quantile": 0.9}}
    assert solve(Palette(greedy), two, 2).status is Status.INFEASIBLE


def test_one_candidate_leaves_no_choice():
    pilot = gaussian_pilot(0)
    assert solve(at_least(pilot.base - 0.1), pilot, 1).status is Status.OPTIMAL
    out = solve(at_least(pilot.base + 0.1), pilot, 1)
    assert out.status is Status.INFEASIBLE
    assert out.certificate is not None


def test_constant_rewards_cannot_be_moved():
    rewards = np.full((3, 4, 1), 0.1)
    pilot = PilotSet(rewards, names(1))
    assert solve(Palette({"v0": "keep"}), pilot, 4).status is Status.OPTIMAL
    assert solve(Palette({"v0": {"quantile": 0.9}}), pilot, 4).status is Status.OPTIMAL
    assert solve(Palette({"v0": {"gain": 2.0}}), pilot, 4).status is Status.OPTIMAL
    assert solve(at_least([0.1 + 1e-6]), pilot, 4).status is Status.INFEASIBLE
    assert solve(Palette({"v0": {"at_most": 0.09}}), pilot, 4).status is Status.INFEASIBLE


def test_large_rewards_keep_their_digits():
    pilot = gaussian_pilot(0)
    far = PilotSet(pilot.rewards * 1e6 + 1e6, pilot.values)
    palette = Palette({"v0": {"quantile": 0.7}, "v1": {"gain": 0.3}})
    near, large = solve(palette, pilot, 8), solve(palette, far, 8)
    assert large.status is Status.OPTIMAL
    np.testing.assert_allclose(large.multipliers * 1e6, near.multipliers, rtol=1e-6)
    offset = PilotSet(pilot.rewards + 1e6, pilot.values)
    # 1e6 leaves 1e-10 of absolute precision in the rewards themselves
    np.testing.assert_allclose(solve(palette, offset, 8).multipliers, near.multipliers, rtol=1e-6)


def test_a_ridge_meets_every_palette_a_little_less():
    pilot = gaussian_pilot(0)
    levels = pilot.base + 3 * pilot.within_std
    assert solve(at_least(levels), pilot, 8).status is Status.INFEASIBLE
    soft = solve(at_least(levels), pilot, 8, ridge=0.1)
    assert soft.status is Status.OPTIMAL
    # Stationarity: slack = ρ λ, standardised.
    slack = (levels - soft.expected) / pilot.scale
    np.testing.assert_allclose(slack, 0.1 * soft.multipliers * pilot.scale, rtol=1e-6)


def test_a_budget_lowers_the_palette_on_its_way():
    pilot = gaussian_pilot(0)
    levels = pilot.base + 0.9 * pilot.within_std
    whole = solve(at_least(levels), pilot, 16)
    assert whole.kl > 0.3
    part = solve(at_least(levels), pilot, 16, max_kl=0.3)
    assert part.status is Status.OPTIMAL
    assert part.limited_by == "max_kl"
    assert 0.3 * (1 - 1e-5) < part.kl <= 0.3
    np.testing.assert_allclose(
        part.expected, pilot.base + part.fraction * (levels - pilot.base), atol=1e-7
    )
    np.testing.assert_allclose(list(part.targets.values()), part.expected, atol=1e-7)
    ample = solve(at_least(levels), pilot, 16, max_kl=whole.kl + 0.01)
    assert ample.fraction == 1.0
    assert ample.limited_by is None
    out = solve(at_least(pilot.base + 3 * pilot.within_std), pilot, 16, max_kl=0.3)
    assert out.status is Status.INFEASIBLE


def test_a_budget_lowers_from_what_is_served_without_solving():
    pilot = gaussian_pilot(0)
    given = {"v0": {"multiplier": 0.5}}
    start = solve(Palette(given), pilot, 16)
    palette = Palette(given | {"v1": {"gain": 1.0}, "v2": {"at_most": float(pilot.base[2] - 0.5)}})
    whole = solve(palette, pilot, 16)
    part = solve(palette, pilot, 16, max_kl=0.5 * (start.kl + whole.kl))
    assert 0.1 < part.fraction < 0.9
    for i in (1, 2):
        asked = whole.targets[f"v{i}"]
        on_the_way = start.expected[i] + part.fraction * (asked - start.expected[i])
        np.testing.assert_allclose(part.targets[f"v{i}"], on_the_way, rtol=1e-9)
        np.testing.assert_allclose(part.expected[i], on_the_way, rtol=1e-6)


def test_a_budget_spent_by_given_multipliers_leaves_nothing():
    pilot = gaussian_pilot(0)
    palette = Palette({"v0": {"multiplier": 5.0}, "v1": {"gain": 0.3}})
    part = solve(palette, pilot, 16, max_kl=0.1)
    assert part.fraction == 0.0
    assert part.multipliers[1] == pytest.approx(0.0, abs=1e-6)


def test_floors_are_kept_and_their_price_reported():
    pilot = gaussian_pilot(0)
    floor = float(pilot.base[1])
    palette = Palette({"v0": {"gain": 0.3}}, floors={"v1": floor})
    solution = solve(palette, pilot, 8)
    assert solution.status is Status.OPTIMAL
    np.testing.assert_allclose(
        solution.expected[0], pilot.base[0] + 0.3 * pilot.within_std[0], rtol=1e-7
    )
    assert solution.expected[1] > floor
    assert solution.kl > solve(Palette({"v0": {"gain": 0.3}}), pilot, 8).kl
    everywhere = solve(Palette({"v0": "keep"}, floors={"v1": 1e9}), pilot, 8)
    assert everywhere.status is Status.INFEASIBLE
    assert everywhere.refused == 1.0
    assert everywhere.certificate is None
    best = solve(Palette({"v0": {"gain": -9}}, floors={"v1": 1e9}, on_floor="best"), pilot, 8)
    assert best.status is Status.OPTIMAL
    assert best.refused == 0.0
    top = pilot.groups(8).rewards[..., 1].max(axis=1).mean()
    np.testing.assert_allclose(best.expected[1], top)


def test_warm_starts_change_the_work_and_not_the_answer():
    pilot = gaussian_pilot(0)
    cold = solve(Palette({"v0": {"gain": 0.5}, "v1": {"gain": 0.5}}), pilot, 8)
    palette = Palette({"v0": {"gain": 0.52}, "v1": {"gain": 0.49}})
    plain = solve(palette, pilot, 8)
    for start in (cold, cold.multipliers, [1e9, -1e9, 0], [np.nan, 0, 0]):
        warm = solve(palette, pilot, 8, warm_start=start)
        np.testing.assert_allclose(warm.multipliers, plain.multipliers, rtol=1e-6)
    # A start too far for the steps allowed is given up for none.
    far = [1e30, 1e30, 0]
    assert solve(palette, pilot, 8, warm_start=far, max_iterations=6).status is Status.OPTIMAL
    assert solve(palette, pilot, 8, warm_start=cold).iterations <= plain.iterations
    with pytest.raises(SolverError, match="warm_start"):
        solve(palette, pilot, 8, warm_start=[1.0])


def test_many_groups_start_from_a_part_of_them():
    rng = np.random.default_rng(0)
    pilot = PilotSet(rng.normal(size=(600, 16, 3)), names(3))
    solution = solve(Palette({"v0": {"gain": 0.5}, "v1": {"gain": 0.4}}), pilot, 4, groups=10_000)
    assert solution.status is Status.OPTIMAL
    assert solution.kkt_residual <= 1e-8


def test_infinitely_many_candidates():
    pool = PilotSet(gaussian_pilot(0).rewards.reshape(-1, 3), names(3), pooled=True)
    solution = solve(Palette({"v0": {"quantile": 0.7}}), pool, math.inf)
    assert solution.status is Status.OPTIMAL
    assert solution.pooled
    weights = np.exp(log_weights(solution.multipliers, pool.rewards))
    np.testing.assert_allclose(solution.expected, weights @ pool.rewards, rtol=1e-9)
    deviation = pool.rewards - solution.expected
    np.testing.assert_allclose(solution.stderr, np.sqrt(weights**2 @ deviation**2), rtol=1e-9)
    assert solution.to_dict()["candidates"] == "inf"


def test_too_few_steps_are_said_to_be_too_few():
    pilot = gaussian_pilot(0)
    levels = random_choice_levels(pilot.groups(8).rewards, np.random.default_rng(0), sharpness=3.0)
    short = solve(at_least(levels - 0.01), pilot, 8, max_iterations=1)
    assert short.status is Status.STEP_LIMIT
    assert short.is_achievable
    assert "max_iterations" in short.status.sentence


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"ridge": -1.0}, "ridge"),
        ({"ridge": math.nan}, "ridge"),
        ({"max_kl": 0.0}, "max_kl"),
        ({"max_kl": math.inf}, "max_kl"),
        ({"max_iterations": 0}, "max_iterations"),
    ],
)
def test_impossible_options_are_refused(options, param):
    with pytest.raises(PaletteError) as caught:
        solve(Palette({}), gaussian_pilot(0), 4, **options)
    assert caught.value.param == param


def test_more_candidates_than_calibrated_are_refused():
    with pytest.raises(PilotError, match="at most 16"):
        solve(Palette({}), gaussian_pilot(0), 32)


@pytest.mark.parametrize("gain", [0.3, 3.0])
def test_the_dictionary_is_json(gain):
    solution = solve(Palette({"v0": {"gain": gain}, "v1": {"between": [-9, 9]}}), gaussian_pilot(0))
    wire = json.loads(json.dumps(solution.to_dict(), allow_nan=False))
    assert wire["status"] == solution.status.value
    assert wire["values"] == ["v0", "v1", "v2"]
    assert wire["targets"]["v1"] == [-9, 9]
    assert set(wire["multipliers"]) == set(wire["expected"]) == set(wire["stderr"])
    assert (wire["certificate"] is None) == (gain < 1)
    assert wire["solve_ms"] > 0


def test_every_status_says_what_to_do():
    assert {status.value for status in Status} == {
        "optimal", "infeasible", "boundary", "step_limit", "not_finite",
    }  # fmt: skip
    for status in Status:
        assert status == status.value
        assert status.sentence.endswith(".")
