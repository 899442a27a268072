"""Texts to numbers: reward models, counts and likelihoods, batched across requests on one device.

>>> from pathlib import Path
>>> from rewards import Sample, load_rewards
>>> with load_rewards(Path("rewards.yaml")) as suite:  # doctest: +SKIP
...     suite.score_sync([Sample(({"role": "user", "content": "Hi"},), "Hello!")])

Importing this package loads no torch; starting a suite does, where a model needs it.
"""

from __future__ import annotations

from rewards.base import Judge, Judgement, Message, Sample, Value
from rewards.errors import (
    RewardConfigError,
    RewardError,
    RewardModelError,
    RewardQueueFullError,
    ScoringError,
)
from rewards.judging import Asked
from rewards.registry import load_rewards
from rewards.suite import RewardSuite

__all__ = [
    "Asked",
    "Judge",
    "Judgement",
    "Message",
    "RewardConfigError",
    "RewardError",
    "RewardModelError",
    "RewardQueueFullError",
    "RewardSuite",
    "Sample",
    "ScoringError",
    "Value",
    "load_rewards",
]
