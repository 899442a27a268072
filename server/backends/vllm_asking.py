"""Questions about answers, as requests of one token to vLLM."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

import numpy as np

Kind = Literal["plain", "top", "asked"]


def asking_params(word_ids: Sequence[Sequence[int]]) -> Any:
    """Return vLLM's parameters of a question: how likely these tokens are as the first."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        logprob_token_ids=[one for group in word_ids for one in group],
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        detokenize=False,
        # A copy of each request's own would cost as much as the rest of it here.
        skip_clone=True,
    )


def answer_of(output: Any, word_ids: Sequence[Sequence[int]]) -> list[float]:
    """Return the log-probability that the first token is one of each set, in nats."""
    found = output.logprobs
    # The token that was sampled stands first, and again where it was asked for.
    logprobs = dict(zip(found.token_ids, found.logprobs, strict=True))
    return [float(np.logaddexp.reduce([logprobs[one] for one in group])) for group in word_ids]


def kind_of(params: Any) -> Kind:
    """Return what a request reads of the distributions it samples from."""
    if params.logprob_token_ids:
        return "asked"
    return "top" if params.logprobs else "plain"


class TwoKinds:
    """Requests of the kinds "top" and "asked" one after the other, never together.

    In a batch with one that asks for given tokens, vLLM 0.32 reports those instead of the likeliest
    of the others: their columns would hold minus infinity. First come, first served; none waits for
    what waits for it, because every request ends by itself.
    """

    def __init__(self) -> None:
        self._kind: Kind | None = None
        self._n_running = 0
        self._waiting: deque[tuple[Kind, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def run(self, kind: Kind) -> AsyncIterator[None]:
        """Wait until a request of this kind may run, and let it; "plain" ones always may."""
        if kind == "plain":
            yield
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((kind, turn))
        self._admit()
        try:
            await turn
            yield
        finally:
            if not turn.cancelled():
                self._n_running -= 1
            self._admit()

    def _admit(self) -> None:
        while self._waiting:
            kind, turn = self._waiting[0]
            if turn.cancelled():
                self._waiting.popleft()
                continue
            if self._n_running and self._kind != kind:
                return
            self._waiting.popleft()
            self._kind = kind
            self._n_running += 1
            turn.set_result(None)
