"""The candidates of one request, each scored as it comes; all of them, or those of a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing

import numpy as np

from server.backends.base import Candidate

Score = Callable[[Candidate], Awaitable[np.ndarray]]


class Draw:
    """Candidates on their way.

    Parameters
    ----------
    stream : async iterator of Candidate
        Taken over: it is closed in the end.
    score : callable, optional
        Returns the rewards of one candidate, shape (1, n_values); without it nothing is scored.
    n_needed : int
        Candidates without which nothing can be served.

    Attributes
    ----------
    finished : list of Candidate
        In the order in which they came.
    generated : float
        When the last one came, on the clock of `time.perf_counter`.
    is_ended : bool
        Whether the stream came to its end, with all candidates that there will be.
    """

    def __init__(
        self, stream: AsyncIterator[Candidate], score: Score | None, n_needed: int
    ) -> None:
        self.finished: list[Candidate] = []
        self.generated = 0.0
        self.is_ended = False
        self._stream = stream
        self._score = score
        self._n_needed = n_needed
        self._rewards: dict[int, np.ndarray] = {}
        self._are_enough = asyncio.Event()

    def ready(self) -> tuple[list[Candidate], np.ndarray | None]:
        """Return the candidates that can be served, by index, and their rewards if any."""
        candidates = sorted(self.finished, key=lambda one: one.index)
        if self._score is None:
            return candidates, None
        candidates = [one for one in candidates if one.index in self._rewards]
        rewards = [self._rewards[one.index] for one in candidates]
        return candidates, np.concatenate(rewards) if rewards else None

    async def run(self) -> None:
        """Wait for all of them. Cancelling it takes generation and scoring with it."""
        try:
            async with asyncio.TaskGroup() as group, aclosing(self._stream):  # type: ignore[type-var]
                async for candidate in self._stream:
                    self.finished.append(candidate)
                    self.generated = time.perf_counter()
                    if self._score is not None:
                        group.create_task(self._score_one(candidate, self._score))
                self.is_ended = True
        except ExceptionGroup as failures:
            # One failure cancels the rest, so there is one to tell.
            raise failures.exceptions[0] from None

    async def run_until(self, moment: float) -> bool:
        """Wait for all of them until `moment`, or for as many as are needed.

        What is not finished and scored by then is cancelled. Return whether there were enough.
        """
        work = asyncio.ensure_future(self.run())
        enough = asyncio.ensure_future(self._are_enough.wait())
        try:
            await self._wait(work, moment)
            is_met = self._are_enough.is_set()
            if not is_met:
                await asyncio.wait({work, enough}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            return is_met
        finally:
            work.cancel()
            enough.cancel()
            await asyncio.gather(work, enough, return_exceptions=True)

    async def _wait(self, work: asyncio.Future[None], moment: float) -> None:
        await asyncio.wait({work}, timeout=max(0.0, moment - time.perf_counter()))

    async def _score_one(self, candidate: Candidate, score: Score) -> None:
        self._rewards[candidate.index] = await score(candidate)
        if len(self._rewards) >= self._n_needed:
            self._are_enough.set()
