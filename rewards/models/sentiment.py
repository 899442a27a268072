"""Mood of an answer by the VADER lexicon: no model, under a millisecond, English."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from typing_extensions import override

from rewards.base import DirectScorer, FloatArray, Sample
from rewards.errors import RewardModelError
from rewards.models.lexical import split_sentences

if TYPE_CHECKING:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

# VADER's time grows with the square of a text's length; what has no sentence ends is cut.
MAX_CHARACTERS = 1000


class VaderScorer(DirectScorer):
    """Mean of VADER's compound score over the answer's sentences, in [-1, 1].

    Over sentences, as its authors do with longer texts: the compound of a whole answer comes close
    to -1 or 1 whatever it says, and takes time with the square of its length. An answer without
    words, marks or emoji has 0, and so has one in a language that the lexicon does not know.

    Notes
    -----
    Hutto and Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
    Text, ICWSM 2014.
    """

    # Raise it when the splitting changes, so that calibrations made with the old no longer fit.
    VERSION = 1

    _analyzer: SentimentIntensityAnalyzer

    def __init__(self, name: str, values: Sequence[str]) -> None:
        super().__init__(name, values)
        self._lexicon = ""

    @override
    def load(self, device: str) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            problem = (
                f"it cannot be imported ({error}); install it with "
                "pip install 'palette-server[sentiment]', or leave this value out"
            )
            raise RewardModelError(self.name, self.values, "vaderSentiment", problem) from error
        self._analyzer = SentimentIntensityAnalyzer()
        tables = f"{self._analyzer.lexicon_full_filepath}\0{self._analyzer.emoji_full_filepath}"
        self._lexicon = hashlib.sha256(tables.encode()).hexdigest()

    @override
    def identity(self, output: str) -> dict[str, object]:
        return {
            "kind": "vader",
            "version": self.VERSION,
            "package": importlib.metadata.version("vaderSentiment"),
            "lexicon": self._lexicon,
            "max_characters": MAX_CHARACTERS,
        }

    @override
    def score(self, samples: Sequence[Sample]) -> FloatArray:
        return np.array([self._score(sample.answer) for sample in samples], dtype=np.float64)

    def _score(self, answer: str) -> float:
        compounds = [
            self._analyzer.polarity_scores(sentence[start : start + MAX_CHARACTERS])["compound"]
            for sentence in split_sentences(answer)
            for start in range(0, len(sentence), MAX_CHARACTERS)
        ]
        return sum(compounds) / len(compounds) if compounds else 0.0
