import json
import math

import numpy as np
import pytest

from solver import Palette, PaletteError, PilotError, PilotSet, Status, UnknownValueError, solve
from solver.spreads import DISTINCT, spread
from tests.solver.problems import explicit_fraction, gaussian_pilot, names

N = 8


def levels(found, pilot):
    return np.array([(p.solution.expected - pilot.base) / pilot.scale for p in found])


def least_distance(points):
    gaps = np.linalg.norm(points[:, None] - points[None], axis=2)
    return gaps[np.triu_indices(len(points), 1)].min()


def check(found, pilot, candidates=N, max_kl=1.0):
    for profile in found:
        solution = profile.solution
        assert solution.status is Status.OPTIMAL
        assert solution.kl <= max_kl * (1 + 1e-9)
        again = solve(profile.palette, pilot, candidates)
        assert again.status is Status.OPTIMAL
        np.testing.assert_allclose(again.expected, solution.expected, atol=1e-6)
        np.testing.assert_allclose(sum(profile.direction.values()), 1.0)
        for name, wire in profile.palette.targets.items():
            assert (wire == "keep") != (name in profile.direction)
        lower = profile.palette.resolve(pilot).lower
        lower = np.where(np.isfinite(lower), lower, -1e300)
        assert (solution.expected >= lower - 1e-7 * pilot.scale).all()
        gains = [profile.palette.targets[name]["gain"] for name in profile.direction]
        shares = list(profile.direction.values())
        np.testing.assert_allclose(np.array(gains) / sum(gains), shares, rtol=1e-9)
        json.dumps(profile.to_dict(), allow_nan=False)
    called = [profile.name for profile in found]
    assert len(set(called)) == len(called)
    assert all(name == name.lower() and not set(name) & set(" /:") for name in called)
    if len(found) > 1:
        assert least_distance(levels(found, pilot)) >= DISTINCT


@pytest.mark.parametrize("correlation", [-0.2, 0.2, 0.7])
@pytest.mark.parametrize(("n_values", "n_palettes"), [(2, 5), (3, 3), (3, 9), (5, 4), (5, 12)])
def test_profiles_cost_the_budget_and_are_met(n_values, n_palettes, correlation):
    pilot = gaussian_pilot(0, 40, 16, n_values, correlation)
    found = spread(pilot, n_palettes, N)
    assert len(found) == n_palettes
    check(found, pilot)
    for profile in found:
        assert profile.solution.kl >= 1 - 1e-6
    if n_palettes >= n_values:
        assert [p.name for p in found[:n_values]] == list(names(n_values))
        for profile in found[:n_values]:
            assert profile.direction == {profile.name: 1.0}


def at_budget(pilot, share, max_kl=1.0):
    """Standardised levels of the palette in a direction that costs the budget."""

    def towards(z, **options):
        pairs = zip(pilot.values, share, strict=True)
        return solve(Palette({n: {"gain": float(z * x)} for n, x in pairs}), pilot, N, **options)

    low, high = 0.0, 4.0
    for _ in range(20):
        z = 0.5 * (low + high)
        found = towards(z)
        if found.status is Status.OPTIMAL and found.kl > max_kl:
            found = towards(z, max_kl=max_kl)
            return (found.expected - pilot.base) / pilot.scale
        low, high = (z, high) if found.status is Status.OPTIMAL else (low, z)
    raise AssertionError("the limit comes before the budget")


@pytest.mark.parametrize("n_palettes", [4, 6, 9])
def test_profiles_are_further_apart_than_random_ones(n_palettes):
    pilot = gaussian_pilot(1, 40, 16, 4, -0.1)
    ours = least_distance(levels(spread(pilot, n_palettes, N), pilot))
    rng = np.random.default_rng(0)
    pool = [at_budget(pilot, share) for share in rng.dirichlet(np.ones(4), size=60)]
    picks = [rng.choice(60, n_palettes, replace=False) for _ in range(200)]
    others = [least_distance(np.array(pool)[pick]) for pick in picks]
    assert ours > 1.5 * np.median(others)
    assert ours > max(others)


def test_each_direction_goes_as_far_as_the_budget():
    pilot = gaussian_pilot(2, 40, 16, 3, -0.2)
    for profile in spread(pilot, 10, N):
        share = np.array([profile.direction.get(name, 0.0) for name in pilot.values])
        np.testing.assert_allclose(levels([profile], pilot)[0], at_budget(pilot, share), atol=1e-5)


def test_where_the_limit_comes_first_profiles_stay_a_little_inside():
    pilot = gaussian_pilot(0, 20, 16, 3, -0.2)
    rewards, nowhere = pilot.groups(N).rewards, np.full(3, np.inf)
    for max_kl in (None, 2.0, 50.0):
        found = spread(pilot, 8, N, max_kl=max_kl)
        check(found, pilot, max_kl=max_kl or math.inf)
        assert len(found) == 8
        for profile in found:
            lower = profile.palette.resolve(pilot).lower
            room = explicit_fraction(rewards, pilot.base, lower, nowhere, pilot.scale, 2.0)
            assert 1.005 < room < 1.03
            assert np.abs(profile.solution.multipliers * pilot.scale).max() < 60


def test_the_most_distant_values_come_where_there_is_no_room_for_all():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 16, 4))
    x[..., 1] = x[..., 0] + 0.3 * x[..., 1]  # nearly the same value twice
    pilot = PilotSet(x, ("same", "again", "other", "third"))
    picked = [profile.name for profile in spread(pilot, 3, N)]
    assert set(picked) > {"other", "third"}
    assert picked == [name for name in pilot.values if name in picked]


def test_farthest_first_is_greedy():
    """Each mixture is the farthest of what is left from the base model and those before it."""
    pilot = gaussian_pilot(3, 40, 16, 3, 0.1)
    every = spread(pilot, 15, N)
    few = spread(pilot, 6, N)
    # the same lattice serves both, so the order of the first ones must agree
    assert len(every) == 15
    gaps = []
    points = levels(every, pilot)
    for i in range(3, 15):
        before = np.vstack([np.zeros(3), points[:i]])
        gaps.append(np.linalg.norm(points[i] - before, axis=1).min())
    assert (np.diff(gaps) <= 1e-12).all()
    assert len(few) == 6


def test_values_that_cannot_rise_alone_have_no_profile():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 20, 16))
    constant = PilotSet(np.stack([x, 0 * x + 0.1, y], axis=-1), names(3))
    check(spread(constant, 3, N), constant)
    assert [p.name for p in spread(constant, 3, N)][:2] == ["v0", "v2"]
    assert all("v1" not in p.direction for p in spread(constant, 6, N))
    repeated = PilotSet(np.stack([x, 2 * x, y], axis=-1), names(3))
    found = spread(repeated, 3, N)
    check(found, repeated)
    singles = [p.name for p in found if len(p.direction) == 1]
    assert len(singles) == 2
    assert "v2" in singles
    opposed = PilotSet(np.stack([x, 1 - 2 * x], axis=-1), names(2))
    assert spread(opposed, 4, N) == ()
    assert spread(PilotSet(0 * x[..., None], names(1)), 3, N) == ()
    assert spread(gaussian_pilot(0), 4, 1) == ()
    alone = spread(gaussian_pilot(0, n_values=1), 4, N)
    assert [p.name for p in alone] == ["v0"]


def test_only_the_values_named_are_raised_or_kept():
    pilot = gaussian_pilot(0, n_values=4)
    found = spread(pilot, 4, N, values=["v3", "v1"])
    assert [p.name for p in found[:2]] == ["v1", "v3"]
    assert all(set(p.palette.targets) == {"v1", "v3"} for p in found)
    check(found, pilot)


@pytest.mark.parametrize("candidates", [N, math.inf])
@pytest.mark.parametrize("form", ["one prompt", "pool"])
def test_few_prompts_and_pools(form, candidates):
    pilot = gaussian_pilot(2, n_prompts=1 if form == "one prompt" else 40)
    if form == "pool":
        pilot = PilotSet(pilot.rewards.reshape(-1, 3), names(3), pooled=True)
    found = spread(pilot, 5, candidates)
    assert len(found) == 5
    check(found, pilot, candidates)


def test_profiles_mean_the_same_on_a_new_calibration():
    pilot = gaussian_pilot(0, 200, 16, 3)
    fresh = gaussian_pilot(7, 200, 16, 3)
    for profile in spread(pilot, 5, N, max_kl=0.5):
        assert not any(
            key in wire
            for wire in profile.palette.targets.values()
            if isinstance(wire, dict)
            for key in ("at_least", "at_most", "between")
        )
        np.testing.assert_allclose(solve(profile.palette, fresh, N).kl, 0.5, rtol=0.2)


def test_names_are_readable_and_unique():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(20, 16, 3))
    odd = PilotSet(rewards, ("Very Helpful/kind!", "very helpful kind", "幽默"))
    found = spread(odd, 12, N)
    check(found, odd)
    assert [p.name for p in found[:3]] == ["very-helpful-kind", "very-helpful-kind-1", "幽默"]
    plain = PilotSet(rewards, ("helpful", "humorous", "short"))
    found = spread(plain, 15, N)
    by_share = {tuple(p.direction.values()): p for p in found}
    assert {"helpful", "humorous", "short"} < {p.name for p in found}
    for p in found:
        shares = sorted(p.direction.values())
        if len(shares) == 2 and shares[0] < 0.5:
            first = max(p.direction, key=p.direction.get)
            assert p.name.startswith(("mostly-" + first, first + "-"))
        if len(shares) > 1 and shares[0] == shares[-1]:
            assert p.name == "+".join(p.direction)
    assert len(by_share) > 1


def test_the_same_call_gives_the_same_profiles():
    pilot = gaussian_pilot(0)
    one, two = (spread(pilot, 6, 5, groups=50, seed=2) for _ in range(2))
    assert [(p.name, p.palette) for p in one] == [(p.name, p.palette) for p in two]
    other = spread(pilot, 6, 5, groups=50, seed=3)
    assert [p.palette for p in one] != [p.palette for p in other]


def test_sixteen_values():
    pilot = gaussian_pilot(0, 32, 16, 16, 0.1)
    found = spread(pilot, 18, 16)
    assert len(found) == 18
    check(found, pilot, 16)
    assert [p.name for p in found[:16]] == list(names(16))


def test_mistakes_are_named():
    pilot = gaussian_pilot(0)
    for n_palettes in (0, 1.5, True):
        with pytest.raises(PaletteError) as caught:
            spread(pilot, n_palettes, N)
        assert caught.value.param == "n_palettes"
    for values in ([], "v0"):
        with pytest.raises(PaletteError) as caught:
            spread(pilot, 2, N, values=values)
        assert caught.value.param == "values"
    with pytest.raises(PaletteError) as caught:
        spread(pilot, 2, N, max_kl=-1.0)
    assert caught.value.param == "max_kl"
    with pytest.raises(UnknownValueError, match="Did you mean"):
        spread(pilot, 2, N, values=["v9"])
    with pytest.raises(PilotError):
        spread(pilot, 2, 1000)
