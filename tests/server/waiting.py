"""Waiting for what happens elsewhere, with an end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from server.draining import Drain


async def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Return once `condition` holds; raise TimeoutError when it does not come about."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  # what is waited for has no event to set
            await asyncio.sleep(0.005)


def time_is_up(drain: Drain) -> None:
    """Let the time of every request that runs be over."""
    for limit in drain._running:
        limit.reschedule(asyncio.get_running_loop().time())
