"""After a failure, a scorer is tried until it works: it recovers without traffic."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from rewards.errors import RewardError, RewardQueueFullError
from rewards.health import ScorerHealth

# Between a failure and the first trial, and longest between two trials; they double in between.
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0


class Trials:
    """Tries scorers that failed, each in a task of its own on the event loop that saw the failure.

    Parameters
    ----------
    score : callable
        Scores the trial sample of a scorer, by name, and books the success; raises what it raises.
    health : dict of str to ScorerHealth
    """

    def __init__(
        self, score: Callable[[str], Awaitable[None]], health: dict[str, ScorerHealth]
    ) -> None:
        self._score = score
        self._health = health
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def begin(self, name: str) -> None:
        """Try this scorer, unless that is being done."""
        task = self._tasks.get(name)
        if task is None or task.done():
            self._tasks[name] = asyncio.get_running_loop().create_task(
                self._try(name), name=f"try {name}"
            )

    def close(self) -> None:
        """Try no more."""
        for task in self._tasks.values():
            if not task.get_loop().is_closed():
                task.get_loop().call_soon_threadsafe(task.cancel)
        self._tasks.clear()

    async def _try(self, name: str) -> None:
        pause = FIRST_PAUSE_S
        while True:
            await asyncio.sleep(pause)
            try:
                await self._score(name)
                return
            except RewardQueueFullError:
                pass  # which says nothing about the scorer
            except RewardError as error:
                self._health[name].failed(str(error))
                self._health[name].persists = True
            pause = min(2 * pause, LONGEST_PAUSE_S)
