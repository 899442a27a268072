"""Candidates drawn from the transformers backend, whose forward passes can be held."""

from __future__ import annotations

import asyncio
import functools
import threading

from numpy.testing import assert_allclose
from transformers import LlamaForCausalLM

from server.backends.base import SamplingSettings

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
OTHER = [{"role": "user", "content": "Grüße aus Köln, naïve café: how are the dog and the fox?"}]
PATIENCE_S = 60  # only a hang takes that long


class HeldForward:
    """A model whose every forward pass waits for a permit."""

    def __init__(self, monkeypatch):
        self.permits = threading.Semaphore(0)
        self.shapes = []  # (rows, tokens) of every pass that began
        original = LlamaForCausalLM.forward

        @functools.wraps(original)
        def forward(model, input_ids, **options):
            self.shapes.append(tuple(input_ids.shape))
            if not self.permits.acquire(timeout=PATIENCE_S):
                raise TimeoutError
            return original(model, input_ids, **options)

        monkeypatch.setattr(LlamaForCausalLM, "forward", forward)

    @property
    def rows(self):
        return [n_rows for n_rows, _ in self.shapes]

    @property
    def n_prompts(self):
        return sum(n_tokens > 1 for _, n_tokens in self.shapes)

    async def began(self, n_passes):
        await until(lambda: len(self.shapes) >= n_passes)


async def until(condition):
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - a thread changes it, without an event
            await asyncio.sleep(0.001)


async def collect(backend, messages=QUESTION, n=4, seed=0, top_logprobs=0, **sampling):
    """Return the candidates in order of their index."""
    prompt = await backend.render(messages)
    settings = SamplingSettings(**{"max_tokens": 24, **sampling})
    stream = backend.generate(prompt, n, settings, seed, top_logprobs=top_logprobs)
    async with asyncio.timeout(PATIENCE_S):
        candidates = [candidate async for candidate in stream]
    assert sorted(c.index for c in candidates) == list(range(n))
    return sorted(candidates, key=lambda c: c.index)


def ids_of(candidate):
    return [int(token.token) for token in candidate.tokens]


def same(left, right):
    """Whether two lists of candidates agree up to rounding of their log-probabilities."""
    for a, b in zip(left, right, strict=True):
        assert (a.text, a.n_tokens, a.finish_reason) == (b.text, b.n_tokens, b.finish_reason)
        assert_allclose(
            [t.logprob for t in a.tokens], [t.logprob for t in b.tokens], rtol=0, atol=1e-4
        )
    return True
