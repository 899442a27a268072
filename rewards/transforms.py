"""From what is measured to what is aligned, with numbers fitted on a calibration. Pure numpy.

Order: sign (where the output is read), log-odds, length control, centring, clipping, shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rewards.base import FloatArray
from rewards.config.transforms import TransformConfig
from rewards.errors import RewardError

# The column of word counts, there where a length is controlled.
LENGTH = ".words"
# Probabilities are kept off 0 and 1 by this much: a rounded 1.0 is not certainty.
_SMALLEST_PROBABILITY = 1e-4
# Knots of a distribution function; between them it is interpolated.
_MOST_KNOTS = 4096


@dataclass(frozen=True, slots=True)
class FittedTransform:
    """The steps of one value with their numbers.

    Attributes
    ----------
    config : TransformConfig
    slope, mean_length : float
        Reward units per unit of log(1 + words), and the mean of that over the calibration.
    low, high : float
        Bounds of clipping.
    reference : float
        Zero of the log-sigmoid.
    knots, shares : ndarray, shape (n_knots,)
        The distribution function of the base model's rewards.
    """

    config: TransformConfig
    slope: float = 0.0
    mean_length: float = 0.0
    low: float = -np.inf
    high: float = np.inf
    reference: float = 0.0
    knots: FloatArray | None = None
    shares: FloatArray | None = None

    def __call__(self, rewards: FloatArray, lengths: FloatArray | None = None) -> FloatArray:
        """Return the aligned rewards.

        Parameters
        ----------
        rewards : ndarray, shape (..., n_candidates)
            The last axis holds candidates of one prompt.
        lengths : ndarray, same shape, or None
            log(1 + words) of each answer, where length is controlled.
        """
        return self._bend(self.straighten(rewards, lengths))

    def straighten(self, rewards: FloatArray, lengths: FloatArray | None = None) -> FloatArray:
        """Return the rewards before clipping and shape, as `__call__` takes them."""
        straight = self._odds(rewards)
        if self.config.length_control:
            if lengths is None:
                raise RewardError("length control needs the lengths of the answers")
            straight = straight - self.slope * (lengths - self.mean_length)
        if self.config.centre:
            straight = straight - straight.mean(axis=-1, keepdims=True)
        return straight

    def level(self, level: float) -> float:
        """Return the aligned level that stands for one in the value's own unit.

        With length control it is that of an answer of mean length; centred values count from the
        mean of the prompt's candidates, and so does a level of theirs.
        """
        return float(self._bend(self._odds(np.asarray(level, dtype=np.float64))))

    def _odds(self, rewards: FloatArray) -> FloatArray:
        if not self.config.log_odds:
            return rewards
        share = np.clip(rewards, _SMALLEST_PROBABILITY, 1 - _SMALLEST_PROBABILITY)
        return np.asarray(np.log(share) - np.log1p(-share))

    def _bend(self, rewards: FloatArray) -> FloatArray:
        clipped = np.clip(rewards, self.low, self.high)
        if self.config.shape == "log_sigmoid":
            return np.asarray(-np.logaddexp(0.0, self.reference - clipped))
        if self.knots is not None and self.shares is not None:
            return np.interp(clipped, self.knots, self.shares)
        return clipped


def fit(
    config: TransformConfig, rewards: FloatArray, lengths: FloatArray | None = None
) -> FittedTransform:
    """Return the transform with its numbers taken from a calibration.

    Parameters
    ----------
    config : TransformConfig
    rewards : ndarray, shape (n_prompts, n_candidates)
        Of the base model's answers, as measured.
    lengths : ndarray, same shape, or None
        log(1 + words), where length is controlled.

    Raises
    ------
    RewardError
        When log-odds are wanted of numbers that are no probabilities.
    """
    if config.log_odds and (rewards.min() < 0 or rewards.max() > 1):
        raise RewardError(
            f"log_odds wants probabilities, and these rewards go from {rewards.min():.4g} to "
            f"{rewards.max():.4g}; leave it out"
        )
    fitted = FittedTransform(config)
    if config.length_control and lengths is not None:
        plain = FittedTransform(TransformConfig(log_odds=config.log_odds)).straighten(rewards)
        slope = _slope_within(plain, lengths)
        fitted = replace(fitted, slope=slope, mean_length=float(lengths.mean()))
    straight = fitted.straighten(rewards, lengths)
    if config.clip is not None:
        reach = config.clip * float(np.sqrt(straight.var(axis=1).mean()))
        middle = float(straight.mean())
        fitted = replace(fitted, low=middle - reach, high=middle + reach)
    clipped = np.clip(straight, fitted.low, fitted.high)
    if config.shape == "quantile":
        knots, shares = _distribution(clipped)
        fitted = replace(fitted, knots=knots, shares=shares)
    elif config.shape == "log_sigmoid":
        good = np.quantile(clipped, config.reference, axis=1)
        fitted = replace(fitted, reference=float(good.mean()))
    return fitted


def fit_all(
    configs: Mapping[str, TransformConfig],
    rewards: FloatArray,
    columns: Sequence[str],
) -> dict[str, FittedTransform]:
    """Return the transform of each value that has one.

    Parameters
    ----------
    configs : mapping of str to TransformConfig
    rewards : ndarray, shape (n_prompts, n_candidates, n_columns)
    columns : sequence of str
        Names of the columns; `LENGTH` is among them where a length is controlled.

    Raises
    ------
    RewardError
        As `fit`, with the value's name.
    """
    lengths = None
    if LENGTH in columns:
        lengths = np.log1p(rewards[..., columns.index(LENGTH)])
    fitted = {}
    for name, config in configs.items():
        try:
            fitted[name] = fit(config, rewards[..., columns.index(name)], lengths)
        except RewardError as error:
            raise RewardError(f"transform of {name}: {error}") from error
    return fitted


def _slope_within(rewards: FloatArray, lengths: FloatArray) -> float:
    """Return the least-squares slope of rewards on lengths among answers to one prompt.

    Across prompts it would take out true effects of the question: Huang et al., Post-hoc Reward
    Calibration, ICLR 2025 (arXiv 2409.17407), with a line in place of their local regression.
    """
    spread = lengths - lengths.mean(axis=1, keepdims=True)
    total = float((spread**2).sum())
    return float((spread * rewards).sum()) / total if total > 0 else 0.0


def _distribution(rewards: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return knots of the mid-distribution function: P(X < r) + P(X = r) / 2."""
    values, counts = np.unique(rewards, return_counts=True)
    shares = (np.cumsum(counts) - counts / 2) / rewards.size
    if len(values) > _MOST_KNOTS:
        kept = np.unique(np.linspace(0, len(values) - 1, _MOST_KNOTS).astype(np.intp))
        values, shares = values[kept], shares[kept]
    return values, shares
