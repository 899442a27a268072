from __future__ import annotations

import time
import typing

import numpy as np
import pytest

from rewards import Sample
from rewards.config import LexicalConfig
from rewards.models.lexical import (
    MEASURES,
    WINDOW,
    LexicalScorer,
    count_syllables,
    lexical_diversity,
    split_sentences,
    words,
)


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


def measured(measure, text):
    scorer = LexicalScorer("m", ["m"], LexicalConfig(kind="lexical", measure=measure))
    return scorer.score([Sample(({"role": "user", "content": "long question"},), text)]).item()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", 0), (" \n", 0), (" a b\n", 3), ("e\u0301", 1), ("\u00e9", 1), ("我爱你。", 4), ("😀", 1)],
)
def test_characters(text, expected):
    assert measured("characters", text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n\n ", []),
        ("No end", ["No end"]),
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("Wait... what?!", ["Wait...", "what?!"]),
        ("Well\u2026 yes.", ["Well\u2026", "yes."]),
        ("She said \u201cgo.\u201d He went.", ["She said \u201cgo.\u201d", "He went."]),
        ("It is 3.14 or v1.2.", ["It is 3.14 or v1.2."]),
        ("Dr. Smith met J. Doe, e.g. here.", ["Dr. Smith met J. Doe, e.g. here."]),
        ("So do I. We agree.", ["So do I.", "We agree."]),
        ("我爱你。你呢？好！", ["我爱你。", "你呢？", "好！"]),
        ("List:\n- one\n* two\n  3. three\n12) four", None),
        ("1. one. Two", ["1. one.", "Two"]),
        ("Title\n \nwrapped\nline", ["Title", "wrapped\nline"]),
        ("Great. 😀", ["Great. 😀"]),
        ("😀 :)", ["😀 :)"]),
        ("--- Yes. --- !!! ...", ["--- Yes. --- !!! ..."]),
    ],
)
def test_sentences(text, expected):
    expected = expected or ["List:", "- one", "* two", "3. three", "12) four"] * bool(text.strip())
    assert split_sentences(text) == expected
    n_with_words = sum(bool(words(sentence)) for sentence in expected)
    assert measured("sentences", text) == n_with_words


@pytest.mark.parametrize(
    ("syllables", "examples"),
    [
        (1, "a the make asked times whole served strength queue through hmm x's 7"),
        (2, "people something lately doing quiet value table wanted boxes create prism 42"),
        (3, "beautiful radio video everything example completely syllable 365"),
        (4, "information dictionary everybody"),
        (5, "university imagination"),
    ],
)
def test_syllables(syllables, examples):
    counts = {word: count_syllables(word) for word in examples.split()}
    assert counts == dict.fromkeys(examples.split(), syllables)


def test_reading_ease():
    # counted by hand: 6 words, 1 sentence, 6 syllables
    assert measured("flesch_reading_ease", "The cat sat on the mat.") == pytest.approx(
        206.835 - 1.015 * 6 - 84.6
    )
    text = "The university examined information. Everybody made a beautiful table, so we asked."
    assert len(words(text)) == 12
    syllables = 1 + 5 + 3 + 4 + 4 + 1 + 1 + 3 + 2 + 1 + 1 + 1
    assert measured("flesch_reading_ease", text) == pytest.approx(
        206.835 - 1.015 * 12 / 2 - 84.6 * syllables / 12
    )
    assert measured("flesch_reading_ease", "") == measured("flesch_reading_ease", "?!") == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("a b c", 0),
        ("a b c d", 3 / 4 * 2 / 3 * 1 / 2),
        ("a b a b a b", 2 / 6 * 2 / 5 * 2 / 4),
        ("A b a b", 3 / 4 * 2 / 3 * 1 / 2),
        # marks and halves of contractions are tokens: It 's n't ... as NLTK has them
        ("I don't.", 3 / 4 * 2 / 3 * 1 / 2),
        ("It's a well-known, 3.5 !", 6 / 7 * 5 / 6 * 4 / 5),
        ("no " * 100, 1 / 100 * 1 / 99 * 1 / 98),
        ("हिन्दी में है जी", 3 / 4 * 2 / 3 * 1 / 2),
    ],
)
def test_diversity_of_map(text, expected):
    assert measured("diversity", text) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("a b c", 0),
        ("a b c d", 0),
        ("a, b! C d a b c d", 1 / 5),
        ("no " * 100, 96 / 97),
        ("我爱你我爱你我爱你", 3 / 6),
    ],
)
def test_repetition(text, expected):
    assert measured("repetition", text) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("measure", MEASURES)
def test_every_measure_of_every_text_is_finite_and_takes_bounded_time(measure):
    # what is slow here: marks without words, list items, ideographs, one word without end
    for unit in (
        "word ",
        "! ",
        "\n- ",
        "\n",
        "我",
        "e",
        "1. ",
        "a.",
        ".",
        "' ",
        "n't",
        "😀",
        "\u0301",
    ):
        text = unit * (200_000 // len(unit)) + "x"
        start = time.perf_counter()
        assert np.isfinite(measured(measure, text))
        # tens of milliseconds; a square of the length takes minutes
        assert time.perf_counter() - start < 20


def test_every_measure_of_the_file_is_there_and_has_its_own_identity():
    names = typing.get_args(LexicalConfig.model_fields["measure"].annotation)
    assert set(names) == set(MEASURES)
    identities = [
        str(LexicalScorer("m", [], LexicalConfig(kind="lexical", measure=name)).identity("score"))
        for name in names
    ]
    assert len(set(identities)) == len(names)
