"""The optimum of several parties: the leximin, who gains from whom, and what is then served."""

import json
import math

import numpy as np
import pytest

from solver import Palette, PilotSet, Status, repair, solve
from solver.negotiation import Party, negotiate
from tests.solver.parties import N, ends, explicit, gains, numbers, settled
from tests.solver.problems import gaussian_pilot, support


@pytest.mark.parametrize("seed", range(40))
def test_the_optimum_is_the_leximin_of_an_explicit_programme(seed):
    pilot, parties, found = settled(seed)
    share = numbers(found.satisfaction)
    np.testing.assert_allclose(share, explicit(pilot, parties).leximin(), atol=1e-6)
    assert found.worst == (list(found.satisfaction)[share.argmin()], share.min())
    assert not np.signbit(share).any()
    assert (found.limits is None) == (share.min() == 1.0)
    # and the most that each could have by itself
    for party in parties:
        truth = explicit(pilot, [party])
        by_itself = truth.most(truth.share(0), [0.0])
        np.testing.assert_allclose(found.alone[party.name], by_itself, atol=1e-6)
        assert found.satisfaction[party.name] <= found.alone[party.name] + 1e-6


def test_the_problems_are_of_all_kinds():
    shares = [numbers(settled(seed)[2].satisfaction) for seed in range(40)]
    least = np.array([share.min() for share in shares])
    most = np.array([share.max() for share in shares])
    assert ((least > 0.05) & (least < 0.95)).sum() >= 15  # something to share out
    assert ((least > 0.05) & (most > least + 0.05)).sum() >= 10  # and a second to go on with
    assert (least == 1.0).any()
    assert (least == 0.0).any()


@pytest.mark.parametrize("seed", range(12))
def test_nobody_can_gain_but_from_those_who_have_more(seed):
    pilot, parties, found = settled(seed)
    share = numbers(found.satisfaction)
    truth = explicit(pilot, parties)
    relative = share / truth.weights
    for p in range(len(parties)):
        kept = np.where(relative <= relative[p] + 1e-7, share - 1e-9, 0.0)
        assert truth.most(truth.share(p), kept) <= share[p] + 1e-6


@pytest.mark.parametrize("seed", range(20))
def test_what_is_served_is_what_is_said(seed):
    pilot, parties, found = settled(seed)
    solution = found.solution
    assert solution.status is Status.OPTIMAL
    again = solve(found.palette, pilot, N)
    np.testing.assert_allclose(again.expected, solution.expected, atol=1e-7)
    share = numbers(found.satisfaction)
    for party, satisfied in zip(parties, share, strict=True):
        lower, upper = ends(party.palette, pilot)
        served = 1.0
        for side, bound in ((1, lower), (-1, upper)):
            for i in np.flatnonzero(np.isfinite(bound)):
                way = side * (bound[i] - pilot.base[i])
                progress = side * (solution.expected[i] - pilot.base[i])
                if way > 1e-9:
                    served = min(served, progress / way)
                else:
                    assert progress >= way - 1e-6  # a guard: nobody goes beyond it
        np.testing.assert_allclose(found.served[party.name], served, atol=1e-6)
        assert 0.0 <= found.served[party.name] <= 1.0
        assert served >= 0.99 * satisfied - 1e-6  # the smallest of repairs.PULLS was enough
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("seed", range(6))
def test_one_party_is_an_interpolation(seed):
    pilot = gaussian_pilot(seed, n_prompts=12, n_candidates=8)
    goals = np.random.default_rng(seed).uniform(0.2, 1.4, size=2)
    palette = Palette({"v0": {"gain": goals[0]}, "v1": "keep", "v2": {"gain": goals[1]}})
    found = negotiate([Party("one", palette, 3.0)], pilot, 8)
    whole = repair(palette, pilot, 8)
    np.testing.assert_allclose(found.satisfaction["one"], whole.fraction, atol=1e-8)
    np.testing.assert_allclose(found.alone["one"], whole.fraction, atol=1e-8)
    np.testing.assert_allclose(found.solution.expected, whole.solution.expected, atol=1e-7)


def test_identical_parties_get_what_one_gets():
    pilot = gaussian_pilot(1, n_prompts=12)
    palette = gains(pilot, 1.5)
    one = negotiate([Party("a", palette)], pilot, N)
    three = negotiate([Party(name, palette) for name in "abc"], pilot, N)
    np.testing.assert_allclose(numbers(three.satisfaction), one.satisfaction["a"], atol=1e-8)
    assert 0 < one.satisfaction["a"] < 1
    for name, level in one.levels.items():
        np.testing.assert_allclose(three.levels[name]["at_least"], level["at_least"], atol=1e-8)


@pytest.mark.parametrize("seed", range(12))
def test_a_stronger_weight_never_gets_less(seed):
    pilot, parties, found = settled(seed)
    before = found.satisfaction
    for p, party in enumerate(parties):
        stronger = list(parties)
        stronger[p] = Party(party.name, party.palette, 2.0 * party.weight)
        after = negotiate(stronger, pilot, N).satisfaction
        assert after[party.name] >= before[party.name] - 1e-6


def test_weights_share_out_in_proportion():
    pilot = gaussian_pilot(2, n_prompts=12)
    palettes = [Palette({f"v{i}": {"gain": 3.0}}) for i in range(2)]
    found = negotiate([Party("a", palettes[0], 2.0), Party("b", palettes[1], 1.0)], pilot, N)
    assert found.satisfaction["b"] > 0.05
    np.testing.assert_allclose(found.satisfaction["a"], 2 * found.satisfaction["b"], atol=1e-7)


@pytest.mark.parametrize("factor", [1e-6, 7.3, 1e6])
def test_the_scale_of_weights_does_not_matter(factor):
    for seed in range(6):
        pilot, parties, found = settled(seed)
        scaled = [Party(p.name, p.palette, p.weight * factor) for p in parties]
        np.testing.assert_allclose(
            numbers(negotiate(scaled, pilot, N).satisfaction),
            numbers(found.satisfaction),
            atol=1e-8,
        )


@pytest.mark.parametrize("seed", range(12))
def test_another_party_never_raises_the_least_of_the_others(seed):
    pilot, parties, found = settled(seed)
    some = parties[:-1]
    weights = np.array([party.weight for party in some])
    before = numbers(negotiate(some, pilot, N).satisfaction) / weights
    after = numbers(found.satisfaction)[:-1] / weights
    assert after.min() <= before.min() + 1e-7


def test_parties_that_do_not_disturb_each_other_get_what_each_has_alone():
    """One candidate is the best of its group in everything; the gains differ by little."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=(20, N, 1)).repeat(3, axis=2)
    pilot = PilotSet(common * [1.0, 2.0, 3.0], ("v0", "v1", "v2"))
    top = pilot.groups(N).rewards.max(axis=1).mean(axis=0)
    shares = np.array([0.5, 0.505, 0.5005])
    wishes = pilot.base + (top - pilot.base) / shares
    parties = [
        Party(f"p{i}", Palette({f"v{i}": {"at_least": float(wish)}}))
        for i, wish in enumerate(wishes)
    ]
    found = negotiate(parties, pilot, N)
    np.testing.assert_allclose(numbers(found.satisfaction), shares, atol=1e-7)
    np.testing.assert_allclose(numbers(found.alone), shares, atol=1e-7)


def test_opposite_wishes_leave_a_value_where_it_is():
    pilot = gaussian_pilot(0)
    low, high = (float(pilot.base[0] + way * pilot.scale[0]) for way in (-0.3, 0.3))
    parties = [
        Party("up", Palette({"v0": {"at_least": high}})),
        Party("down", Palette({"v0": {"at_most": low}})),
        Party("aside", Palette({"v1": {"gain": 9.0}})),
    ]
    found = negotiate(parties, pilot, 16)
    assert found.satisfaction["up"] == found.satisfaction["down"] == 0.0
    assert found.satisfaction["aside"] > 0.1
    assert found.stopped == ()
    assert "up wants v0" in found.limits
    assert "down holds it at most" in found.limits
    np.testing.assert_allclose(found.solution.expected[0], pilot.base[0], atol=1e-7)


@pytest.mark.parametrize("seed", range(6))
def test_the_limit_of_the_worst_is_a_proof(seed):
    """The sentence's numbers: more of that combination than is asked cannot be had."""
    pilot = gaussian_pilot(seed, n_prompts=10, n_candidates=N)
    parties = [Party(f"p{i}", gains(pilot, 2.0, [i, (i + 1) % 3]), 1.0 + i) for i in range(3)]
    found = negotiate(parties, pilot, N)
    words = found.limits.removeprefix(f"the whole wish of {found.worst[0]} beside ")
    words = words.split("gives more than ")[1]
    limit, terms = words.split(" of ", 1)
    terms, asked = terms.split("; the palette asks for ")
    direction = np.zeros(3)
    for term in terms.replace("+ ", "").split(" "):
        weight, name = term.split("·")
        direction[int(name[1])] = float(weight)
    rewards = pilot.groups(N).rewards
    np.testing.assert_allclose(float(limit), support(rewards, direction), rtol=0.01, atol=0.01)
    levels = np.array([found.levels[name]["at_least"] for name in pilot.values])
    assert float(asked) > float(limit)
    np.testing.assert_allclose(direction @ levels, float(limit), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("candidates", [4, math.inf])
def test_published_answers_are_negotiated(published_pilot, candidates):
    humor, helpful, harmless = published_pilot.values[:3]
    parties = [
        Party("fun", Palette({humor: {"quantile": 0.8}})),
        Party("help", Palette({helpful: {"quantile": 0.8}})),
        Party("safe", Palette({harmless: {"quantile": 0.8}, helpful: "keep"}), 2.0),
    ]
    found = negotiate(parties, published_pilot, candidates)
    share = numbers(found.satisfaction)
    if candidates == math.inf:
        assert (share == 1.0).all()  # HHH-80 is feasible there
    else:
        np.testing.assert_allclose(share[0], share[1], atol=1e-7)
        np.testing.assert_allclose(share[2], 2 * share[0], atol=1e-7)
    assert found.solution.status is Status.OPTIMAL
