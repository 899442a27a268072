from __future__ import annotations

import numpy as np
import pytest

from rewards import Sample
from rewards.config import LexicalConfig
from rewards.models.lexical import WINDOW, LexicalScorer, lexical_diversity, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n\t ...!?", []),
        ("Hello, World!", ["hello", "world"]),
        ("don't can\u2019t 'quoted'", ["don't", "can\u2019t", "quoted"]),
        ("well-known e.g. 3.14", ["well", "known", "e", "g", "3", "14"]),
        ("Über den Fluß", ["über", "den", "fluß"]),
        ("我爱你 yes", ["我", "爱", "你", "yes"]),
        ("это тест", ["это", "тест"]),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


def naive_diversity(text):
    tokens = words(text)
    width = min(WINDOW, len(tokens))
    windows = [tokens[i : i + width] for i in range(len(tokens) - width + 1)]
    return np.mean([len(set(window)) / width for window in windows])


@pytest.mark.parametrize("n_words", [1, 2, 24, 25, 26, 60, 400])
def test_diversity_is_the_mean_over_all_windows(n_words):
    rng = np.random.default_rng(n_words)
    text = " ".join(rng.choice(list("abcdefghijklmnopq"), n_words))
    np.testing.assert_allclose(lexical_diversity(text), naive_diversity(text), rtol=1e-12)


def test_diversity_at_its_ends():
    assert lexical_diversity("") == 0.0
    assert lexical_diversity("...") == 0.0
    assert lexical_diversity("No.") == 1.0
    assert lexical_diversity(" ".join(f"w{i}" for i in range(300))) == 1.0
    assert lexical_diversity("no " * 300) == 1 / WINDOW


def test_diversity_does_not_fall_with_length():
    rng = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(200)]
    short, long = (
        np.mean([lexical_diversity(" ".join(rng.choice(vocabulary, n))) for _ in range(100)])
        for n in (30, 1000)
    )
    # same words, same chances: equal but for noise, where a plain ratio falls from .93 to .2
    assert abs(short - long) < 0.02


def test_scores_of_the_answer_alone():
    samples = [Sample(({"role": "user", "content": "long question here"},), t) for t in ("a b", "")]
    scorer = LexicalScorer("w", ["w"], LexicalConfig(kind="lexical", measure="words"))
    np.testing.assert_array_equal(scorer.score(samples), [2.0, 0.0])
