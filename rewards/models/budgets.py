"""How large a batch suits a device: known for a CPU, found out on a GPU."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable

import torch

from rewards.base import BatchedScorer, Tokens
from rewards.batch import BatchLimits
from rewards.budget import is_out_of_memory
from rewards.models.self_test import trial_inputs

# CPU: a batch only pays while its activations stay in the cache. Measured on 11 M parameters, one
# thread: 512 to 2048 padded tokens are equally fast, 16384 is 31 % slower. Beginning a forward pass
# costs as much as 17 (110 M parameters) to 44 tokens (1 M): nearly nothing, so hardly any padding.
CPU_LIMITS = BatchLimits(max_tokens=2048, max_padding=32)
# GPU: large enough to fill it with an encoder of 100 M parameters, small enough that a batch (tens
# of ms) neither makes the next request wait nor starves a sampler on the same device. Beginning a
# pass, 5 to 15 ms of kernel launches, is worth thousands of tokens. Reasoned, not yet measured; the
# size is the largest, `find_limits` may settle for less.
GPU_LIMITS = BatchLimits(max_tokens=32768, max_padding=4096)

# A pass twice as large must give this much more tokens a second.
_GAIN = 1.05
_FEWEST_TOKENS = 2048
# Of the memory that is free, so much may a pass take: others score and generate beside it.
_MEMORY_SHARE = 0.25
_REPEATS = 3
# Waiting for more texts costs nothing while they are being generated, and a pass has a fixed cost
# on a GPU. The larger the model, the smaller that is beside the pass itself.
_LARGE_MODEL = 1_000_000_000
_LINGER_S = 0.1
_LARGE_LINGER_S = 0.02


def default_limits(device: str) -> BatchLimits:
    """Return the size of a batch that suits a device."""
    return CPU_LIMITS if torch.device(device).type == "cpu" else GPU_LIMITS


def linger_s(device: str, n_parameters: int) -> float:
    """Return the seconds for which texts may wait for others: none on a CPU."""
    if torch.device(device).type == "cpu":
        return 0.0
    return _LINGER_S if n_parameters < _LARGE_MODEL else _LARGE_LINGER_S


def find_limits(scorer: BatchedScorer, device: str) -> BatchLimits:
    """Return the size of this scorer's batches, at least one input long.

    On a GPU, the size from which on a larger one gains nothing. On a CPU the curve is flat where
    it is best, over a factor of four, and the noise of a busy machine would choose the size; so it
    is not measured.
    """
    limits = default_limits(device)
    max_tokens = limits.max_tokens
    if torch.device(device).type == "cuda":
        most = min(limits.max_tokens, _memory_cap(scorer, device))
        max_tokens = find_size(_timed(scorer, device), most)
    return dataclasses.replace(limits, max_tokens=max(max_tokens, scorer.max_length))


def find_size(seconds_of: Callable[[int], float], most: int) -> int:
    """Return the size of a pass from which on twice the size gains less than 5 %.

    Parameters
    ----------
    seconds_of : callable
        Gets a number of tokens, and gives the time of a pass; may run out of memory.
    most : int
        Not tried beyond.
    """
    size = _FEWEST_TOKENS
    try:
        speed = size / seconds_of(size)
        while 2 * size <= most:
            larger = 2 * size / seconds_of(2 * size)
            if larger < _GAIN * speed:
                break
            size, speed = 2 * size, larger
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return size


def _timed(scorer: BatchedScorer, device: str) -> Callable[[int], float]:
    def seconds_of(n_tokens: int) -> float:
        batch = _batch(scorer, n_tokens)
        scorer.forward(batch)  # kernels are chosen, memory is had
        spent = []
        for _ in range(_REPEATS):
            torch.cuda.synchronize(device)
            started = time.perf_counter()
            scorer.forward(batch)  # ends with its scores on the CPU
            spent.append(time.perf_counter() - started)
        return min(spent)

    return seconds_of


def _memory_cap(scorer: BatchedScorer, device: str) -> int:
    """Return the tokens of a pass that takes its share of the free memory, from a small one."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    scorer.forward(_batch(scorer, _FEWEST_TOKENS))
    taken = max(1, torch.cuda.max_memory_allocated(device) - before)
    free, _ = torch.cuda.mem_get_info(device)
    return int(_FEWEST_TOKENS * _MEMORY_SHARE * free / taken)


def _batch(scorer: BatchedScorer, n_tokens: int) -> list[Tokens]:
    """Return about so many tokens, in inputs of 128 of a real one's, repeated."""
    longest = max(trial_inputs(scorer), key=len)
    length = min(128, scorer.max_length)
    ids = list(itertools.islice(itertools.cycle(longest.ids), length))
    return [Tokens(ids, [0] * length)] * max(1, n_tokens // length)
