"""Texts of many lengths, and batches of them at random: scores must be those of each text alone."""

from __future__ import annotations

import numpy as np

from rewards import Sample
from rewards.base import as_rows
from tests.rewards.tiny import LETTERS


def words(rng, n):
    return " ".join("".join(rng.choice(list(LETTERS), rng.integers(1, 7))) for _ in range(n))


def samples(seed=0, n=24, longest=40):
    rng = np.random.default_rng(seed)
    return [
        Sample(
            (
                {"role": "user", "content": "an earlier turn"},
                {"role": "assistant", "content": "an earlier answer"},
                {"role": "user", "content": words(rng, rng.integers(1, 12))},
            ),
            words(rng, rng.integers(1, longest)),
        )
        for _ in range(n)
    ]


def compositions(n, seed):
    """Cut n inputs into batches at random, in random order."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    cuts = np.sort(rng.choice(np.arange(1, n), 5, replace=False))
    return np.split(order, cuts)


def assert_batches_agree(scorer, wanted, expected, tolerance=1e-5):
    inputs = scorer.encode([scorer.render(sample) for sample in wanted])
    assert max(map(len, inputs)) <= scorer.max_length
    for seed in range(3):
        for rows in compositions(len(wanted), seed):
            given = scorer.forward([inputs[row] for row in rows])
            scores = as_rows(given, len(rows), 1)[:, 0]
            # float32 sums in another order; the scores are of order 1
            np.testing.assert_allclose(scores, expected[rows], rtol=1e-5, atol=tolerance)
    assert np.ptp(expected) > 0.1, "these texts are too alike to tell anything"
