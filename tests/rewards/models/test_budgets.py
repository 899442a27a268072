"""The size of a batch that is found by trying; without the device it is for."""

from __future__ import annotations

import pytest

from rewards.models.budgets import CPU_LIMITS, default_limits, find_limits, find_size, linger_s
from tests.rewards.fakes import HeldScorer


def pass_of(fixed_s, per_token_s, memory=10**9):
    """Return the time of a pass with a fixed cost, and what was tried."""
    tried = []

    def seconds_of(n_tokens):
        tried.append(n_tokens)
        if n_tokens > memory:
            raise MemoryError
        return fixed_s + per_token_s * n_tokens

    return seconds_of, tried


@pytest.mark.parametrize(
    ("fixed_s", "most", "memory", "found"),
    [
        (0.010, 2**20, 10**9, 2**17),  # 10 ms are 10,000 tokens: twice 2**17 gains 3.7 %
        (0.0, 2**20, 10**9, 2048),
        (0.010, 16384, 10**9, 16384),
        (0.010, 20000, 10**9, 16384),
        (0.010, 2**20, 9000, 8192),
        (0.010, 2**20, 100, 2048),
        (0.010, 100, 10**9, 2048),
    ],
)
def test_twice_the_size_must_gain(fixed_s, most, memory, found):
    seconds_of, tried = pass_of(fixed_s, 1e-6, memory)
    assert find_size(seconds_of, most) == found
    assert tried == sorted(set(tried))


def test_other_failures_are_told():
    def fails(n_tokens):
        raise RuntimeError("device on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        find_size(fails, 4096)


def test_a_cpu_is_not_measured():
    scorer = HeldScorer(max_length=5000)
    assert find_limits(scorer, "cpu").max_tokens == 5000
    assert find_limits(HeldScorer(), "cpu") == CPU_LIMITS == default_limits("cpu")
    assert scorer.batches == []


def test_texts_wait_for_others_on_a_gpu_only():
    assert linger_s("cpu", 10**6) == 0
    assert linger_s("cuda:0", 10**8) == 0.1
    assert linger_s("cuda:0", 8 * 10**9) == 0.02
