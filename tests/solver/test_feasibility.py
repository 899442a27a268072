import numpy as np
import pytest

from solver import Palette, PilotSet, Status, solve
from solver.dual import ServedDual
from solver.feasibility import certificate, headroom, reach
from solver.rows import Rows
from tests.solver.problems import (
    at_least,
    explicit_fraction,
    explicit_margin,
    gaussian_pilot,
    names,
    random_choice_levels,
    support,
)

N_VERDICTS = 240
# The two sides compute a margin independently; HiGHS works to about 1e-9.
SAME_MARGIN = 1e-7


def random_problem(seed):
    """A palette anywhere around the limit of what is achievable, of any mixture of forms."""
    rng = np.random.default_rng(seed)
    n_values = int(rng.integers(1, 5))
    n_candidates = int(rng.choice([1, 2, 4, 8]))
    pilot = gaussian_pilot(seed, n_prompts=6, n_candidates=8, n_values=n_values)
    if seed % 5 == 0:  # ties and repeated candidates
        pilot = PilotSet(np.round(pilot.rewards), pilot.values)
    rewards = pilot.groups(n_candidates).rewards
    targets = {}
    levels = random_choice_levels(rewards, rng, sharpness=rng.choice([0.3, 3.0, 100.0]))
    levels += rng.normal(size=n_values) * pilot.scale * rng.choice([0.01, 0.1, 0.5])
    for i, level in enumerate(levels.tolist()):
        kind = rng.choice(["at_least", "at_least", "at_most", "between", "free"])
        if kind == "between":
            width = float(rng.choice([0.0, 0.3])) * float(pilot.scale[i])
            targets[f"v{i}"] = {"between": [level, level + width]}
        elif kind != "free":
            targets[f"v{i}"] = {str(kind): level}
    return Palette(targets or {"v0": {"at_least": float(levels[0])}}), pilot, n_candidates


@pytest.mark.parametrize("block", range(8))
def test_verdicts_agree_with_an_explicit_linear_programme(block):
    verdicts = []
    for seed in range(block, N_VERDICTS, 8):
        palette, pilot, n = random_problem(seed)
        asked = palette.resolve(pilot)
        rewards = pilot.groups(n).rewards
        exact = explicit_margin(rewards, asked.lower, asked.upper, pilot.scale)
        solution = solve(palette, pilot, n)
        assert solution.status is not Status.STEP_LIMIT, seed
        if abs(exact) > SAME_MARGIN:
            assert (solution.status is Status.INFEASIBLE) == (exact < 0), (seed, exact)
        else:
            assert solution.status in (Status.OPTIMAL, Status.BOUNDARY), (seed, exact)
        # Without Newton's own certificates the linear programme must come to the same verdict.
        hasty = solve(palette, pilot, n, max_iterations=1)
        if abs(exact) > SAME_MARGIN:
            assert (hasty.status is Status.INFEASIBLE) == (exact < 0), (seed, exact)
        if solution.status is Status.INFEASIBLE:
            proof = solution.certificate
            u = np.array([proof.direction.get(name, 0.0) for name in pilot.values])
            with np.errstate(invalid="ignore"):
                asks = np.where(u > 0, u * asked.lower, np.where(u < 0, u * asked.upper, 0)).sum()
            # rtol: the sums run in another order
            np.testing.assert_allclose(proof.limit, support(rewards, u), rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(proof.asked, asks, rtol=1e-9, atol=1e-12)
            assert proof.asked > proof.limit
            np.testing.assert_allclose(np.abs(u).sum(), 1.0)
        elif solution.status is Status.OPTIMAL:
            assert solution.kkt_residual <= 1e-8
            slack = 1e-7 * pilot.scale
            assert (solution.expected >= asked.lower - slack).all()
            assert (solution.expected <= asked.upper + slack).all()
        verdicts.append(solution.status)
    # The problems are worth something only if both verdicts are common among them.
    assert 0.1 < np.mean([status is Status.INFEASIBLE for status in verdicts]) < 0.9


def cauchy(rng, shape):
    return rng.standard_cauchy(size=shape)


def rare(rng, shape):
    return (rng.random(shape) < 0.05).astype(float)


def skewed(rng, shape):
    return np.exp(3 * rng.normal(size=shape))


def uneven_units(rng, shape):
    units = 10.0 ** rng.integers(-4, 8, size=shape[2])
    return rng.normal(size=shape) * units + 10.0 ** rng.integers(0, 3, size=shape[2])


def collinear(rng, shape):
    return rng.normal(size=(*shape[:2], 2)) @ rng.normal(size=(2, shape[2]))


def binary_and_partly_repeated(rng, shape):
    rewards = rng.integers(0, 2, size=shape).astype(float)
    rewards[: shape[0] // 2] = rewards[: shape[0] // 2, :1]
    return rewards


@pytest.mark.parametrize(
    "draw", [cauchy, rare, skewed, uneven_units, collinear, binary_and_partly_repeated]
)
def test_verdicts_hold_on_hostile_rewards(draw):
    rng = np.random.default_rng(1)
    for _ in range(40):
        shape = (int(rng.integers(1, 8)), int(rng.choice([2, 4, 8])), int(rng.integers(1, 6)))
        pilot = PilotSet(draw(rng, shape), names(shape[2]))
        units = pilot.rewards / pilot.scale
        levels = random_choice_levels(units, rng, rng.choice([0.3, 3.0, 30.0]))
        levels = (levels + rng.normal(size=shape[2]) * rng.choice([0, 1e-3, 0.1])) * pilot.scale
        targets = {}
        for name, level, unit in zip(pilot.values, levels, pilot.scale, strict=True):
            kind = str(rng.choice(["at_least", "at_most", "between"], p=[0.7, 0.15, 0.15]))
            ends = [float(level), float(level + 0.1 * unit)]
            targets[name] = {kind: ends if kind == "between" else ends[0]}
        palette = Palette(targets)
        asked = palette.resolve(pilot)
        exact = explicit_margin(pilot.rewards, asked.lower, asked.upper, pilot.scale)
        solution = solve(palette, pilot, shape[1])
        assert solution.status in (Status.OPTIMAL, Status.INFEASIBLE, Status.BOUNDARY)
        if abs(exact) > 1e-6:
            assert (solution.status is Status.INFEASIBLE) == (exact < 0)


@pytest.mark.parametrize("seed", range(30))
def test_the_headroom_is_the_explicit_one(seed):
    palette, pilot, n = random_problem(1000 + seed)
    asked = palette.resolve(pilot)
    rewards = pilot.groups(n).rewards
    dual = ServedDual(pilot.groups(n), asked)
    least, most, _ = headroom(dual, dual.centre)
    unit = Rows.of(dual).bound.max()  # the uniform levels are 0
    if unit <= 0:
        assert least == most == np.inf
        return
    exact = explicit_fraction(rewards, pilot.base, asked.lower, asked.upper, pilot.scale, 2.0)
    exact = (exact - 1) * unit
    # The search stops as soon as the side is proven, so the bounds need not be close.
    assert least - 1e-8 <= exact <= most + 1e-8
    if exact > SAME_MARGIN:
        assert least > 0
    if exact < -SAME_MARGIN:
        assert most < 0


def test_the_line_is_followed_to_its_end():
    pilot = gaussian_pilot(3, n_prompts=8, n_candidates=8)
    drawn = pilot.groups(8)
    floor = float(np.quantile(drawn.rewards[..., 0], 0.5))
    palette = Palette({"v1": {"gain": 2.5}, "v2": {"gain": 2.5}}, floors={"v0": floor})
    asked = palette.resolve(pilot)
    dual = ServedDual(drawn, asked)
    allowed = drawn.rewards[..., 0] >= floor
    kept = allowed.any(axis=1)
    assert 0 < dual.refused < 1
    weights = allowed[kept] / allowed[kept].sum(axis=1, keepdims=True)
    uniform = np.einsum("gn,gnm->m", weights, drawn.rewards[kept]) / kept.sum()
    np.testing.assert_allclose(
        dual.origin[1:] + pilot.scale[1:] * dual.centre, uniform[1:], rtol=1e-12
    )
    rows = Rows.of(dual)
    start = rows.at(dual.centre)
    found = reach(dual, rows, start, rows.bound - start, dual.centre[None], limit=1.0)
    exact = explicit_fraction(
        drawn.rewards[kept], uniform, asked.lower, asked.upper, pilot.scale, 1.0, allowed[kept]
    )
    np.testing.assert_allclose([found.distance, found.bound], exact, atol=1e-8)


def test_groups_that_leave_candidates_out_are_compared_with_the_same_base():
    pilot = gaussian_pilot(4, n_prompts=6, n_candidates=8)
    drawn = pilot.groups(3)
    asked = at_least(pilot.base + 2.0 * pilot.within_std).resolve(pilot)
    dual = ServedDual(drawn, asked)
    rows = Rows.of(dual)
    found = reach(dual, rows, np.zeros(3), rows.bound, np.zeros((1, 3)), limit=1.0)
    own_base = drawn.rewards.mean(axis=(0, 1))
    exact = explicit_fraction(
        drawn.rewards, own_base, asked.lower + own_base - pilot.base, asked.upper, pilot.scale, 1.0
    )
    np.testing.assert_allclose(found.distance, exact, atol=1e-8)


@pytest.mark.parametrize("seed", range(15))
def test_palettes_infeasible_by_construction_are_refuted(seed):
    rng = np.random.default_rng(seed)
    pilot = gaussian_pilot(seed, n_values=4)
    drawn = pilot.groups(8)
    u = rng.exponential(size=4)
    best = drawn.rewards @ u
    vertex = drawn.rewards[np.arange(drawn.n_groups), best.argmax(axis=1)].mean(axis=0)
    # The vertex maximises u·r: the least step beyond it in the direction u is out of reach.
    out = solve(at_least(vertex + 1e-6 * pilot.scale), pilot, 8)
    assert out.status is Status.INFEASIBLE
    assert "no choice among 8 candidates gives more than" in out.certificate.sentence
    within = solve(at_least(vertex - 0.01 * pilot.scale), pilot, 8)
    assert within.status is Status.OPTIMAL


def test_the_limit_of_one_value_is_the_boundary():
    pilot = gaussian_pilot(0)
    top = pilot.groups(8).rewards[..., 0].max(axis=1).mean()
    assert solve(at_least([top - 1e-3]), pilot, 8).status is Status.OPTIMAL
    limit = solve(at_least([top]), pilot, 8)
    assert limit.status is Status.BOUNDARY
    np.testing.assert_allclose(limit.expected[0], top, atol=1e-6)
    assert limit.ess < 1.001
    assert solve(at_least([top + 1e-6]), pilot, 8).status is Status.INFEASIBLE


def test_a_boundary_hidden_among_finite_multipliers_is_seen():
    pilot = gaussian_pilot(1, n_prompts=12, n_values=2)
    rewards = pilot.groups(8).rewards
    # A third value, 1 for one answer in each group, asked of every answer: its multiplier is
    # unbounded while those of the others stay finite.
    flag = np.zeros((*pilot.rewards.shape[:2], 1))
    flag[:, ::2] = 1.0
    both = PilotSet(np.concatenate([pilot.rewards, flag], axis=2), names(3))
    rewards = both.groups(16).rewards
    flagged = rewards[rewards[..., 2] == 1].reshape(12, 8, 3)
    mild = flagged.mean(axis=(0, 1)) + 0.2 * both.scale
    mild[2] = 1.0
    assert solve(at_least(mild), both, 16).status is Status.BOUNDARY
    mild[2] = 0.99
    assert solve(at_least(mild), both, 16).status is Status.OPTIMAL


def test_values_that_tell_no_candidates_apart_do_not_make_a_boundary():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(6, 4, 1))
    constant = np.full((6, 4, 1), 2.0)
    pilot = PilotSet(np.concatenate([rewards, rewards, constant, -rewards], axis=2), names(4))
    gain = float(pilot.base[0] + 0.3 * pilot.scale[0])
    level = {"at_least": gain}
    palette = Palette({"v0": level, "v1": level, "v2": "keep", "v3": {"at_least": -gain - 0.1}})
    assert solve(palette, pilot, 4).status is Status.OPTIMAL
    # at least and at most the same: the mirrored value pins the first
    palette = Palette({"v0": level, "v1": level, "v2": "keep", "v3": {"at_least": -gain}})
    assert solve(palette, pilot, 4).status is Status.OPTIMAL
    pinned = {"between": [gain, gain]}
    palette = Palette({"v0": pinned, "v1": pinned, "v2": {"between": [2.0, 2.0]}})
    assert solve(palette, pilot, 4).status is Status.OPTIMAL
    top = float(rewards[..., 0].max(axis=1).mean())
    assert solve(Palette({"v0": {"between": [top, top]}}), pilot, 4).status is Status.BOUNDARY


def test_a_direction_that_proves_nothing_gives_no_certificate():
    pilot = gaussian_pilot(0)
    dual = ServedDual(pilot.groups(8), at_least(pilot.base).resolve(pilot))
    assert certificate(dual, np.ones(3), 8) is None
    assert certificate(dual, np.zeros(3), 8) is None


def test_reach_stops_at_its_limit():
    pilot = gaussian_pilot(0)
    dual = ServedDual(pilot.groups(8), at_least(pilot.base + 0.1).resolve(pilot))
    rows = Rows.of(dual)
    found = reach(dual, rows, np.zeros(3), rows.bound, np.zeros((1, 3)), limit=1.0)
    assert found.distance == pytest.approx(1.0, abs=1e-12)


def test_sentences_read_well():
    pilot = PilotSet(np.arange(4.0)[None, :, None] * [1.0, -1.0], ("harmless", "words"))
    one = solve(Palette({"harmless": {"at_least": 4}}), pilot, 4).certificate
    assert one.sentence == (
        "no choice among 4 candidates gives more than 3 of harmless; the palette asks for 4"
    )
    low = solve(Palette({"words": {"at_most": -3.5}}), pilot, 4).certificate
    assert low.sentence == (
        "no choice among 4 candidates gives less than -3 of words; the palette asks for -3.5"
    )
    two = {"harmless": {"at_least": 2.0}, "words": {"at_least": -1}}
    both = solve(Palette(two), pilot, 4).certificate
    assert both.sentence == (
        "no choice among 4 candidates gives more than 0 of 0.5·harmless + 0.5·words; the palette "
        "asks for 0.5"
    )
    near = solve(Palette({"harmless": {"at_least": 3.000001}}), pilot, np.inf).certificate
    assert near.sentence == (
        "no choice among all answers gives more than 3 of harmless; the palette asks for 3.000001"
    )
    single = solve(Palette({"harmless": {"at_least": 2}}), pilot, 1).certificate
    assert "among 1 candidate gives more than 1.5 of" in single.sentence
