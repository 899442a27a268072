"""Notices calibrations that another process adds, replaces or deletes while this one serves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from server.alignment import Aligner
from server.live.follower import Follower

logger = logging.getLogger(__name__)

# Seconds between two looks at the files. A look that finds nothing lists one folder.
_EVERY_S = 2.0


class ShelfWatch:
    """Has the shelves of aligners reread when files change; off the event loop, one at a time.

    Parameters
    ----------
    aligners : iterable of Aligner
    follower : Follower, optional
        Takes up the live state of what comes, and lets go of what is gone.
    """

    def __init__(self, aligners: Iterable[Aligner], follower: Follower | None = None) -> None:
        self._aligners = tuple(aligners)
        self._follower = follower
        self._stop = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Look again and again until the end."""
        task = asyncio.create_task(self._run(), name="shelf watch")
        try:
            yield
        finally:
            self._stop.set()
            await task

    async def _run(self) -> None:
        told = ""
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_EVERY_S):
                    await self._stop.wait()
                    return
            try:
                await asyncio.to_thread(self._look)
                told = ""
            except Exception as error:  # whatever it was, it must not end the watch
                if repr(error) != told:  # once, not with every look
                    logger.exception("calibrations could not be looked at")
                told = repr(error)

    def _look(self) -> None:
        follower = self._follower
        if follower is None:
            for aligner in self._aligners:
                aligner.shelf.reread()
        elif any([aligner.shelf.reread(follower.newest) for aligner in self._aligners]):
            follower.let_go()
