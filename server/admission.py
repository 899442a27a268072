"""A bounded queue in front of generation: so many run, so many wait, the next is refused."""

from __future__ import annotations

import asyncio


class QueueFullError(Exception):
    """Too many requests wait already; the client should come back later.

    Attributes
    ----------
    retry_after_s : int
    """

    retry_after_s = 1


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

    async def __aenter__(self) -> None:
        if self._free.locked():
            if self.n_waiting >= self._max_queue:
                msg = f"{self.n_waiting} requests are waiting already; try again later"
                raise QueueFullError(msg)
            self.n_waiting += 1
            try:
                await self._free.acquire()
            finally:
                self.n_waiting -= 1
        else:
            await self._free.acquire()
        self.n_running += 1

    async def __aexit__(self, *_: object) -> None:
        self.n_running -= 1
        self._free.release()
