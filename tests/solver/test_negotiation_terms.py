"""Terms of a negotiation: whole wishes, guards, floors, budgets, and mistakes in them."""

import math

import numpy as np
import pytest

from solver import Palette, PaletteError, PilotSet, Status, UnknownValueError, solve
from solver.negotiation import Party, negotiate
from tests.solver.parties import Explicit, N, ends, gains, numbers
from tests.solver.problems import gaussian_pilot


def test_whole_wishes_are_served_as_they_are():
    pilot = gaussian_pilot(0)
    one = Palette({"v0": {"quantile": 0.6}, "v2": "keep"})
    other = Palette({"v0": {"gain": 0.1}, "v1": {"at_most": float(pilot.base[1]) - 0.1}})
    found = negotiate([Party("one", one), Party("other", other)], pilot, 16)
    assert dict(found.satisfaction) == {"one": 1.0, "other": 1.0}
    lower = one.resolve(pilot).lower
    assert dict(found.palette.targets) == {
        "v0": {"at_least": lower[0]},
        "v1": {"at_most": float(pilot.base[1]) - 0.1},
        "v2": {"at_least": lower[2]},
    }
    assert dict(found.levels) == dict(found.palette.targets)
    np.testing.assert_allclose(numbers(found.served), 1.0, atol=1e-7)
    assert found.limits is None


@pytest.mark.parametrize("way", [1, -1])
def test_a_guard_stops_a_wish_and_the_report_says_so(way):
    pilot = gaussian_pilot(0)
    base, unit = float(pilot.base[0]), way * float(pilot.scale[0])
    more, less = ("at_least", "at_most")[::way]
    wish = Party("ann", Palette({"v0": {more: base + 0.5 * unit}}))
    # and one on another value, which is no matter of ann's
    aside = {"v1": {less: float(pilot.base[1]) + 0.1 * way}}
    guard = Party("bob", Palette({"v0": {less: base + 0.2 * unit}} | aside))
    found = negotiate([wish, guard], pilot, 16)
    np.testing.assert_allclose(found.satisfaction["ann"], 0.4, atol=1e-8)
    assert found.satisfaction["bob"] == 1.0
    assert found.worst[0] == "ann"
    assert found.alone["ann"] == 1.0
    words = {"at_least": "at least", "at_most": "at most"}
    sentence = (
        f"ann wants v0 {words[more]} {base + 0.5 * unit:.6g}, but bob holds it {words[less]} "
        f"{base + 0.2 * unit:.6g}, which the base model meets"
    )
    assert found.stopped == (sentence,)
    assert found.limits == sentence
    # finite multipliers reach it, so nothing is given away
    np.testing.assert_allclose(found.solution.expected[0], base + 0.2 * unit, atol=1e-7)


def test_a_guard_beyond_the_wish_stops_nothing():
    pilot = gaussian_pilot(0)
    base, unit = float(pilot.base[0]), float(pilot.scale[0])
    wish = Party("ann", Palette({"v0": {"between": [base + 4 * unit, base + 5 * unit]}}))
    guard = Party("bob", Palette({"v0": {"at_most": base + 4.5 * unit}}))
    found = negotiate([wish, guard], pilot, 16)
    assert 0.1 < found.satisfaction["ann"] < 0.9
    assert found.stopped == ()
    assert "no choice among 16 candidates gives more than" in found.limits


def test_guards_that_differ_by_rounding_do_not_collide():
    pilot = gaussian_pilot(0)
    base, unit = float(pilot.base[0]), float(pilot.scale[0])
    parties = [
        Party("a", Palette({"v0": {"at_least": base + 5e-10 * unit}})),
        Party("b", Palette({"v0": {"at_most": base}})),
        Party("c", Palette({"v1": {"gain": 0.3}})),
    ]
    found = negotiate(parties, pilot, 16)
    assert set(found.satisfaction.values()) == {1.0}
    assert found.solution.status is Status.OPTIMAL


def test_groups_and_seed_are_those_of_the_solve():
    pilot = gaussian_pilot(0)
    parties = [Party("a", gains(pilot, 1.5, [0, 1])), Party("b", gains(pilot, 1.5, [2]))]
    found = negotiate(parties, pilot, 8, groups=30, seed=7)
    again = solve(found.palette, pilot, 8, groups=30, seed=7)
    np.testing.assert_array_equal(found.solution.multipliers, again.multipliers)
    rewards = pilot.groups(8, groups=30, seed=7).rewards
    rewards += pilot.base - rewards.mean(axis=(0, 1))  # base levels are the pilot set's
    truth = Explicit(rewards, [ends(party.palette, pilot) for party in parties], [1.0, 1.0])
    np.testing.assert_allclose(numbers(found.satisfaction), truth.leximin(), atol=1e-6)


def test_floors_of_all_apply_and_set_the_base():
    pilot = gaussian_pilot(0, n_prompts=10, n_candidates=N)
    low, high = (float(pilot.base[0] + way * pilot.scale[0]) for way in (-0.5, 1.0))
    wish = {"v1": {"gain": 1.5}}
    strict = Party("strict", Palette(wish, floors={"v0": high}, on_floor="best"))
    mild = Party("mild", Palette({"v2": {"gain": 1.5}}, floors={"v0": low}, on_floor="best"))
    free = Party("free", Palette({"v2": {"gain": 0.2}}))
    found = negotiate([strict, mild, free], pilot, N)
    assert dict(found.palette.floors) == {"v0": high}
    assert found.palette.on_floor == "best"
    refusing = Party("mild", Palette({"v2": {"gain": 1.5}}, floors={"v0": low}))
    found = negotiate([strict, refusing], pilot, N)
    assert found.palette.on_floor == "refuse"
    # s_p is counted from what the floors alone give: the mean over allowed candidates
    rewards = pilot.groups(N).rewards
    allowed = rewards[..., 0] >= high
    kept = allowed.any(axis=1)
    assert 0 < found.solution.refused == 1 - kept.mean()
    base = np.array(
        [group[mask].mean(axis=0) for group, mask in zip(rewards[kept], allowed[kept], strict=True)]
    ).mean(axis=0)
    expected = found.solution.expected
    way = pilot.base + 1.5 * pilot.scale - base
    for name, i in (("strict", 1), ("mild", 2)):
        np.testing.assert_allclose(found.served[name], (expected - base)[i] / way[i], atol=1e-6)


def test_floors_that_refuse_everything_leave_nothing():
    pilot = gaussian_pilot(0)
    parties = [
        Party("a", Palette({"v0": "keep"}, floors={"v0": 1e9})),
        Party("b", Palette({"v1": {"gain": 0.5}})),
    ]
    found = negotiate(parties, pilot, N)
    assert found.solution.status is Status.INFEASIBLE
    assert dict(found.satisfaction) == dict(found.served) == dict(found.alone) == {"a": 0, "b": 0}
    assert found.limits == "no answer reaches the floors"


def test_a_budget_lowers_what_is_served_and_not_the_optimum():
    pilot = gaussian_pilot(1)
    parties = [Party("a", gains(pilot, 1.5, [0])), Party("b", gains(pilot, 1.5, [1, 2]))]
    free, tight = (negotiate(parties, pilot, 16, max_kl=budget) for budget in (None, 0.1))
    np.testing.assert_allclose(numbers(tight.satisfaction), numbers(free.satisfaction))
    assert tight.solution.kl <= 0.1
    assert (numbers(tight.served) < numbers(free.served) - 0.1).all()
    assert (numbers(tight.served) > 0.0).all()


def test_a_value_that_cannot_change_leaves_its_party_at_0():
    rewards = np.array(gaussian_pilot(0, n_prompts=8).rewards)
    rewards[..., 0] = 5.0
    pilot = PilotSet(rewards, ("v0", "v1", "v2"))
    parties = [
        Party("a", Palette({"v0": {"at_least": 6.0}})),
        Party("b", Palette({"v1": {"gain": 0.2}})),
    ]
    found = negotiate(parties, pilot, N)
    assert dict(found.satisfaction) == {"a": 0.0, "b": 1.0}
    assert "5 of v0" in found.limits


def test_mistakes_are_named():
    pilot = gaussian_pilot(0)
    good = Palette({"v0": {"gain": 0.5}})

    def mistake(parties):
        with pytest.raises(PaletteError) as caught:
            negotiate(parties, pilot, N)
        return caught.value.param

    first = Party("a", good)
    assert mistake([]) == "parties"
    assert mistake([first, Party("a", good)]) == "parties[1].name"
    assert mistake([first, Party("b", Palette({}))]) == "parties[1].targets"
    given = Palette({"v0": {"multiplier": 1.0}})
    assert mistake([first, Party("b", given)]) == "parties[1].targets.v0"
    unknown = Party("b", Palette({"humor": "keep"}))
    assert mistake([first, unknown]) == "parties[1].targets.humor"
    with pytest.raises(UnknownValueError):
        negotiate([first, unknown], pilot, N)
    assert mistake([Party("b", Palette({"v0": "keep"}, {"w": 1}))]) == "parties[0].floors.w"
    for weight in (0, -1.0, math.inf, math.nan, "1", True):
        with pytest.raises(PaletteError) as caught:
            Party("a", good, weight)
        assert caught.value.param == "weight"
    with pytest.raises(PaletteError) as caught:
        Party(" ", good)
    assert caught.value.param == "name"
