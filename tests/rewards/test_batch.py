from __future__ import annotations

import numpy as np
import pytest

from rewards.base import Rendered, Tokens
from rewards.batch import BatchLimits, Entry, EntryQueue, choose, pad
from tests.rewards.fakes import HeldScorer

LIMITS = BatchLimits(max_tokens=100, max_padding=20)


def entry(scorer, order, length):
    tokens = Tokens([1] * length, [0] * length)
    return Entry(scorer, b"", order, Rendered("", 0, 0), tokens)


@pytest.mark.parametrize("seed", range(20))
def test_every_entry_leaves_once_within_the_budget(seed):
    rng = np.random.default_rng(seed)
    scorers = [HeldScorer("a"), HeldScorer("b")]
    queue = EntryQueue()
    lengths = rng.integers(1, 60, 200)
    queue.add(entry(scorers[i % 2], i, int(length)) for i, length in enumerate(lengths))
    seen = []
    while batch := queue.take(lambda _: LIMITS):
        assert max(map(len, batch)) * len(batch) <= 100
        assert max(map(len, batch)) * len(batch) - sum(map(len, batch)) <= 20
        assert len({e.scorer.name for e in batch}) == 1
        left = set(range(200)) - set(seen)
        assert min(left) in {e.order for e in batch}, "the oldest entry goes first"
        seen += [e.order for e in batch]
    assert sorted(seen) == list(range(200))
    assert len(queue) == 0


def test_an_entry_longer_than_the_budget_goes_alone():
    assert choose([150, 150, 10], LIMITS) == [0]
    assert choose([10, 150, 10], LIMITS) == [0, 2]


def test_like_lengths_go_together():
    batch = choose([50, 3, 49, 51, 4, 90], BatchLimits(160, 1000))
    assert sorted(batch) == [0, 2, 3]


def test_padding_that_costs_more_than_another_pass_is_refused():
    assert choose([50, 40, 45], BatchLimits(1000, 14)) == [2, 0]
    assert choose([50, 40, 45], BatchLimits(1000, 15)) == [1, 2, 0]
    # a longer one makes all the others longer: 3 x 5 tokens
    assert choose([50, 50, 50, 55], BatchLimits(1000, 14)) == [0, 1, 2]
    assert choose([50, 50, 50, 55], BatchLimits(1000, 15)) == [0, 1, 2, 3]


def cheapest(lengths, limits):
    """Return the cost of the best partition of sorted lengths, by dynamic programming."""
    lengths = sorted(lengths)
    best = [0.0]
    for end in range(1, len(lengths) + 1):
        costs = []
        for start in range(end - 1, -1, -1):
            size = (end - start) * lengths[end - 1]
            if size > limits.max_tokens and end - start > 1:
                break
            costs.append(best[start] + limits.max_padding + size)
        best.append(min(costs))
    return best[-1]


@pytest.mark.parametrize("n_entries", [8, 16, 64, 256])
def test_batches_cost_little_more_than_the_best_ones(n_entries):
    limits = BatchLimits(max_tokens=2048, max_padding=32)
    rng = np.random.default_rng(n_entries)
    cost = best = 0.0
    for _ in range(10):
        lengths = np.clip(rng.lognormal(4.5, 0.7, n_entries), 8, 500).astype(int).tolist()
        best += cheapest(lengths, limits)
        queue = EntryQueue()
        scorer = HeldScorer()
        queue.add(entry(scorer, i, length) for i, length in enumerate(lengths))
        while batch := queue.take(lambda _: limits):
            cost += limits.max_padding + max(map(len, batch)) * len(batch)
    assert cost <= 1.04 * best


def test_discarded_entries_do_not_leave():
    scorer = HeldScorer()
    queue = EntryQueue()
    entries = [entry(scorer, i, 5) for i in range(4)]
    queue.add(entries)
    queue.discard(entries[1:3])
    queue.discard(entries[1:3])
    assert queue.take(lambda _: LIMITS) == [entries[0], entries[3]]
    queue.discard(entries)
    assert queue.take(lambda _: LIMITS) == []


def test_padding_is_on_the_right():
    ids, mask, type_ids = pad([Tokens([5, 6, 7], [0, 1, 1]), Tokens([8], [0])], 9)
    np.testing.assert_array_equal(ids, [[5, 6, 7], [8, 9, 9]])
    np.testing.assert_array_equal(mask, [[1, 1, 1], [1, 0, 0]])
    np.testing.assert_array_equal(type_ids, [[0, 1, 1], [0, 0, 0]])
