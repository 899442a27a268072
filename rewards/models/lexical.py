"""Counts over an answer's text: no model, microseconds, the same everywhere."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import regex
from typing_extensions import override

from rewards.base import DirectScorer, FloatArray, Sample
from rewards.config import LexicalConfig
from rewards.templates import parse

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


def count_characters(text: str) -> float:
    """Return the number of code points, in normal form C, without white space at the ends."""
    return float(len(unicodedata.normalize("NFC", text.strip())))


# A sentence ends at . ! ? or an ellipsis before white space, with closing quotes and brackets; at
# the Chinese and Japanese marks; at an empty line; and where an item of a list or a heading starts.
_SENTENCE_END = re.compile(
    r"(?P<stop>(?<![.!?\u2026])[.!?\u2026]++[\"'\u2019\u201d)\]*_]{0,9}(?=\s|\Z))"
    r"|[\u3002\uff01\uff1f]+[\u300d\u300f\u201d\uff09]*"
    r"|\n[^\S\n]*(?=\n)"
    r"|\n[^\S\n]*(?=(?:[-*+\u2022]|#{1,6}|\d{1,3}[.)])[^\S\n])"
)
# Not the end of a sentence: a title or Latin abbreviation, an initial (but the word "I"), and the
# number of an item.
_NO_END = re.compile(
    r"(?:\b(?:mr|mrs|ms|dr|prof|st|jr|sr|vs|cf|fig|eq|e\.g|i\.e)|\b(?-i:[A-HJ-Z])"
    r"|^[^\S\n]{0,3}\d{1,3})\.\Z",
    re.I | re.M,
)
_LONGEST_NO_END = 8


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text, without blank ones; marks without a word join the last."""
    spans: list[tuple[int, int]] = []
    start = 0
    for end in [*_SENTENCE_END.finditer(text), None]:
        cut = end.end() if end is not None else len(text)
        is_stop = end is not None and end["stop"] is not None
        if is_stop and _NO_END.search(text, max(0, cut - _LONGEST_NO_END), cut):
            continue
        if _WORD.search(text, start, cut) is None and spans:
            spans[-1] = (spans[-1][0], cut)
        else:
            spans.append((start, cut))
        start = cut
    return [sentence for begin, end in spans if (sentence := text[begin:end].strip())]


def count_sentences(text: str) -> float:
    """Return the number of sentences that hold a word."""
    return float(sum(1 for sentence in split_sentences(text) if _WORD.search(sentence)))


_VOWELS = re.compile("[aeiouy]+")
# An e that is written and not spoken: asked, times, makes, while, lately, something.
_SILENT_E = re.compile(
    r"(?<=[^aeiouytd])ed$|(?<=[^aeiouylr])es?$(?<![csxzg]es)(?<!shes)(?<!ches)"
    r"|(?<=[aeiouy][lr])es?$|(?<=[a-z]{2}[^aeiouylst])e(?=less$|ful$|ness$|ment)"
    r"|(?<=[a-z]{2}[^aeiouy])e(?=ly$)"
    r"|(?<=^som)e(?=[bhotw])|(?<=^ev)e(?=ry)"
)
# Two vowels next to each other that are spoken apart, and syllables without a vowel: radio, video,
# value, doing, quiet, create, beyond, prism.
_HIATUS = re.compile(
    r"(?<![tcsgx])i(?=a|o|um|us)|(?<=[td])io(?!n|u)|(?<![qg])u(?=a|ou)|[aeou]ing|(?:s|th)ms?$"
    r"|i(?=et)|e(?=o(?!u|us|n$|ns$|ple))|(?<=cr)e(?=at(?!u))|(?<=^r)e(?=act)|[^aeiouy]y(?=[ao])"
)


def count_syllables(word: str) -> int:
    """Return the syllables of an English word in lower case, 1 at least.

    Groups of vowels, less the silent e, plus vowels spoken apart. Of the words of the Carnegie
    Mellon pronouncing dictionary (1.1.3) 92 per cent get the count of one of their
    pronunciations, and of running prose 99 per cent. A digit counts one.
    """
    groups = len(_VOWELS.findall(_SILENT_E.sub("", word))) + len(_HIATUS.findall(word))
    return max(1, groups + sum(map(str.isdigit, word)))


def flesch_reading_ease(text: str) -> float:
    """Return how easily English reads: about 100 for very easy, 0 and less for very hard.

    A text without words has 0. Other languages get a number that means nothing.

    Notes
    -----
    206.835 - 1.015 words per sentence - 84.6 syllables per word. Flesch, Journal of Applied
    Psychology 32(3), 1948, pp. 221-233.
    """
    tokens = words(text)
    if not tokens:
        return 0.0
    per_sentence = len(tokens) / count_sentences(text)
    syllables = sum(map(count_syllables, tokens))
    return 206.835 - 1.015 * per_sentence - 84.6 * syllables / len(tokens)


# Words, marks and the two halves of a contraction (do n't, it 's), as the Penn Treebank has them.
_TREEBANK = regex.compile(
    r"\w+?(?=n['\u2019]t\b)|n['\u2019]t\b|['\u2019](?:s|m|d|ll|re|ve)\b|\w+(?:[-.,:/]\w+)*"
    r"|\.{2,}|--+|``|''|[^\w\s]",
    regex.I,
)


def n_gram_diversity(text: str) -> float:
    """Return the diversity of MAP, in [0, 1): the share of distinct 2-, 3- and 4-grams, multiplied.

    Each share is distinct n-grams / (n-grams + 1), so a text that never repeats stays below 1, and
    one of fewer than four tokens has 0. Marks are tokens and case counts. MAP reads the prompt
    with the answer: ``text: "{prompt}{answer}"``.

    Notes
    -----
    The code of MAP, arXiv 2410.19198; the product is that of Su et al., arXiv 2202.06417, eq. (9),
    over n-grams + 1.
    """
    tokens = _TREEBANK.findall(text)
    return math.prod(len(set(grams)) / (len(grams) + 1) for grams in map(_grams(tokens), (2, 3, 4)))


def repetition(text: str) -> float:
    """Return the share of 4-grams of words that stood before, in [0, 1); 0 below four words.

    Notes
    -----
    seq-rep-4 of Welleck et al., Neural Text Generation with Unlikelihood Training, arXiv
    1908.04319, section 6.
    """
    grams = _grams(words(text))(4)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _grams(tokens: Sequence[str]) -> Callable[[int], list[tuple[str, ...]]]:
    """Return the function that gives all n-grams of these tokens."""
    return lambda n: list(zip(*(tokens[start:] for start in range(n)), strict=False))


MEASURES: dict[str, Callable[[str], float]] = {
    "words": count_words,
    "lexical_diversity": lexical_diversity,
    "characters": count_characters,
    "sentences": count_sentences,
    "flesch_reading_ease": flesch_reading_ease,
    "diversity": n_gram_diversity,
    "repetition": repetition,
}


class LexicalScorer(DirectScorer):
    """One measure of the answer's text."""

    # Raise it when a measure changes, so that calibrations made with the old one no longer fit.
    VERSION = 1

    def __init__(self, name: str, values: Sequence[str], config: LexicalConfig) -> None:
        super().__init__(name, values)
        self._config = config
        self._text = parse(config.text)

    @override
    def identity(self, output: str) -> dict[str, object]:
        return {**self._config.model_dump(), "version": self.VERSION, "window": WINDOW}

    @override
    def score(self, samples: Sequence[Sample]) -> FloatArray:
        measure = MEASURES[self._config.measure]
        texts = (self._text.render(sample)[0] for sample in samples)
        return np.array([measure(text) for text in texts], dtype=np.float64)
