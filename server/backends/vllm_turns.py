"""Which requests vLLM's engine may have at once: two kinds of them never."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

Kind = Literal["plain", "top", "asked"]


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
