"""Verdicts against linear programmes written out in full, most of them next to the very limit."""

import math
from fractions import Fraction
from functools import partial

import numpy as np
import pytest

from solver import (
    Palette,
    PilotError,
    PilotSet,
    SolutionCache,
    Status,
    UnknownValueError,
    feasibility,
    min_candidates,
    repair,
    solve,
)
from tests.solver.arena import FARTHEST, Arena, Ray, check_near_the_limit, check_verdict
from tests.solver.problems import explicit_margin, gaussian_pilot, names


@pytest.mark.parametrize("block", range(8))
def test_a_pool_next_to_its_limits(published_pilot, block):
    found = [check_near_the_limit(published_pilot, math.inf, seed) for seed in range(block, 168, 8)]
    assert sum(statuses.count(Status.INFEASIBLE) for statuses in found) > 30
    assert sum(statuses.count(Status.OPTIMAL) for statuses in found) > 50
    assert sum(statuses.count(Status.STEP_LIMIT) for statuses in found) < 3


@pytest.mark.parametrize("block", range(4))
def test_sixteen_candidates_next_to_their_limits(published_pilot, block):
    found = [check_near_the_limit(published_pilot, 16, 1000 + seed) for seed in range(block, 28, 4)]
    assert sum(statuses.count(Status.INFEASIBLE) for statuses in found) > 10
    assert sum(statuses.count(Status.OPTIMAL) for statuses in found) > 15
    assert sum(statuses.count(Status.STEP_LIMIT) for statuses in found) < 3


def hostile_pilot(rng):
    """Small and degenerate: ties, repeats, constants, one prompt, one candidate, wild units."""
    shape = (int(rng.choice([1, 2, 5, 8])), int(rng.choice([1, 2, 4, 8])), int(rng.integers(1, 6)))
    rewards, m = rng.normal(size=shape), shape[2]
    match rng.choice(["plain", "whole", "repeat", "constant", "same", "large", "small", "mixed"]):
        case "whole":
            rewards = rng.integers(-2, 3, size=shape).astype(float)
        case "repeat":
            rewards = rewards[..., rng.integers(0, (m + 1) // 2, size=m)] * rng.choice([-1, 1], m)
        case "constant":
            rewards[..., int(rng.integers(m))] = rng.choice([0.0, 0.1, 1e6])
        case "same":
            rewards[: (shape[0] + 1) // 2] = rewards[: (shape[0] + 1) // 2, :1]
        case "large":
            rewards = 1e6 * (rewards + rng.choice([0.0, 1.0]))
        case "small":
            rewards = 1e-6 * (rewards + rng.choice([0.0, 1.0]))
        case "mixed":
            rewards = rewards * 10.0 ** rng.integers(-6, 7, size=m) + rng.choice([0.0, 10.0])
    pooled = bool(rng.random() < 0.2)
    return PilotSet(rewards.reshape(-1, m) if pooled else rewards, names(m), pooled=pooled)


@pytest.mark.parametrize("block", range(4))
def test_degenerate_problems_next_to_their_limits(block):
    found = []
    for seed in range(block, 120, 4):
        rng = np.random.default_rng(seed)
        pilot = hostile_pilot(rng)
        most = pilot.n_prompts if pilot.pooled else pilot.n_candidates
        sizes = [n for n in (1, 2, 3, 4, 8, math.inf) if n <= most or n == math.inf]
        n = sizes[int(rng.integers(len(sizes)))]
        if len(Arena.of(pilot, n).rewards):
            found += check_near_the_limit(pilot, n, seed, [-1e-3, 1e-3, -1e-6, 1e-6, 0.0])
    assert {Status.OPTIMAL, Status.INFEASIBLE, Status.BOUNDARY} <= set(found)


@pytest.mark.parametrize("block", range(4))
def test_palettes_anywhere_have_the_verdict_of_their_margin(published_pilot, block):
    found = []
    for seed in range(block, 32, 4):
        rng = np.random.default_rng(seed)
        ray, arena = Ray.draw(published_pilot, math.inf, rng)
        palette, lower, upper = ray.at(rng.uniform(0.2, 2.0))
        margin = explicit_margin(arena.rewards, lower, upper, published_pilot.scale, arena.allowed)
        solution = solve(palette, published_pilot, math.inf)
        check_verdict(solution, margin, arena, lower, upper, published_pilot, ray.extra)
        found.append(solution.status)
    assert {Status.OPTIMAL, Status.INFEASIBLE} <= set(found)


def whole_problem(seed):
    """Whole rewards and the vertex of a positive direction; every number is exact in binary."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.choice([1, 2, 4, 8])), int(rng.choice([2, 4, 8])), int(rng.integers(1, 4)))
    rewards = rng.integers(-3, 4, size=shape).astype(float)
    direction = rng.integers(1, 4, size=shape[2]).astype(float)
    score = rewards @ direction
    vertex = rewards[np.arange(shape[0]), score.argmax(axis=1)].mean(axis=0)
    return PilotSet(rewards, names(shape[2])), vertex, bool(np.ptp(score, axis=1).any())


def rational_gap(pilot, proof, levels):
    """u·c − h_N(u) without any rounding."""
    u = [Fraction(proof.direction.get(name, 0.0)) for name in pilot.values]
    best = [
        max(sum(a * Fraction(r) for a, r in zip(u, answer, strict=True)) for answer in group)
        for group in pilot.rewards.tolist()
    ]
    asks = sum(a * Fraction(c) for a, c in zip(u, levels.tolist(), strict=True))
    return asks - sum(best) / len(best)


def asks(pilot, levels):
    targets = zip(pilot.values, levels.tolist(), strict=True)
    return solve(Palette({v: {"at_least": c} for v, c in targets}), pilot, pilot.n_candidates)


def is_collinear(pilot):
    excess = pilot.rewards - pilot.rewards.mean(axis=1, keepdims=True)
    return np.linalg.matrix_rank(excess.reshape(-1, pilot.n_values)) < pilot.n_values


@pytest.mark.parametrize("block", range(4))
def test_either_side_of_the_limit_exactly(block):
    for seed in range(block, 100, 4):
        pilot, vertex, tells_apart = whole_problem(seed)
        if not is_collinear(pilot):
            limit = Status.BOUNDARY if tells_apart else Status.OPTIMAL
            assert asks(pilot, vertex).status is limit
        for excess in (2.0**-26, 2.0**-10, 2.0):  # exact in binary, and so is the sum
            out = asks(pilot, vertex + excess)
            assert out.status is Status.INFEASIBLE
            assert rational_gap(pilot, out.certificate, vertex + excess) > 0
        assert asks(pilot, vertex - 2.0**-18).status is Status.OPTIMAL


def test_the_limit_of_collinear_values_is_the_boundary():
    for seed in range(200):
        pilot, vertex, tells_apart = whole_problem(seed)
        if is_collinear(pilot) and tells_apart:
            assert asks(pilot, vertex).status is Status.BOUNDARY, seed


@pytest.mark.parametrize(("n", "seed"), [(math.inf, 52), (16, 1013)])
def test_the_iteration_stops_where_rounding_leaves_no_step(published_pilot, n, seed):
    ray, arena = Ray.draw(published_pilot, n, np.random.default_rng(seed))
    limit = ray.limit(arena)
    for share in (-1e-5, -1e-6):
        solution = solve(ray.at(limit * (1 + share))[0], published_pilot, n)
        assert solution.status is Status.OPTIMAL
        assert solution.iterations < 40


def test_certificates_of_small_problems_hold_without_rounding():
    n_proofs = 0
    for seed in range(60):
        pilot = gaussian_pilot(seed, n_prompts=4, n_candidates=4)
        rng = np.random.default_rng(seed)
        levels = pilot.base + rng.uniform(0.4, 1.2, size=3) * pilot.scale
        targets = {v: {"at_least": c} for v, c in zip(pilot.values, levels.tolist(), strict=True)}
        ends = repair(Palette(targets), pilot, 4).limit
        for beyond in (1e-7, 1e-3):
            asked = np.array([ends[name] for name in pilot.values]) + beyond * pilot.scale
            targets = {
                v: {"at_least": c} for v, c in zip(pilot.values, asked.tolist(), strict=True)
            }
            out = solve(Palette(targets), pilot, 4)
            if out.status is Status.INFEASIBLE:
                assert rational_gap(pilot, out.certificate, asked) > 0
                n_proofs += 1
    assert n_proofs > 80


@pytest.mark.parametrize("count", [np.int64(8), np.float64(8.0)])
def test_a_count_from_numpy_gives_the_same_sentence(count):
    pilot = gaussian_pilot(0)
    palette = Palette({"v0": {"gain": 9.0}})
    plain, other = solve(palette, pilot, 8), solve(palette, pilot, count)
    assert other.to_dict()["certificate"] == plain.to_dict()["certificate"]


@pytest.mark.parametrize(("low", "high"), [(-0.8, -0.5), (-9.0, -8.0)])
def test_a_tiny_multiplier_of_the_wrong_sign_does_not_pass_for_a_solution(low, high):
    pilot = gaussian_pilot(0)
    ends = (pilot.base[0] + np.array([low, high]) * pilot.scale[0]).tolist()
    palette = Palette({"v0": {"between": ends}})
    cold = solve(palette, pilot, 8)
    warm = solve(palette, pilot, 8, warm_start=[1e-10, 0.0, 0.0])
    assert warm.status is cold.status
    if cold.status is Status.OPTIMAL:
        np.testing.assert_allclose(warm.expected, cold.expected, atol=1e-7)


@pytest.mark.parametrize("shape", [(2, 4, 1), (4, 1, 1)])
def test_a_constant_value_of_a_small_unit_cannot_be_raised(shape):
    pilot = PilotSet(np.full(shape, 1e-10), names(1))
    assert solve(Palette({"v0": {"at_least": 2e-10}}), pilot, 1).status is Status.INFEASIBLE


@pytest.mark.parametrize("block", range(4))
def test_a_start_changes_no_verdict(block):
    for seed in range(300 + block, 380, 4):
        rng = np.random.default_rng(seed)
        pilot = hostile_pilot(rng)
        n = 1 if pilot.pooled else pilot.n_candidates
        ray, arena = Ray.draw(pilot, n, rng)
        if not len(arena.rewards):
            continue
        limit = ray.limit(arena)
        for share in (-0.2, -1e-4, 1e-4, 0.2):
            palette, lower, upper = ray.at(limit * (1 + share))
            start = rng.normal(size=pilot.n_values) * 10.0 ** rng.integers(-3, 4) / pilot.scale
            solution = solve(palette, pilot, n, warm_start=start)
            margin = -share * limit * ray.unit if limit < FARTHEST or share < 0 else 0.0
            check_verdict(solution, margin, arena, lower, upper, pilot, ray.extra)


def cached(palette, pilot, n):
    return SolutionCache().solve(palette, pilot, n)


@pytest.mark.parametrize("method", ["interpolate", "nearest", "greedy"])
@pytest.mark.parametrize(
    ("n", "words"),
    [
        (17, "calibrate with more candidates or ask for at most 16"),
        (0, "whole number from 1 up"),
        (1.5, "whole number from 1 up"),
        (math.nan, "whole number from 1 up"),
        (-math.inf, "whole number from 1 up"),
    ],
)
def test_impossible_counts_are_refused_everywhere(n, words, method):
    pilot, palette = gaussian_pilot(0), Palette({"v0": {"gain": 0.3}})
    for ask in (solve, cached, partial(repair, method=method)):
        with pytest.raises(PilotError, match=words):
            ask(palette, pilot, n)
    with pytest.raises(PilotError, match=words):
        pilot.groups(n)


def test_values_that_differ_are_refused_everywhere():
    pilot = gaussian_pilot(0)
    for palette in (Palette({"v3": "keep"}), Palette({"v0": "keep"}, floors={"v3": 0.0})):
        for ask in (solve, cached, repair):
            with pytest.raises(UnknownValueError, match="known values are v0, v1, v2"):
                ask(palette, pilot, 8)
        with pytest.raises(UnknownValueError, match="known values are v0, v1, v2"):
            min_candidates(palette, pilot)


def test_a_cached_neighbour_does_not_change_the_verdict():
    pilot = gaussian_pilot(0)
    beside = {"gain": 0.5}
    unit, level = pilot.scale[0], solve(Palette({"v1": beside}), pilot, 8).expected[0]

    def asks(low, high):
        ends = [float(level + low * unit), float(level + high * unit)]
        return Palette({"v0": {"between": ends}, "v1": beside})

    store = SolutionCache()
    first, _ = store.solve(asks(3e-10, 1.0), pilot, 8)
    assert 0 < first.multipliers[0] < 1e-8
    second, origin = store.solve(asks(-1.0, -0.3), pilot, 8)
    assert origin == "warm"
    assert second.expected[0] <= level - 0.29 * unit


class Failed:
    """What HiGHS returns where it gives up."""

    x = None


def test_a_linear_programme_that_fails_proves_nothing(monkeypatch):
    pilot = gaussian_pilot(0)
    ends = repair(Palette({name: {"gain": 1.0} for name in pilot.values}), pilot, 8).limit
    levels = pilot.base + 0.9 * (np.array(list(ends.values())) - pilot.base)
    palette = Palette(
        {v: {"at_least": c} for v, c in zip(pilot.values, levels.tolist(), strict=True)}
    )
    monkeypatch.setattr(feasibility.optimize, "linprog", lambda *_, **__: Failed())
    assert solve(palette, pilot, 8, max_iterations=1).status is not Status.BOUNDARY


@pytest.mark.parametrize("offset", [1e5, 1e8, 1e12])
def test_rewards_far_from_zero_lose_no_verdict(offset):
    """Whole numbers, so that the limit is a number too, and stays one when all are moved."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        shape = int(rng.choice([1, 2, 4])), int(rng.choice([3, 5, 6, 7, 12]))
        rewards = rng.integers(-3, 4, size=(*shape, 2)).astype(float)
        score = rewards @ rng.integers(1, 4, size=2)
        if not np.ptp(score, axis=1).any():
            continue
        limit = rewards[np.arange(len(rewards)), score.argmax(axis=1)].mean(axis=0)
        moved = offset + float(rng.integers(0, 100))
        pilot = PilotSet(rewards + moved, names(2))
        for beyond, status in ((0, "boundary"), (2**-10, "infeasible"), (-(2**-10), "optimal")):
            levels = (limit + moved + beyond).tolist()
            palette = Palette({f"v{i}": {"at_least": c} for i, c in enumerate(levels)})
            assert solve(palette, pilot, shape[1]).status.value == status
