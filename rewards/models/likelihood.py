"""Log-likelihood of an answer under the model that wrote it: free, the sampler has computed it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from typing_extensions import override

from rewards.base import DirectScorer, FloatArray, Sample
from rewards.config import SamplerLogprobConfig
from rewards.errors import ScoringError


class SamplerLogprobScorer(DirectScorer):
    """Mean (nats per token) or sum (nats) of the sampler's token log-probabilities.

    An answer without tokens has 0: nothing in it was unlikely.
    """

    needs_logprobs = True

    def __init__(self, name: str, values: Sequence[str], config: SamplerLogprobConfig) -> None:
        super().__init__(name, values)
        self._config = config

    @override
    def identity(self, output: str) -> dict[str, object]:
        return dict(self._config.model_dump())

    @override
    def score(self, samples: Sequence[Sample]) -> FloatArray:
        return np.array([self._score(sample) for sample in samples], dtype=np.float64)

    def _score(self, sample: Sample) -> float:
        logprobs = sample.token_logprobs
        if logprobs is None:
            problem = (
                "it reads the sampler's token log-probabilities and this sample has none; use a "
                "backend that reports them, or leave this value out"
            )
            raise ScoringError(self.name, self.values, problem)
        total = math.fsum(logprobs)
        if not math.isfinite(total):
            problem = f"the sampler reported a token log-probability that is not finite ({total})"
            raise ScoringError(self.name, self.values, problem)
        if self._config.reduce == "sum" or not logprobs:
            return total
        return total / len(logprobs)
