"""A scorer that can be held, so that tests decide what is in flight instead of sleeping."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rewards.base import BatchedScorer, Rendered, Sample, Scorer, Tokens, Value
from rewards.columns import Column, Term
from rewards.errors import RewardConfigError
from rewards.suite import RewardSuite


class HeldScorer(BatchedScorer):
    """Scores a text by its length; each forward pass waits until the gate is open.

    A text that holds "raise" or "shape" makes its batch fail, one that holds "nan" scores NaN. A
    batch of more padded tokens than ``memory`` does not fit.
    """

    memory = 10**9

    def __init__(self, name: str = "length", *, is_held: bool = False, max_length: int = 100):
        super().__init__(name, [name])
        self.max_length = max_length
        self.batches: list[list[int]] = []
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        if not is_held:
            self.gate.set()

    def identity(self, output):
        return {"kind": "held"}

    def render(self, sample: Sample) -> Rendered:
        if "template" in sample.answer:
            raise KeyError("no such role")
        return Rendered(sample.answer, 0, len(sample.answer))

    def encode(self, rendered):
        if any("encode" in item.text for item in rendered):
            raise ValueError("cannot encode")
        return [Tokens([ord(letter) for letter in item.text], []) for item in rendered]

    def forward(self, batch):
        self.batches.append([len(tokens) for tokens in batch])
        self.entered.release()
        assert self.gate.wait(20), "the test never opened the gate"
        if max(map(len, batch)) * len(batch) > self.memory:
            raise RuntimeError("[enforce fail at alloc] DefaultCPUAllocator: can't allocate memory")
        texts = ["".join(map(chr, tokens.ids)) for tokens in batch]
        if any("shape" in text for text in texts):
            return np.zeros((len(texts), 2))
        if any("raise" in text for text in texts):
            raise RuntimeError("device on fire")
        return np.array([np.nan if "nan" in text else len(text) for text in texts])


def suite_of(
    *scorers: Scorer,
    max_batch_tokens: int = 100,
    cache_entries: int = 100,
    build: Callable[[], list[Scorer]] | None = None,
    **limits: float,
) -> RewardSuite:
    """Return a suite with one value for each scorer, of the same name.

    ``limits`` are ``queue_tokens`` and ``timeout_s``.
    """
    names = [scorer.name for scorer in scorers]
    return RewardSuite(
        values=[Value(name, "", "") for name in names],
        columns=[Column(name, (Term(name, "score"),)) for name in names],
        watches={},
        transforms={},
        build=build or (lambda: list(scorers)),
        refuse=lambda field, problem: RewardConfigError(Path("f"), 1, ".".join(field), problem),
        device="cpu",
        max_batch_tokens=max_batch_tokens,
        cache_entries=cache_entries,
        torch_threads=1,
        **limits,
    )


def sample(answer: str) -> Sample:
    return Sample(({"role": "user", "content": "hello"},), answer)
