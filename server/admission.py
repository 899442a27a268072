"""A bounded queue in front of generation: so many run, so many wait, the next is refused."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

# Of the mean time inside, for each request that leaves: the last dozen or so count.
_WEIGHT = 0.1
_LONGEST_RETRY_S = 60


class QueueFullError(Exception):
    """Too many requests wait already; the client should come back later.

    Attributes
    ----------
    retry_after_s : int
        When those that wait now are likely to be through.
    """

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Admission:
    """An asynchronous context that at most `max_running` requests are inside of at once.

    Parameters
    ----------
    max_running, max_queue : int
        Requests inside, and requests that may wait outside.
    """

    def __init__(self, max_running: int, max_queue: int) -> None:
        self.max_running = max_running
        self._free = asyncio.Semaphore(max_running)
        self._max_queue = max_queue
        self.n_waiting = 0
        self.n_running = 0
        self._mean_s = 0.0
        self._entered: dict[asyncio.Task[Any] | None, float] = {}

    @property
    def retry_after_s(self) -> int:
        """Seconds in which those that wait, and one more, get in: from recent times inside."""
        turns = (self.n_waiting + 1) / self.max_running
        return min(max(1, math.ceil(turns * self._mean_s)), _LONGEST_RETRY_S)

    async def __aenter__(self) -> None:
        if self._free.locked():
            if self.n_waiting >= self._max_queue:
                msg = f"{self.n_waiting} requests are waiting already; try again later"
                raise QueueFullError(msg, self.retry_after_s)
            self.n_waiting += 1
            try:
                await self._free.acquire()
            finally:
                self.n_waiting -= 1
        else:
            await self._free.acquire()
        self.n_running += 1
        self._entered[asyncio.current_task()] = time.monotonic()

    async def __aexit__(self, *_: object) -> None:
        self.n_running -= 1
        inside_s = time.monotonic() - self._entered.pop(asyncio.current_task())
        self._mean_s += _WEIGHT * (inside_s - self._mean_s) if self._mean_s else inside_s
        self._free.release()
