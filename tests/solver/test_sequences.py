import json
import math

import numpy as np
import pytest

from solver import Palette, PaletteError, PilotSet, SolverError, Status, UnknownValueError, solve
from solver.sequences import sequential
from tests.solver.problems import at_least, gaussian_pilot, names
from tests.solver.test_published import hhh

N = 8


def all_kinds(pilot):
    """Every kind of target, some of them slack at the solution."""
    base, unit = pilot.base, pilot.scale
    return Palette(
        {
            "v0": {"gain": 0.3},
            "v1": {"at_most": float(base[1] - 0.2 * unit[1])},
            "v2": {"between": [float(base[2] + 0.1 * unit[2]), float(base[2] + 0.2 * unit[2])]},
            "v3": "keep",
            "v4": {"multiplier": 0.1},
        }
    )


def dual_value(rewards, multipliers, lower, upper):
    """g_N, written the plain way."""
    scores = rewards @ multipliers
    top = scores.max(axis=1)
    log_z = top + np.log(np.exp(scores - top[:, None]).mean(axis=1))
    below = np.where(multipliers < 0, upper, 0.0)
    return multipliers @ np.where(multipliers > 0, lower, below) - log_z.mean()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("candidates", [N, math.inf])
def test_the_cycles_end_at_the_joint_solution(seed, candidates):
    pilot = gaussian_pilot(seed, n_values=5, correlation=0.3)
    palette = all_kinds(pilot)
    joint = solve(palette, pilot, candidates)
    found = sequential(palette, pilot, candidates)
    solution = found.solution
    assert joint.status is solution.status is Status.OPTIMAL
    np.testing.assert_allclose(solution.multipliers, joint.multipliers, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(solution.expected, joint.expected, atol=1e-6)
    np.testing.assert_allclose([solution.kl, solution.ess], [joint.kl, joint.ess], rtol=1e-6)
    assert solution.kkt_residual <= 1e-8
    assert solution.iterations == len(found.steps)
    assert solution.targets == joint.targets
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("seed", range(3))
def test_each_step_is_exact_for_its_value_and_the_dual_never_falls(seed):
    pilot = gaussian_pilot(seed, n_values=3, correlation=0.4)
    goal = pilot.base + np.array([0.5, 0.3, 0.6]) * pilot.scale
    rewards = pilot.groups(N).rewards
    found = sequential(at_least(goal), pilot, N)
    duals = [step.dual for step in found.steps]
    assert np.diff([0.0, *duals]).min() >= -1e-12
    assert [step.value for step in found.steps[:4]] == ["v0", "v1", "v2", "v0"]
    assert [step.cycle for step in found.steps[:4]] == [1, 1, 1, 2]
    before = np.zeros(3)
    for step in found.steps:
        i = int(step.value[1])
        moved = np.flatnonzero(step.multipliers != before)
        assert set(moved) <= {i}
        # its own level is met, tightly unless the multiplier is 0
        miss = (goal[i] - step.expected[i]) / pilot.scale[i]
        assert miss <= 1e-8
        assert abs(miss) <= 1e-8 or step.multipliers[i] == 0.0
        # the joint residual is what the values miss, plainly computed
        misses = (goal - step.expected) / pilot.scale
        tight = np.where(step.multipliers > 0, np.abs(misses), np.maximum(misses, 0.0))
        capped = np.where(misses < 0, np.minimum(tight, step.multipliers * pilot.scale), tight)
        np.testing.assert_allclose(step.kkt_residual, capped.max(), atol=1e-9)
        plain = dual_value(rewards, step.multipliers, goal, np.full(3, np.inf))
        np.testing.assert_allclose(step.dual, plain, atol=1e-9)
        before = step.multipliers


def test_a_multiplier_may_fall_back_to_0():
    """v1 is v0 with noise: once v1 is met, v0 asks for nothing by itself."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(30, 16))
    rewards = np.stack([shared, 0.6 * shared + 0.8 * rng.normal(size=shared.shape)], axis=-1)
    pilot = PilotSet(rewards, names(2))
    found = sequential(at_least(pilot.base + np.array([0.2, 0.6])), pilot, N)
    assert found.steps[0].multipliers[0] > 0.1
    assert found.solution.status is Status.OPTIMAL
    assert found.solution.multipliers[0] == 0.0


def test_pooled_answers_without_limit():
    rng = np.random.default_rng(1)
    mix = np.array([[1.0, 0.3, -0.2], [0.0, 1.0, 0.4], [0.0, 0.0, 1.0]])
    pilot = PilotSet(rng.normal(size=(600, 3)) @ mix, names(3), pooled=True)
    palette = Palette({name: {"quantile": 0.6} for name in pilot.values})
    joint = solve(palette, pilot, math.inf)
    found = sequential(palette, pilot, math.inf)
    assert found.solution.status is Status.OPTIMAL
    np.testing.assert_allclose(found.solution.multipliers, joint.multipliers, rtol=1e-6)


@pytest.mark.parametrize(("q", "bounds"), [(0.6, (0.3, 0.01)), (0.7, (0.3, 0.01))])
def test_one_round_is_not_enough_and_five_are_close(published_pilot, q, bounds):
    """MAP, Theorem 5, on the authors' answers: relative distance of λ after rounds 1 and 5."""
    palette = hhh(published_pilot, q)
    joint = solve(palette, published_pilot, math.inf).multipliers
    found = sequential(palette, published_pilot, math.inf)
    assert found.solution.status is Status.OPTIMAL
    np.testing.assert_allclose(found.solution.multipliers, joint, rtol=1e-6, atol=1e-7)
    last = {step.cycle: step.multipliers for step in found.steps}
    distance = {
        cycle: np.linalg.norm(multipliers - joint) / np.linalg.norm(joint)
        for cycle, multipliers in last.items()
    }
    assert distance[1] > bounds[0]
    assert distance[5] < bounds[1]
    assert all(distance[c + 1] < 0.5 * distance[c] for c in range(1, 8))  # linear, and quick


def test_a_value_is_added_to_a_running_palette():
    pilot = gaussian_pilot(0, n_values=3, correlation=0.3)
    first = Palette({"v0": {"gain": 0.4}, "v1": {"gain": 0.3}})
    running = solve(first, pilot, N)
    wider = Palette(dict(first.targets) | {"v2": {"gain": 0.3}})
    found = sequential(wider, pilot, N, start=running)
    assert found.steps[0].value == "v2"
    np.testing.assert_array_equal(found.steps[0].multipliers[:2], running.multipliers[:2])
    joint = solve(wider, pilot, N)
    np.testing.assert_allclose(found.solution.multipliers, joint.multipliers, rtol=1e-6)
    anew = sequential(wider, pilot, N)
    assert len(found.steps) < len(anew.steps)
    # what already meets the palette needs no step
    done = sequential(wider, pilot, N, start=joint)
    assert done.steps == ()
    assert done.cycles == 0
    assert done.solution.status is Status.OPTIMAL
    np.testing.assert_array_equal(done.solution.multipliers, joint.multipliers)


def test_a_running_palette_of_fewer_measured_values_is_taken_over_by_name():
    pilot = gaussian_pilot(0, n_values=3)
    fewer = PilotSet(np.array(pilot.rewards[..., [1, 0]]), ("v1", "v0"))
    running = solve(Palette({"v1": {"gain": 0.4}, "v0": {"gain": 0.2}}), fewer, N)
    wider = Palette({"v1": {"gain": 0.4}, "v2": {"gain": 0.3}})  # and v0 is let go
    first = sequential(wider, pilot, N, start=running).steps[0]
    assert first.value == "v2"
    assert first.multipliers[1] == pytest.approx(running.multipliers[0], rel=1e-12)
    assert first.multipliers[0] == 0.0
    with pytest.raises(SolverError, match="'v2'"):
        sequential(
            Palette({"v1": {"gain": 0.4}}), fewer, N,
            start=solve(Palette({"v2": {"gain": 0.3}}), pilot, N),
        )  # fmt: skip


def test_a_start_on_the_wrong_side_is_not_taken_over():
    pilot = gaussian_pilot(0)
    more = solve(Palette({"v0": {"gain": 0.4}}), pilot, N)
    less = Palette({"v0": {"at_most": float(pilot.base[0]) - 0.1}, "v1": {"gain": 0.2}})
    found = sequential(less, pilot, N, start=more, order=["v1"])
    assert found.steps[0].multipliers[0] == 0.0
    np.testing.assert_allclose(
        found.solution.multipliers, solve(less, pilot, N).multipliers, rtol=1e-6
    )


def test_the_order_is_kept_and_does_not_change_the_end():
    pilot = gaussian_pilot(2, correlation=0.4)
    palette = at_least(pilot.base + 0.3 * pilot.scale)
    found = sequential(palette, pilot, N, order=["v2", "v0"])
    assert [step.value for step in found.steps[:3]] == ["v2", "v0", "v1"]
    np.testing.assert_allclose(
        found.solution.multipliers, sequential(palette, pilot, N).solution.multipliers, rtol=1e-6
    )


def test_a_value_out_of_reach_by_itself_ends_it_with_its_proof():
    pilot = gaussian_pilot(0)
    goal = pilot.base + np.array([0.2, 5.0, 0.2]) * pilot.scale
    found = sequential(at_least(goal), pilot, N)
    assert found.solution.status is Status.INFEASIBLE
    proof = found.solution.certificate
    assert dict(proof.direction) == {"v1": 1.0}
    top = pilot.groups(N).rewards[..., 1].max(axis=1).mean()
    np.testing.assert_allclose([proof.asked, proof.limit], [goal[1], top])
    assert [step.value for step in found.steps] == ["v0"]


def test_values_out_of_reach_together_are_proven_so():
    pilot = gaussian_pilot(0, correlation=-0.3)
    palette = at_least(pilot.base + 1.1 * pilot.scale)
    for name in pilot.values:
        assert solve(Palette({name: {"gain": 1.1}}), pilot, N).status is Status.OPTIMAL
    found = sequential(palette, pilot, N)
    assert found.solution.status is Status.INFEASIBLE
    proof = found.solution.certificate
    assert len(proof.direction) > 1
    rewards = pilot.groups(N).rewards
    direction = np.array([proof.direction.get(name, 0.0) for name in pilot.values])
    best = (rewards @ direction).max(axis=1).mean()
    assert direction @ (pilot.base + 1.1 * pilot.scale) > best
    assert found.cycles < 50


def test_too_few_cycles_are_said_to_be_too_few():
    pilot = gaussian_pilot(0, correlation=0.5)
    palette = at_least(pilot.base + 0.4 * pilot.scale)
    found = sequential(palette, pilot, N, max_cycles=2)
    assert found.cycles == 2
    assert found.solution.status is Status.STEP_LIMIT
    assert found.solution.kkt_residual == found.steps[-1].kkt_residual > 1e-8
    np.testing.assert_array_equal(found.solution.multipliers, found.steps[-1].multipliers)
    np.testing.assert_array_equal(found.solution.expected, found.steps[-1].expected)
    rough = sequential(palette, pilot, N, tol=1e-3)
    assert rough.solution.status is Status.OPTIMAL
    assert 1e-8 < rough.solution.kkt_residual <= 1e-3


def test_the_very_limit_is_called_so():
    pilot = gaussian_pilot(0)
    top = pilot.groups(N).rewards[..., 0].max(axis=1).mean()
    found = sequential(at_least([top]), pilot, N)
    assert found.solution.status is Status.BOUNDARY


def test_floors_and_given_multipliers_stay():
    pilot = gaussian_pilot(0)
    palette = Palette(
        {"v0": {"gain": 0.3}, "v1": {"multiplier": 0.2}, "v2": {"gain": 0.2}},
        floors={"v1": float(pilot.base[1]) - 3.0},
    )
    joint = solve(palette, pilot, N)
    found = sequential(palette, pilot, N)
    assert all(step.multipliers[1] == 0.2 for step in found.steps)
    np.testing.assert_allclose(found.solution.multipliers, joint.multipliers, rtol=1e-6)
    given = sequential(Palette({"v1": {"multiplier": 0.2}}), pilot, N)
    assert given.steps == ()
    assert given.solution.status is Status.OPTIMAL
    nobody = sequential(Palette({"v0": {"gain": 0.1}}, floors={"v0": 1e9}), pilot, N)
    assert nobody.solution.status is Status.INFEASIBLE
    assert nobody.steps == ()


def test_mistakes_are_named():
    pilot = gaussian_pilot(0)
    palette = at_least(pilot.base)
    with pytest.raises(PaletteError, match="max_cycles"):
        sequential(palette, pilot, N, max_cycles=0)
    for tol in (0.0, 1e-12, math.nan):
        with pytest.raises(PaletteError, match="tol"):
            sequential(palette, pilot, N, tol=tol)
    with pytest.raises(PaletteError, match="twice"):
        sequential(palette, pilot, N, order=["v0", "v0"])
    with pytest.raises(UnknownValueError, match="Did you mean") as caught:
        sequential(palette, pilot, N, order=["v7"])
    assert caught.value.param == "order"
