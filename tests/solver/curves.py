"""Curves of two values: their points by a plain linear programme, and what every curve fulfils."""

import numpy as np
from scipy import optimize, sparse

from solver import Palette, Status, solve

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
