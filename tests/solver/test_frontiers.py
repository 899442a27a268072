"""Curves of two values against each other: the limit, its shape, and cases that are known."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solver import Palette, PaletteError, PilotSet, Status, UnknownValueError
from solver.frontiers import frontier
from tests.solver.curves import HELD, PAIR, N, check_served, check_shape, curve_of, explicit_most
from tests.solver.problems import gaussian_pilot, names


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("seed", range(2))
def test_the_limit_is_that_of_an_explicit_programme(held, seed):
    pilot = gaussian_pilot(seed, n_prompts=8, n_values=4)
    palette = HELD[held]
    found = frontier(palette, pilot, PAIR, N, n_points=6)
    rewards, allowed = pilot.groups(N).rewards, None
    if palette.floors:
        floors = np.array([palette.floors.get(name, -np.inf) for name in pilot.values])
        allowed = (rewards >= floors).all(axis=2)
        if palette.on_floor == "best":
            worst = (np.minimum(rewards - floors, 0) / pilot.scale).sum(axis=2)
            allowed |= ~allowed.any(axis=1, keepdims=True) & (worst == worst.max(axis=1)[:, None])
        else:
            rewards, allowed = rewards[allowed.any(axis=1)], allowed[allowed.any(axis=1)]
    rule = Palette({n: t for n, t in palette.targets.items() if n not in PAIR}).resolve(pilot)
    rest = [(c, 1, x) for c, x in enumerate(rule.lower) if np.isfinite(x)]
    rest += [(c, -1, x) for c, x in enumerate(rule.upper) if np.isfinite(x)]
    curve = curve_of(found)
    for i, end in ((1, curve[0]), (0, curve[-1])):
        top, _ = explicit_most(rewards, i, rest, allowed)
        second, _ = explicit_most(rewards, 1 - i, [*rest, (i, 1, top - 1e-9)], allowed)
        np.testing.assert_allclose(end[i], top, atol=1e-7)
        np.testing.assert_allclose(end[1 - i], second, atol=1e-6)
    np.testing.assert_allclose(curve[:, 0], np.linspace(curve[0, 0], curve[-1, 0], 6), atol=1e-9)
    for (a, b), point in list(zip(curve, found.points, strict=True))[1:-1]:
        exact, duals = explicit_most(rewards, 1, [*rest, (0, 1, a)], allowed)
        np.testing.assert_allclose(b, exact, atol=1e-7)
        np.testing.assert_allclose(point.exchange, duals[-1], rtol=1e-5)
        ahead, _ = explicit_most(rewards, 1, [*rest, (0, 1, a + 1e-5)], allowed)
        np.testing.assert_allclose(point.exchange, (exact - ahead) / 1e-5, rtol=1e-3)
    assert (found.others.refused > 0) == (held == "refuse")
    assert (found.points[0].exchange, found.points[-1].exchange) == (0.0, math.inf)
    assert len(found.points) == 6
    check_served(found, pilot)
    check_shape(found)
    for point in found.points:  # a hundredth of the way back to what the others alone serve
        home = found.others.expected[:2]
        asked = np.array([point.palette.parsed[name].numbers[0] for name in PAIR])
        limit = np.array([point.limit[name] for name in PAIR])
        np.testing.assert_allclose(asked, limit - 0.01 * (limit - home), atol=1e-9)
        assert point.palette.floors == palette.floors


def test_a_curve_with_a_known_corner():
    answers = np.array([[0.0, 1.0], [1.0, 0.0], [0.8, 0.8], [0.1, 0.1]])
    pilot = PilotSet(answers[None], PAIR)
    found = frontier(Palette({}), pilot, PAIR, 4, n_points=11)
    a = np.linspace(0, 1, 11)
    b = np.where(a <= 0.8, 1 - 0.25 * a, 4 * (1 - a))
    np.testing.assert_allclose(curve_of(found), np.column_stack([a, b]), atol=1e-9)
    rates = [point.exchange for point in found.points]
    np.testing.assert_allclose(rates[1:8], 0.25)
    np.testing.assert_allclose(rates[9], 4.0)
    assert 0.25 - 1e-9 <= rates[8] <= 4.0 + 1e-9  # any slope in between supports the corner
    check_served(found, pilot)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    n_values=st.integers(2, 4),
    correlation=st.floats(-0.3, 0.8),
    max_kl=st.one_of(st.none(), st.floats(0.01, 3.0)),
    is_discrete=st.booleans(),
)
def test_curves_are_monotone_and_concave(seed, n_values, correlation, max_kl, is_discrete):
    pilot = gaussian_pilot(seed, 10, 16, n_values, correlation)
    if is_discrete:
        pilot = PilotSet(np.round(pilot.rewards), pilot.values)
    held = Palette({name: "keep" for name in pilot.values[2:]})
    found = frontier(held, pilot, PAIR, N, n_points=6, max_kl=max_kl)
    assert found.points
    check_served(found, pilot)
    if len(found.points) > 1:
        check_shape(found, pilot.scale[:2])
    for point in found.points:
        assert point.solution.kl <= (math.inf if max_kl is None else (1 + 1e-9) * max_kl)


@pytest.mark.parametrize("max_kl", [None, 0.3])
def test_less_is_more_of_the_opposite(max_kl):
    pilot = gaussian_pilot(3, n_prompts=10)
    flipped = PilotSet(pilot.rewards * [1, -1, 1], pilot.values)
    held = Palette({"v2": "keep"})
    senses = {"v1": "less", "v0": "more"}
    less = frontier(held, pilot, PAIR, N, n_points=5, max_kl=max_kl, senses=senses)
    more = frontier(held, flipped, PAIR, N, n_points=5, max_kl=max_kl)
    np.testing.assert_allclose(curve_of(less), curve_of(more) * [1, -1], atol=1e-6)
    rates = [[p.exchange for p in found.points[1:-1]] for found in (less, more)]
    np.testing.assert_allclose(rates[0], rates[1], rtol=1e-4)
    assert "at_most" in less.points[1].palette.targets["v1"]
    assert less.points[1].solution.multipliers[1] < 0
    check_served(less, pilot)


@pytest.mark.parametrize("max_kl", [None, 0.3])
def test_units_do_not_matter(max_kl):
    pilot = gaussian_pilot(1, n_prompts=10)
    units, shift = np.array([100.0, 1e-3, 7.0]), np.array([3.0, -50.0, 1e4])
    other = PilotSet(pilot.rewards * units + shift, pilot.values)
    held = Palette({"v2": "keep"})
    one = frontier(held, pilot, PAIR, N, n_points=5, max_kl=max_kl)
    two = frontier(held, other, PAIR, N, n_points=5, max_kl=max_kl)
    np.testing.assert_allclose((curve_of(two) - shift[:2]) / units[:2], curve_of(one), atol=1e-6)
    for before, after in list(zip(one.points, two.points, strict=True))[1:-1]:
        np.testing.assert_allclose(after.exchange, before.exchange * 1e-5, rtol=1e-3)


def pair_pilot(a, b):
    return PilotSet(np.stack([a, b], axis=-1), PAIR)


NOISE = np.random.default_rng(5).normal(size=(2, 20, 16))


@pytest.mark.parametrize("max_kl", [None, 0.3, 1.5, 9.0])
@pytest.mark.parametrize(
    "pilot",
    [
        pair_pilot(NOISE[0], NOISE[0]),
        pair_pilot(NOISE[0], 3 * NOISE[0] + 1),
        pair_pilot(NOISE[0], 0 * NOISE[0] + 0.1),
        pair_pilot(0 * NOISE[0] + 0.1, NOISE[0]),
        pair_pilot(0 * NOISE[0], 0 * NOISE[0] + 0.1),
    ],
    ids=["identical", "collinear", "b_constant", "a_constant", "both_constant"],
)
def test_values_that_are_not_at_odds_make_one_point(pilot, max_kl):
    found = frontier(Palette({}), pilot, PAIR, N, max_kl=max_kl)
    (point,) = found.points
    assert math.isnan(point.exchange)
    check_served(found, pilot)
    rewards = pilot.groups(N).rewards
    if max_kl in (None, 9.0):
        np.testing.assert_allclose(curve_of(found)[0], rewards.max(axis=1).mean(axis=0), atol=1e-7)
    elif pilot.within_std.any():
        np.testing.assert_allclose(point.solution.kl, max_kl, rtol=1e-6)
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_loss_too_small_to_matter_does_not_make_a_curve():
    half = np.arange(20)[:, None] % 2
    for small in (1e-8, -1e-8):
        a, b = NOISE[0] * half, NOISE[1] * (1 - half) - small * NOISE[0] * half
        for pilot in (pair_pilot(a, b), pair_pilot(b, a)):
            (point,) = frontier(Palette({}), pilot, PAIR, N).points
            best = pilot.groups(N).rewards.max(axis=1).mean(axis=0)
            np.testing.assert_allclose(list(point.limit.values()), best, atol=1e-6)


def test_opposed_values_make_a_line():
    pilot = pair_pilot(NOISE[0], 1 - 2 * NOISE[0])
    rewards = pilot.groups(N).rewards
    for max_kl in (None, 0.3):
        found = frontier(Palette({}), pilot, PAIR, N, n_points=5, max_kl=max_kl)
        a, b = curve_of(found).T
        np.testing.assert_allclose(b, 1 - 2 * a, atol=1e-6)
        np.testing.assert_allclose([p.exchange for p in found.points[1:-1]], 2.0, rtol=1e-6)
        check_served(found, pilot)
        if max_kl is None:
            most = rewards[..., 0].max(axis=1).mean(), rewards[..., 0].min(axis=1).mean()
            np.testing.assert_allclose([a[-1], a[0]], most, atol=1e-7)
        else:  # only the ends cost the budget: in between the levels themselves are the limit
            np.testing.assert_allclose(
                [found.points[0].solution.kl, found.points[-1].solution.kl], 0.3, rtol=1e-6
            )


def test_values_of_different_prompts_compete_only_for_the_budget():
    half = np.arange(20)[:, None] % 2
    pilot = pair_pilot(NOISE[0] * half, NOISE[1] * (1 - half))
    free = frontier(Palette({}), pilot, PAIR, N)
    best = pilot.groups(N).rewards.max(axis=1).mean(axis=0)
    np.testing.assert_allclose(curve_of(free), best[None], atol=1e-7)
    bound = frontier(Palette({}), pilot, PAIR, N, n_points=5, max_kl=0.3)
    assert len(bound.points) == 5
    check_shape(bound)
    check_served(bound, pilot)


def test_one_candidate_is_the_base_model():
    pilot = gaussian_pilot(0)
    for max_kl in (None, 0.5):
        (point,) = frontier(Palette({"v2": "keep"}), pilot, PAIR, 1, max_kl=max_kl).points
        np.testing.assert_allclose(list(point.limit.values()), pilot.base[:2], rtol=1e-9)
        assert point.solution.status is Status.OPTIMAL
        assert point.solution.kl == 0


@pytest.mark.parametrize("max_kl", [None, 0.5])
@pytest.mark.parametrize("candidates", [N, math.inf])
@pytest.mark.parametrize("form", ["one prompt", "pool"])
def test_few_prompts_and_pools(form, candidates, max_kl):
    pilot = gaussian_pilot(2, n_prompts=1 if form == "one prompt" else 40)
    if form == "pool":
        pilot = PilotSet(pilot.rewards.reshape(-1, 3), names(3), pooled=True)
    found = frontier(Palette({"v2": "keep"}), pilot, PAIR, candidates, n_points=4, max_kl=max_kl)
    assert len(found.points) == 4
    check_shape(found)
    check_served(found, pilot)
    if max_kl is None and candidates == math.inf:
        whole = pilot.rewards if form == "one prompt" else pilot.rewards[None]
        for a, b in curve_of(found)[1:-1]:
            exact, _ = explicit_most(whole, 1, [(0, 1, a), (2, 1, pilot.base[2])])
            np.testing.assert_allclose(b, exact, atol=1e-7)
    wire = found.to_dict()
    assert wire["candidates"] == ("inf" if candidates == math.inf else N)
    json.dumps(wire, allow_nan=False)


def test_what_the_others_make_impossible_has_no_points():
    pilot = gaussian_pilot(0)
    found = frontier(Palette({"v2": {"gain": 5.0}}), pilot, PAIR, N)
    assert found.points == ()
    assert found.others.status is Status.INFEASIBLE
    assert found.others.certificate.direction.keys() == {"v2"}
    json.dumps(found.to_dict(), allow_nan=False)
    top = float(pilot.groups(N).rewards[..., 2].max(axis=1).mean())
    edge = frontier(Palette({"v2": {"at_least": top}}), pilot, PAIR, N)
    assert (edge.points, edge.others.status) == ((), Status.BOUNDARY)
    dear = frontier(Palette({"v2": {"gain": 0.9}}), pilot, PAIR, N, max_kl=0.1)
    assert (dear.points, dear.others.limited_by) == ((), "max_kl")
    nobody = frontier(Palette({}, floors={"v2": 1e9}), pilot, PAIR, N)
    assert (nobody.points, nobody.others.refused) == ((), 1.0)


def test_the_same_call_gives_the_same_curve():
    pilot = gaussian_pilot(0)
    options = {"n_points": 4, "max_kl": 0.5, "groups": 50, "seed": 3}
    first = frontier(Palette({"v2": "keep"}), pilot, PAIR, 5, **options)
    again = frontier(Palette({"v2": "keep"}), pilot, PAIR, 5, **options)
    assert (curve_of(first) == curve_of(again)).all()
    other = frontier(Palette({"v2": "keep"}), pilot, PAIR, 5, **(options | {"seed": 4}))
    assert (curve_of(first) != curve_of(other)).any()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"values": ("v0", "v0")}, "values"),
        ({"values": ("v0",)}, "values"),
        ({"values": "v0"}, "values"),
        ({"n_points": 1}, "n_points"),
        ({"n_points": 2.5}, "n_points"),
        ({"max_kl": 0.0}, "max_kl"),
        ({"max_kl": math.nan}, "max_kl"),
        ({"senses": {"v0": "most"}}, "senses.v0"),
    ],
)
def test_mistakes_are_named(change, param):
    arguments = {"values": PAIR, "n_points": 3} | change
    with pytest.raises(PaletteError) as caught:
        frontier(Palette({}), gaussian_pilot(0), candidates=N, **arguments)
    assert caught.value.param == param


def test_unknown_names_are_named():
    with pytest.raises(UnknownValueError, match="Did you mean"):
        frontier(Palette({}), gaussian_pilot(0), ("v0", "v9"), N)
    with pytest.raises(UnknownValueError):
        frontier(Palette({}), gaussian_pilot(0), PAIR, N, senses={"v2": "less"})
    with pytest.raises(UnknownValueError):
        frontier(Palette({"v9": "keep"}), gaussian_pilot(0), PAIR, N)
