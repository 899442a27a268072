"""What routes share: the wired objects of the app, and work that ends when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from server.alignment import Aligner
from server.draining import Drain
from server.errors import ClientLeftError
from server.live.follower import Follower
from server.metrics import Metrics
from server.replay import Replays
from server.settings import Settings

T = TypeVar("T")


@dataclass(slots=True)
class CalibrationProgress:
    """The calibration made in the background, if any.

    Attributes
    ----------
    state : {"none", "running", "done", "failed"}
    done, total : int
        Prompts.
    error : str
        Why it failed.
    """

    state: str = "none"
    done: int = 0
    total: int = 0
    error: str = ""


@dataclass(slots=True)
class Context:
    """Built by `server.app`, one per process."""

    settings: Settings
    aligner: Aligner
    created: int
    metrics: Metrics
    replays: Replays
    drain: Drain = field(default_factory=Drain)
    calibrating: CalibrationProgress = field(default_factory=CalibrationProgress)
    follower: Follower | None = None


def context_of(request: Request) -> Context:
    """Return the app's context."""
    context = request.app.state.context
    assert isinstance(context, Context)
    return context


InContext = Annotated[Context, Depends(context_of)]


async def until_client_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, or cancel it when the client closes the connection.

    Starlette does not cancel a plain handler whose client has gone.

    Raises
    ------
    ClientLeftError
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeftError
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
