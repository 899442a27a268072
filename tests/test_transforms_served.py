"""What transforms do to the served dual: closed forms, and what leaves answers as they are."""

from __future__ import annotations

import math

import numpy as np
from numpy.testing import assert_allclose

from rewards.config import TransformConfig
from rewards.transforms import fit
from solver import Palette, PilotSet, Status, solve

RNG = np.random.default_rng(11)
# Scores of a Bradley-Terry model: an arbitrary offset for each prompt.
REWARDS = RNG.normal(size=(400, 16, 2)) + RNG.normal(0, 5, (400, 1, 1))


def test_centring_leaves_multipliers_as_they_are():
    centred = fit(TransformConfig(centre=True), REWARDS[..., 0])(REWARDS[..., 0])
    palette = Palette({"a": {"gain": 0.6}, "b": "keep"})
    plain = solve(palette, PilotSet(REWARDS, ["a", "b"]), 8)
    other = solve(palette, PilotSet(np.stack([centred, REWARDS[..., 1]], axis=2), ["a", "b"]), 8)
    assert plain.status is Status.OPTIMAL
    assert_allclose(other.multipliers, plain.multipliers, rtol=1e-6)
    assert_allclose(
        other.expected[0], plain.expected[0] - REWARDS[..., 0].mean(), rtol=1e-6, atol=1e-9
    )


def test_the_partition_of_quantiles_is_known_in_closed_form():
    # One prompt with many answers: quantiles are uniform, and E[q] = e^λ/(e^λ - 1) - 1/λ
    # (QRPO, arXiv 2507.08068).
    rewards = RNG.gamma(2.0, size=(1, 4000))
    shares = fit(TransformConfig(shape="quantile"), rewards)(rewards)
    pilot = PilotSet(shares[..., None], ["a"])
    for multiplier in (0.5, 2.0, 6.0):
        level = math.exp(multiplier) / math.expm1(multiplier) - 1 / multiplier
        solution = solve(Palette({"a": {"at_least": level}}), pilot, math.inf)
        assert_allclose(solution.multipliers, [multiplier], rtol=5e-3)
