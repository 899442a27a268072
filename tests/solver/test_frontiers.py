import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, sparse

from solver import Palette, PaletteError, PilotSet, Status, UnknownValueError, solve
from solver.frontiers import frontier
from tests.solver.problems import at_least, gaussian_pilot, names

N = 8
PAIR = ("v0", "v1")


def explicit_most(rewards, column, bounds, allowed=None):
    """Most of one value by a plain LP, and the duals of the bounds (column, sign, level).

    One variable for every candidate; groups without an allowed candidate must not be given.
    """
    n_groups, n, m = rewards.shape
    flat = rewards.reshape(-1, m) / n_groups
    ceiling = np.ones(len(flat)) if allowed is None else allowed.reshape(-1).astype(float)
    result = optimize.linprog(
        -flat[:, column],
        A_ub=np.array([-sign * flat[:, c] for c, sign, _ in bounds]) if bounds else None,
        b_ub=[-sign * level for _, sign, level in bounds] if bounds else None,
        A_eq=sparse.kron(sparse.eye(n_groups), np.ones((1, n))),
        b_eq=np.ones(n_groups),
        bounds=[(0.0, top) for top in ceiling],
        method="highs",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    assert result.success, result.message
    return -result.fun, -result.ineqlin.marginals if bounds else np.zeros(0)


def served(rewards, multipliers):
    """Expected levels and KL of the softmax choice, written the plain way."""
    score = rewards @ multipliers
    weights = np.exp(score - score.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    logs = np.log(np.maximum(weights, 1e-300) * rewards.shape[1])
    return np.einsum("gn,gnm->m", weights, rewards) / len(rewards), float(
        (weights * logs).sum(axis=1).mean()
    )


def curve_of(found):
    return np.array([[point.limit[name] for name in found.values] for point in found.points])


def check_served(found, pilot):
    """Every palette offered is optimal and met, with nothing lost of the curve but a little."""
    for point in found.points:
        solution = point.solution
        assert solution.status is Status.OPTIMAL
        assert solution.kkt_residual <= 1e-8
        again = solve(point.palette, pilot, found.candidates)
        assert again.status is Status.OPTIMAL
        np.testing.assert_allclose(again.expected, solution.expected, atol=1e-6)
        rule = point.palette.resolve(pilot)
        slack = 1e-7 * pilot.scale
        assert (
            solution.expected >= np.where(np.isfinite(rule.lower), rule.lower, -1e300) - slack
        ).all()
        assert (
            solution.expected <= np.where(np.isfinite(rule.upper), rule.upper, 1e300) + slack
        ).all()
        for name in found.values:
            assert name in rule.values
            assert np.isfinite([rule.lower, rule.upper])[:, rule.values.index(name)].any()


def check_shape(found, scale=1.0, atol=1e-6):
    """Monotone and concave, with exchange rates between the neighbouring slopes."""
    curve = curve_of(found) / scale
    a, b = curve.T
    assert (np.diff(a) > 0).all()
    assert (np.diff(b) < 0).all()
    np.testing.assert_allclose(np.diff(a, 2), 0, atol=atol)
    assert (np.diff(b, 2) <= atol).all()
    fall = -np.diff(b) / np.diff(a)
    room = 2 * atol / np.diff(a).min()
    rates = np.array([p.exchange for p in found.points]) * np.divide(*np.broadcast_to(scale, 2))
    assert (rates[:-1] <= fall + room).all()
    assert (rates[1:] >= fall - room).all()


HELD = {
    "nothing": Palette({}),
    "keep": Palette({"v2": "keep"}),
    "gain": Palette({"v2": {"gain": 0.6}, "v0": {"gain": 9.0}, "v1": {"multiplier": 3.0}}),
    "at_most": Palette({"v2": {"at_most": 1.0}, "v3": {"between": [1.9, 2.2]}}),
    "multiplier": Palette({"v2": {"multiplier": 0.4}, "v3": "keep"}),
    "floor": Palette({"v3": "keep"}, floors={"v0": -2.0, "v2": -3.0}),
    "refuse": Palette({"v3": {"at_most": 4.0}}, floors={"v2": 3.0}),
    "best": Palette({"v3": {"gain": -0.5}}, floors={"v2": 3.0}, on_floor="best"),
}


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


@pytest.mark.parametrize("max_kl", [0.02, 0.4, 1.5])
@pytest.mark.parametrize("seed", range(3))
def test_a_budget_curve_is_that_of_a_plain_search(max_kl, seed):
    """Every optimum under a budget is a softmax with multipliers in some direction φ."""
    pilot = gaussian_pilot(seed, n_prompts=6, n_values=2, correlation=-0.3 * seed)
    rewards = pilot.groups(N).rewards
    found = frontier(Palette({}), pilot, PAIR, N, n_points=7, max_kl=max_kl)

    def at(angle):
        way = np.array([math.cos(angle), math.sin(angle)])
        size = optimize.brentq(lambda s: served(rewards, s * way)[1] - max_kl, 0, 500, xtol=1e-13)
        return served(rewards, size * way)[0]

    curve = curve_of(found)
    np.testing.assert_allclose(curve[0], at(math.pi / 2), atol=1e-6)
    np.testing.assert_allclose(curve[-1], at(0.0), atol=1e-6)
    assert found.points[0].exchange < 1e-6
    assert found.points[-1].exchange > 1e6
    for (a, b), point in list(zip(curve, found.points, strict=True))[1:-1]:
        angle = optimize.brentq(lambda x, a=a: at(x)[0] - a, 0, math.pi / 2, xtol=1e-12)
        np.testing.assert_allclose(b, at(angle)[1], atol=1e-6)
        np.testing.assert_allclose(point.exchange, 1 / math.tan(angle), rtol=1e-4)
        prices = point.solution.multipliers
        np.testing.assert_allclose(point.exchange, prices[0] / prices[1], rtol=1e-5)
    for point in found.points:
        assert (1 - 1e-6) * max_kl <= point.solution.kl <= (1 + 1e-9) * max_kl
        limit = [point.limit[name] for name in PAIR]
        np.testing.assert_allclose(point.solution.expected, limit, atol=1e-7)
    check_served(found, pilot)
    check_shape(found)


@pytest.mark.parametrize("seed", range(2))
def test_a_budget_curve_holds_the_others(seed):
    pilot = gaussian_pilot(seed, n_prompts=6, n_values=3, correlation=-0.3)
    rewards, max_kl = pilot.groups(N).rewards, 0.5
    palette = Palette({"v2": {"gain": 0.3}})
    floor = palette.resolve(pilot).lower[2]
    found = frontier(palette, pilot, PAIR, N, n_points=5, max_kl=max_kl)
    for point in found.points[1:-1]:
        a = point.limit["v0"]
        best = optimize.minimize(
            lambda x: -served(rewards, x)[0][1],
            [0.3, 0.3, 0.3],
            method="SLSQP",
            bounds=[(0, 50)] * 3,
            constraints=[
                {"type": "ineq", "fun": lambda x: max_kl - served(rewards, x)[1]},
                {"type": "ineq", "fun": lambda x, a=a: served(rewards, x)[0][0] - a},
                {"type": "ineq", "fun": lambda x: served(rewards, x)[0][2] - floor},
            ],
            options={"ftol": 1e-12, "maxiter": 300},
        )
        assert best.success
        np.testing.assert_allclose(point.limit["v1"], -best.fun, atol=1e-5)
        assert point.solution.expected[2] >= floor - 1e-8
    check_served(found, pilot)
    check_shape(found)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
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


def test_where_the_limit_comes_before_the_budget():
    """Of two grades, best of eight costs less than the budget; the rest buys the other value."""
    rng = np.random.default_rng(0)
    pilot = PilotSet((rng.normal(size=(20, 16, 2)) > 0.3).astype(float), PAIR)
    rewards = pilot.groups(N).rewards
    for max_kl in (1.25, 1.4, 1.5, 1.7):
        found = frontier(Palette({}), pilot, PAIR, N, n_points=9, max_kl=max_kl)
        kinds = []
        for (a, b), point in zip(curve_of(found), found.points, strict=True):
            exact, _ = explicit_most(rewards, 1, [(0, 1, a)])
            is_limit = abs(b - exact) < 1e-7
            kinds.append(is_limit)
            assert b <= exact + 1e-7
            if not is_limit:
                assert point.solution.kl >= (1 - 1e-6) * max_kl
        check_served(found, pilot)
        check_shape(found)
        assert any(kinds) == (max_kl > 1.26)
    loose = frontier(Palette({}), pilot, PAIR, N, max_kl=2.0)
    ends = frontier(Palette({}), pilot, PAIR, N)
    span = np.abs(curve_of(ends)[0] - curve_of(ends)[-1])
    assert (np.abs(curve_of(loose) - curve_of(ends))[[0, -1]] < 0.05 * span).all()


def test_a_budget_that_ends_at_the_limit_is_served_inside():
    """The first end's budget lasts to 1e-6 of the limit, where a fresh solve sees the boundary."""
    a = [[0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0]]
    b = [[-2.4, 0.8, -0.1, -0.6], [0.6, -2.0, 0.7, -0.6]]
    pilot = PilotSet(np.stack([a, b], axis=-1), PAIR)
    levels, max_kl = served(pilot.groups(4).rewards, np.array([0.0, 110.0]))
    found = frontier(Palette({}), pilot, PAIR, 4, n_points=6, max_kl=max_kl)
    np.testing.assert_allclose(list(found.points[0].limit.values()), levels, atol=1e-6)
    assert solve(at_least(levels), pilot, 4).status is Status.BOUNDARY
    check_served(found, pilot)
    check_shape(found, pilot.scale)


@pytest.mark.parametrize("max_kl", [0.8, 1.5])
def test_given_multipliers_are_part_of_what_the_budget_pays(max_kl):
    pilot = gaussian_pilot(0)
    found = frontier(Palette({"v2": {"multiplier": 0.4}}), pilot, PAIR, N, max_kl=max_kl)
    assert len(found.points) == 11
    check_served(found, pilot)
    for point in found.points:
        np.testing.assert_allclose(point.solution.kl, max_kl, rtol=1e-6)
        np.testing.assert_allclose(point.solution.multipliers[2], 0.4)


def test_a_budget_beyond_every_choice_is_none():
    pilot = gaussian_pilot(0, n_prompts=10)
    free = frontier(Palette({}), pilot, PAIR, N, n_points=4)
    bound = frontier(Palette({}), pilot, PAIR, N, n_points=4, max_kl=math.log(N))
    assert (curve_of(free) == curve_of(bound)).all()
    assert bound.max_kl == math.log(N)


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
