import functools
import json
import math

import numpy as np
import pytest
from scipy import optimize

from solver import Palette, PaletteError, PilotSet, Status, UnknownValueError, repair, solve
from solver.negotiation import Party, negotiate
from tests.solver.problems import gaussian_pilot, support

N = 6


class Explicit:
    """The parties' problem with a weight for every candidate; nothing here is the solver's.

    Variables: the weights of all candidates, the levels, each party's share, and t. `asked` holds
    a (lower, upper) pair of arrays for each party, reward units.
    """

    def __init__(self, rewards, asked, weights):
        n_groups, n, m = rewards.shape
        self.m, self.weights = m, np.asarray(weights, dtype=float)
        self.size, self.parties = n_groups * n, len(asked)
        base = rewards.mean(axis=(0, 1))
        width = self.size + m + self.parties + 1
        picks = np.zeros((n_groups, width))
        picks[:, : self.size] = np.kron(np.eye(n_groups), np.ones(n))
        levels = np.zeros((m, width))
        levels[:, : self.size] = rewards.reshape(-1, m).T / n_groups
        levels[:, self.size : self.size + m] = -np.eye(m)
        self.equal = np.vstack([picks, levels]), np.append(np.ones(n_groups), np.zeros(m))
        rows, ends, self.wishing = [], [], set()
        for party, (lower, upper) in enumerate(asked):
            for side, bound in ((1, lower), (-1, upper)):
                for i in np.flatnonzero(np.isfinite(bound)):
                    row = np.zeros(width)
                    row[self.size + i] = -side
                    way = side * (bound[i] - base[i])
                    if way > 1e-9:
                        row[self.share(party)] = way
                        rows.append(row)
                        ends.append(-side * base[i])
                        self.wishing.add(party)
                    else:
                        rows.append(row)
                        ends.append(-side * bound[i] + 1e-12)
        self.rows, self.ends = np.array(rows), np.array(ends)

    def share(self, party):
        return self.size + self.m + party

    def most(self, goal, share_at_least, rate=None):
        """Largest value of one variable with given least shares and, by `rate`, share >= t·rate."""
        width = self.rows.shape[1]
        rows, ends = self.rows, self.ends
        if rate is not None:
            extra = np.zeros((self.parties, width))
            extra[np.arange(self.parties), [self.share(p) for p in range(self.parties)]] = -1
            extra[:, -1] = rate
            rows, ends = np.vstack([rows, extra]), np.append(ends, np.zeros(self.parties))
        cost = np.zeros(width)
        cost[goal] = -1
        bounds = [(0, None)] * self.size + [(None, None)] * self.m
        bounds += [(low - 1e-10, 1) for low in share_at_least] + [(0, None)]
        found = optimize.linprog(
            cost, rows, ends, *self.equal, bounds=bounds, method="highs",
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )  # fmt: skip
        assert found.success, found.message
        return float(-found.fun)

    def leximin(self):
        share = np.array([0.0 if p in self.wishing else 1.0 for p in range(self.parties)])
        is_open = share == 0.0
        while is_open.any():
            t = self.most(-1, share, np.where(is_open, self.weights, 0.0))
            share = np.where(is_open, t * self.weights, share)
            gains = [
                self.most(self.share(p), share) - share[p] if is_open[p] else math.inf
                for p in range(self.parties)
            ]
            is_open &= np.array(gains) > max(1e-8, min(gains))
        return share


def ends(palette, pilot):
    resolved = palette.resolve(pilot)
    return resolved.lower, resolved.upper


def problem(seed):
    """2 to 4 parties with opposing and shared values; guards and whole wishes among them."""
    rng = np.random.default_rng(seed)
    m = int(rng.integers(2, 5))
    pilot = gaussian_pilot(
        seed, n_prompts=8, n_candidates=N, n_values=m, correlation=rng.uniform(-0.2, 0.5)
    )
    usual = rng.choice([-1, 1], size=m)  # most parties want a value to go the same way
    parties = []
    for p in range(rng.integers(2, 5)):
        targets = {}
        for i in rng.choice(m, size=rng.integers(1, m + 1), replace=False):
            gain = float(rng.choice([-0.4, 0.2, 0.6, 1.0, 1.6]))
            way = usual[i] * rng.choice([-1, 1], p=[0.04, 0.96])
            away = float(pilot.base[i] + way * gain * pilot.scale[i])
            side = "at_least" if way > 0 else "at_most"
            targets[f"v{i}"] = (
                {side: away},
                {side: away},
                {"between": [away, away + 0.3] if way > 0 else [away - 0.3, away]},
                {"gain": gain} if way > 0 else {side: away},
                "keep",
            )[rng.integers(5)]
        parties.append(Party(f"p{p}", Palette(targets), float(rng.choice([0.3, 1, 1, 2.5]))))
    return pilot, parties


def explicit(pilot, parties, candidates=N):
    asked = [ends(party.palette, pilot) for party in parties]
    weights = [party.weight for party in parties]
    return Explicit(pilot.groups(candidates).rewards, asked, weights)


def numbers(by_name):
    return np.array(list(by_name.values()))


@functools.cache
def settled(seed):
    pilot, parties = problem(seed)
    return pilot, parties, negotiate(parties, pilot, N)


def gains(pilot, share, columns=range(3)):
    return Palette({f"v{i}": {"gain": share} for i in columns})


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
