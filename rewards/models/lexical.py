"""Counts over the words of an answer: no model, microseconds, the same everywhere."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from typing_extensions import override

from rewards.base import DirectScorer, FloatArray, Sample
from rewards.config import LexicalConfig

# Chinese and Japanese do not put spaces between words: each character counts as one.
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+(?:['\u2019][^\W{_IDEOGRAPHS}]+)*")

# Moving windows of this many words; Covington and McFall use 50 for prose and smaller ones for
# short texts, and answers are short.
WINDOW = 25


def words(text: str) -> list[str]:
    """Return the words of a text, in lower case, without punctuation; ``don't`` is one word."""
    return _WORD.findall(text.lower())


def count_words(text: str) -> float:
    """Return the number of words."""
    return float(len(words(text)))


def lexical_diversity(text: str) -> float:
    """Return the moving-average type-token ratio, in [0, 1].

    The share of distinct words in a window of `WINDOW` words, averaged over all windows. A plain
    ratio over the whole text falls with its length; this one does not. Texts shorter than the
    window have their plain ratio; a text without words has 0.

    Notes
    -----
    MATTR: Covington and McFall, Journal of Quantitative Linguistics 17(2), 2010, pp. 94-100.
    """
    tokens = words(text)
    if not tokens:
        return 0.0
    width = min(WINDOW, len(tokens))
    counts = Counter(tokens[:width])
    total = len(counts)
    for leaving, entering in zip(tokens, tokens[width:], strict=False):
        counts[entering] += 1
        counts[leaving] -= 1
        if not counts[leaving]:
            del counts[leaving]
        total += len(counts)
    return total / (width * (len(tokens) - width + 1))


MEASURES: dict[str, Callable[[str], float]] = {
    "words": count_words,
    "lexical_diversity": lexical_diversity,
}


class LexicalScorer(DirectScorer):
    """One measure of the answer's words."""

    # Raise it when a measure changes, so that calibrations made with the old one no longer fit.
    VERSION = 1

    def __init__(self, name: str, values: Sequence[str], config: LexicalConfig) -> None:
        super().__init__(name, values)
        self._config = config

    @override
    def identity(self) -> dict[str, object]:
        return {**self._config.model_dump(), "version": self.VERSION, "window": WINDOW}

    @override
    def score(self, samples: Sequence[Sample]) -> FloatArray:
        measure = MEASURES[self._config.measure]
        return np.array([measure(sample.answer) for sample in samples], dtype=np.float64)
