"""A backend without a model, and rewards without weights: fast, and their statistics are known."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np

from rewards import RewardSuite, load_rewards
from server.backends.base import (
    Backend,
    BackendUnavailableError,
    Candidate,
    ContextLengthError,
    Feature,
    Prompt,
    PromptError,
    SamplingSettings,
    TokenLogprob,
    ToolCall,
)

WORDS = ("the", "a", "small", "green", "house", "stands", "near", "an", "old", "river", "rain")

EVERYTHING = frozenset(get_args(Feature))
THOUGHT = "Rain makes the river rise."

LEXICAL_REWARDS = """\
version: 1
scorers:
  words: {kind: lexical, measure: words}
  variety: {kind: lexical, measure: lexical_diversity}
  fluency: {kind: sampler_logprob}
values:
  words: {from: words, unit: words}
  variety: {from: variety, unit: ratio}
  log_likelihood: {from: fluency, unit: nats per token}
"""


class FakeBackend(Backend):
    """Answers of 1 to 20 random words; candidate i depends on (seed, i) alone.

    Parameters
    ----------
    hold : bool
        Wait for `release` before the last candidate, so that tests need not sleep.
    features : frozenset of str
        With ``tools``, every second answer (every one where it must) calls the first tool; with
        ``json_schema``, answers to such a request are JSON.
    thinks : bool
        Every candidate comes with a thought.

    Attributes
    ----------
    permits : asyncio.Semaphore or None
        As many candidates as it has permits come; the others wait for more.
    asked : list of (Prompt, SamplingSettings, int)
        What was generated for, with the seed.
    asked_logprobs : list of bool
        Whether log-probabilities were wanted; without, tokens have NaN.
    """

    def __init__(
        self,
        *,
        hold: bool = False,
        max_context: int = 512,
        features: frozenset[Feature] = frozenset({"top_k", "logprobs"}),
        thinks: bool = False,
    ) -> None:
        self.features = features
        self.thinks = thinks
        self.permits: asyncio.Semaphore | None = None
        self.asked: list[tuple[Prompt, SamplingSettings, int]] = []
        self.asked_logprobs: list[bool] = []
        self.n_vocab = 1000
        self.model_id = "fake"
        self.fingerprint = "f" * 64
        self.max_context = max_context
        self.released = asyncio.Event()
        if not hold:
            self.released.set()
        self.n_started = 0
        self.n_cancelled = 0
        self.failure: Exception | None = None
        self.is_up = False

    async def start(self) -> None:
        self.is_up = True

    async def close(self) -> None:
        self.is_up = False

    async def render(self, messages, tools=None) -> Prompt:
        tokens = tuple(range(sum(len(message["content"].split()) for message in messages)))
        if len(tokens) >= self.max_context:
            raise ContextLengthError(f"maximum context length is {self.max_context} tokens")
        return Prompt(tuple(messages), tokens, tools)

    async def read(self, text) -> Prompt:
        words = text if isinstance(text, str) else " ".join(f"w{token}" for token in text)
        if not words:
            raise PromptError("there is no token to continue; give a text that is not empty")
        rendered = await self.render([{"role": "user", "content": words}])
        return Prompt(rendered.messages, rendered.token_ids, is_raw=True)

    async def generate(
        self,
        prompt: Prompt,
        n_candidates: int,
        sampling: SamplingSettings,
        seed: int,
        *,
        top_logprobs: int = 0,
        wants_logprobs: bool = True,
    ) -> AsyncIterator[Candidate]:
        if not self.is_up:
            raise BackendUnavailableError("the fake backend is not running")
        self.n_started += 1
        self.asked.append((prompt, sampling, seed))
        self.asked_logprobs.append(wants_logprobs)
        is_whole = False
        try:
            for index in reversed(range(n_candidates)):  # not in order, as real ones
                if index == 0:
                    await self.released.wait()
                if self.permits is not None:
                    await self.permits.acquire()
                if self.failure is not None:
                    raise self.failure
                drawn = _candidate(seed, index, sampling.max_tokens, top_logprobs)
                if not wants_logprobs:
                    bare = tuple(replace(token, logprob=math.nan) for token in drawn.tokens)
                    drawn = replace(drawn, tokens=bare)
                yield self._shaped(drawn, prompt, sampling)
            is_whole = True
        finally:
            self.n_cancelled += not is_whole

    def _shaped(self, drawn: Candidate, prompt: Prompt, sampling: SamplingSettings) -> Candidate:
        """Return the words as what the request wants: JSON, a call, a thought before them."""
        if self.thinks:
            drawn = replace(drawn, reasoning=THOUGHT)
        if sampling.json_schema is not None:
            return replace(drawn, text=json.dumps({"words": drawn.text}))
        tools = prompt.tools
        if tools is None or tools.choice == "none" or (tools.choice == "auto" and drawn.index % 2):
            return drawn
        name = json.loads(tools.definitions[0])["function"]["name"]
        if tools.choice not in ("auto", "required"):
            name = tools.choice
        words = drawn.text.split()[: 2 if tools.is_parallel else 1]
        calls = tuple(ToolCall(name, json.dumps({"word": word})) for word in words)
        return replace(drawn, text="", tool_calls=calls, finish_reason="tool_calls")

    def health(self) -> dict[str, object]:
        return {"state": "ok" if self.is_up else "stopped"}


class Started:
    """A backend that is started already, and that an app starts and closes without consequence."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> object:
        return getattr(self._backend, name)

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass


def _candidate(seed: int, index: int, max_tokens: int, top_logprobs: int) -> Candidate:
    rng = np.random.default_rng([seed, index])
    n_words = int(rng.integers(1, 21))
    words = [str(word) for word in rng.choice(WORDS, size=min(n_words, max_tokens))]
    tokens = tuple(
        TokenLogprob(
            token=word if at == 0 else f" {word}",
            logprob=float(-rng.exponential()),
            top=tuple((other, -1.0) for other in WORDS[:top_logprobs]),
        )
        for at, word in enumerate(words)
    )
    is_cut = n_words > max_tokens
    return Candidate(
        index=index,
        text=" ".join(words),
        tokens=tokens,
        n_tokens=len(tokens) + (not is_cut),
        finish_reason="length" if is_cut else "stop",
    )


def lexical_rewards(folder: Path) -> RewardSuite:
    """Return a suite of three values that need no model."""
    path = folder / "rewards.yaml"
    path.write_text(LEXICAL_REWARDS)
    return load_rewards(path)
