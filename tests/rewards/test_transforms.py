"""Transforms: each step against its formula, the order, and what they leave alone."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.special import expit, logit

from rewards.config.transforms import TransformConfig
from rewards.errors import RewardError
from rewards.transforms import fit, fit_all

RNG = np.random.default_rng(5)
REWARDS = RNG.gamma(2.0, 1.5, (300, 16)) + RNG.normal(0, 3, (300, 1))
LENGTHS = np.log1p(RNG.integers(5, 200, (300, 16)))


def test_nothing_asked_nothing_done():
    np.testing.assert_array_equal(fit(TransformConfig(), REWARDS)(REWARDS), REWARDS)


def test_log_odds():
    shares = expit(RNG.normal(size=(50, 8)))
    fitted = fit(TransformConfig(log_odds=True), shares)
    np.testing.assert_allclose(fitted(shares), logit(shares), rtol=1e-9)
    np.testing.assert_allclose(fitted.level(0.9), logit(0.9))
    # Rounded to 1.0: far out, but no infinity.
    assert fitted(np.array([0.0, 1.0])).tolist() == pytest.approx([-9.2102, 9.2102], abs=1e-3)
    with pytest.raises(RewardError, match=r"log_odds wants probabilities, .* to 1\.5"):
        fit(TransformConfig(log_odds=True), np.array([[0.5, 1.5]]))


def test_length_control_takes_out_the_slope_within_prompts():
    # Long questions are hard: across prompts the slope has the other sign.
    between = -8.0 * LENGTHS.mean(axis=1, keepdims=True)
    noise = RNG.normal(size=LENGTHS.shape)
    rewards = 1.7 * LENGTHS + between + noise
    fitted = fit(TransformConfig(length_control=True), rewards, LENGTHS)
    assert fitted.slope == pytest.approx(1.7, abs=0.06)  # three standard errors
    controlled = fitted(rewards, LENGTHS)
    spread = LENGTHS - LENGTHS.mean(axis=1, keepdims=True)
    assert abs((spread * controlled).sum()) < 1e-8 * (spread**2).sum()
    # The base level stays, so that a level in the value's own unit keeps its meaning.
    assert controlled.mean() == pytest.approx(rewards.mean())
    assert fitted.level(3.0) == 3.0
    with pytest.raises(RewardError, match="needs the lengths"):
        fitted(rewards)


def test_length_control_without_different_lengths_does_nothing():
    same = np.ones_like(REWARDS)
    fitted = fit(TransformConfig(length_control=True), REWARDS, same)
    np.testing.assert_array_equal(fitted(REWARDS, same), REWARDS)


def test_centring_counts_from_the_prompts_own_mean():
    fitted = fit(TransformConfig(centre=True), REWARDS)
    np.testing.assert_allclose(fitted(REWARDS).mean(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(
        fitted(REWARDS[:3, :4]), REWARDS[:3, :4] - REWARDS[:3, :4].mean(1)[:, None]
    )


def test_clipping_at_standard_deviations_within_a_prompt():
    fitted = fit(TransformConfig(clip=1.5), REWARDS)
    reach = 1.5 * np.sqrt(REWARDS.var(axis=1).mean())
    expected = np.clip(REWARDS, REWARDS.mean() - reach, REWARDS.mean() + reach)
    np.testing.assert_allclose(fitted(REWARDS), expected)
    assert 0.05 < (expected != REWARDS).mean() < 0.95
    assert fitted.level(1e9) == pytest.approx(REWARDS.mean() + reach)


def test_log_sigmoid_around_what_is_good_already():
    fitted = fit(TransformConfig(shape="log_sigmoid", reference=0.7), REWARDS)
    good = np.quantile(REWARDS, 0.7, axis=1).mean()
    np.testing.assert_allclose(fitted(REWARDS), np.log(expit(REWARDS - good)), rtol=1e-9)
    assert fitted.level(good) == pytest.approx(np.log(0.5))
    assert np.isfinite(fitted(np.array([-1e6, 1e6]))).all()


def test_quantiles_of_the_base_model():
    fitted = fit(TransformConfig(shape="quantile"), REWARDS)
    shares = fitted(REWARDS)
    assert shares.mean() == pytest.approx(0.5, abs=1e-3)
    # Uniform under the base model: its moments, and so the log-partition, are known.
    assert shares.var() == pytest.approx(1 / 12, rel=1e-2)
    assert np.log(np.exp(2.0 * shares).mean()) == pytest.approx(
        np.log(np.expm1(2.0) / 2.0), abs=2e-3
    )
    assert (np.argsort(shares, axis=None) == np.argsort(REWARDS, axis=None)).mean() > 0.99
    below, above = fitted(np.array([-1e9, 1e9]))
    assert 0 < below < above < 1
    # Ties share the middle of their ranks.
    tied = fit(TransformConfig(shape="quantile"), np.array([[0.0, 0.0, 0.0, 1.0]]))
    assert tied(np.array([0.0, 1.0])).tolist() == [0.375, 0.875]


def test_many_distinct_rewards_are_interpolated():
    many = RNG.normal(size=(1000, 20))
    fitted = fit(TransformConfig(shape="quantile"), many)
    assert len(fitted.knots) <= 4096
    ranks = (np.argsort(np.argsort(many, axis=None)) + 0.5) / many.size
    np.testing.assert_allclose(fitted(many).ravel(), ranks, atol=1 / 4096)


def test_the_order_is_odds_length_clip_shape():
    shares = expit(RNG.normal(size=(200, 8)) + 0.3 * LENGTHS[:200, :8])
    config = TransformConfig(log_odds=True, length_control=True, clip=2.0, shape="log_sigmoid")
    lengths = LENGTHS[:200, :8]
    fitted = fit(config, shares, lengths)
    odds = logit(shares)
    spread = lengths - lengths.mean(axis=1, keepdims=True)
    slope = (spread * odds).sum() / (spread**2).sum()
    controlled = odds - slope * (lengths - lengths.mean())
    reach = 2 * np.sqrt(controlled.var(axis=1).mean())
    clipped = np.clip(controlled, controlled.mean() - reach, controlled.mean() + reach)
    good = np.quantile(clipped, 0.85, axis=1).mean()
    np.testing.assert_allclose(fitted(shares, lengths), np.log(expit(clipped - good)), rtol=1e-9)


def test_values_by_name():
    rewards = np.stack([REWARDS, expit(REWARDS), np.expm1(LENGTHS)], axis=2)
    configs = {"b": TransformConfig(log_odds=True), "a": TransformConfig(length_control=True)}
    fitted = fit_all(configs, rewards, ["a", "b", ".words"])
    assert list(fitted) == ["b", "a"]
    assert fitted["a"].slope == fit(configs["a"], REWARDS, LENGTHS).slope
    with pytest.raises(RewardError, match=r"transform of a: log_odds wants"):
        fit_all({"a": TransformConfig(log_odds=True)}, rewards, ["a", "b", ".words"])


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"centre": True, "clip": 2.0}, "would not be what is served"),
        ({"centre": True, "shape": "quantile"}, "would not be what is served"),
        ({"reference": 0.5}, "for shape: log_sigmoid only"),
        ({"reference": 0.5, "shape": "quantile"}, "for shape: log_sigmoid only"),
        ({"clip": 0}, "greater than 0"),
        ({"shape": "log_sigmoid", "reference": 1.0}, "less than 1"),
        ({"standardise": True}, "Extra inputs"),
    ],
)
def test_bad_settings(fields, problem):
    with pytest.raises(ValidationError, match=problem):
        TransformConfig(**fields)
