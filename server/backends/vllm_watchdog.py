"""Notices an engine that lives and does nothing, which no end of a process would ever tell."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

logger = logging.getLogger(__name__)

# Looks in which nothing must have come, over the time allowed.
_LOOKS = 4


class Watched(Protocol):
    """What a watchdog needs of an engine."""

    @property
    def n_outputs(self) -> int:
        """Messages that have come from it so far."""

    def kill(self, reason: str) -> None:
        """End its processes at once; `reason` is what it is then said to have died of."""


async def watch_for_hangs(
    engine_of: Callable[[], Watched | None], n_requests: Callable[[], int], timeout_s: float
) -> None:
    """Kill the engine whenever it has had requests for `timeout_s` and said nothing; never returns.

    The silence is counted in looks, not on a clock: when this whole process stood still, the
    engine's messages may only wait to be read.

    Parameters
    ----------
    engine_of : callable
        Returns the engine in use, None while there is none.
    n_requests : callable
        Returns how many requests are in flight.
    timeout_s : float
    """
    seen: tuple[Watched, int] | None = None
    n_silent = 0
    while True:
        await asyncio.sleep(timeout_s / _LOOKS)
        engine = engine_of()
        if engine is None or not n_requests():
            seen = None
            continue
        now = (engine, engine.n_outputs)
        n_silent = n_silent + 1 if now == seen else 0
        seen = now
        if n_silent == _LOOKS:
            reason = f"no token came from it in {timeout_s:g} s, with {n_requests()} requests"
            logger.error("killing vLLM's engine: %s", reason)
            engine.kill(reason)
            seen = None
