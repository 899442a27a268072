"""A value in one sentence: the chat model says yes or no, and how sure it is is the reward."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from typing_extensions import override

from rewards.base import Judged, JudgedScorer, Sample
from rewards.config import JudgeConfig
from rewards.errors import RewardModelError

_MODEL = "the chat model"


class JudgeScorer(JudgedScorer):
    """Log-odds of yes against no, in nats, for each of its questions.

    ``log p(yes) - log p(no)``, each summed over the words of the configuration, where p is the
    model's distribution of the first token of its reply to the question. Above 0 it means yes.
    """

    def __init__(self, name: str, values: Sequence[str], config: JudgeConfig) -> None:
        super().__init__(name, values)
        self.outputs = config.output_names
        self._config = config
        self._questions = config.put
        self._words = (config.yes_words, config.no_words)

    @override
    def identity(self, output: str) -> dict[str, object]:
        assert self.judge is not None  # loaded
        yes_words, no_words = self._words
        return {
            "kind": "judge",
            "asked": self._questions[self.outputs.index(output)],
            "yes_words": sorted(yes_words),
            "no_words": sorted(no_words),
            "model": self.judge.fingerprint,
        }

    @override
    def load(self, device: str) -> None:
        if self.judge is None:
            problem = (
                "there is no chat model to ask; judged values need one beside the rewards: use "
                "`palette serve`, `palette calibrate` or `palette score`, or call "
                "suite.use_judge(...) before the start"
            )
            raise RewardModelError(self.name, self.values, _MODEL, problem)
        try:
            self.judge.check_words(self._words)
        except ValueError as error:
            raise RewardModelError(self.name, self.values, _MODEL, str(error)) from error

    @override
    async def ask(self, sample: Sample) -> Judged:
        assert self.judge is not None  # loaded
        found = await self.judge.ask(sample, self._questions, self._words)
        logprobs = found.logprobs
        return Judged(
            scores=logprobs[:, 0] - logprobs[:, 1],
            mass=dict(zip(self.outputs, np.exp(logprobs).sum(axis=1).tolist(), strict=True)),
            n_tokens=found.n_tokens,
        )
