"""Diversity, by hand and against the definition written out."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from server.evaluation.texts import distinct, diversity, self_bleu


def grams(text, n):
    return Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))


def bleu(text, others):
    """BLEU-4 of one sentence as sacrebleu computes it, from the definition."""
    logs, n_missing = [], 0
    for n in (1, 2, 3, 4):
        own = grams(text, n)
        if not own:
            break
        clips = [grams(other, n) for other in others]
        matches = sum(min(count, max(c[g] for c in clips)) for g, count in own.items())
        if matches:
            logs.append(math.log(matches / own.total()))
        else:
            n_missing += 1
            logs.append(math.log(1 / (2**n_missing * own.total())))
    if n_missing == len(logs):
        return 0.0
    closest = min((len(other) for other in others), key=lambda n: (abs(n - len(text)), n))
    return math.exp(min(0.0, 1 - closest / len(text)) + sum(logs) / len(logs))


def test_self_bleu_is_the_definition():
    rng = random.Random(0)
    for _ in range(50):
        texts = [
            [rng.choice("abcdefgh"[: rng.randint(2, 8)]) for _ in range(rng.randint(1, 12))]
            for _ in range(rng.randint(2, 10))
        ]
        wanted = [bleu(text, texts[:i] + texts[i + 1 :]) for i, text in enumerate(texts)]
        assert self_bleu(texts) == pytest.approx(sum(wanted) / len(texts), rel=1e-12)


def test_self_bleu_by_hand():
    same = ["the", "cat", "sat", "on", "the", "mat"]
    assert self_bleu([same, same, same]) == pytest.approx(1.0)
    assert self_bleu([["one", "two", "three"], ["four", "five", "six"]]) == 0.0
    assert self_bleu([same]) is None
    assert self_bleu([same, []]) is None


def test_distinct_by_hand():
    texts = [["a", "b", "a", "b"], ["a", "b"]]
    assert distinct(texts, 1) == 2 / 6
    assert distinct(texts, 2) == 2 / 4  # ab, ba of ab, ba, ab, ab
    assert distinct([["a"]], 2) is None


def test_diversity_reads_words():
    found = diversity(["The cat, the CAT.", "A dog!"])
    assert found["distinct_1"] == 4 / 6
    assert set(found) == {"distinct_1", "distinct_2", "self_bleu"}
    assert diversity([]) == {"distinct_1": None, "distinct_2": None, "self_bleu": None}
