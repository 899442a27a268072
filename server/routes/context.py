"""What routes share: the wired objects of the app, and work that ends when the client leaves."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from server.alignment import Aligner
from server.draining import Drain
from server.errors import ClientLeftError, ModelNotFoundError
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
    """Built by `server.app`, one per process.

    Attributes
    ----------
    aligners : mapping of str to Aligner
        By the model's name; the first is that of the model itself, the others of its adapters.
    progress : mapping of str to CalibrationProgress
        By the model's name.
    """

    settings: Settings
    aligners: Mapping[str, Aligner]
    created: int
    metrics: Metrics
    replays: Replays
    drain: Drain = field(default_factory=Drain)
    follower: Follower | None = None
    progress: dict[str, CalibrationProgress] = field(
        default_factory=lambda: defaultdict(CalibrationProgress)
    )

    @property
    def aligner(self) -> Aligner:
        """The one of the model itself."""
        return next(iter(self.aligners.values()))

    @property
    def calibrating(self) -> CalibrationProgress:
        """The calibration of the model itself."""
        return self.progress[self.aligner.backend.model_id]

    def aligner_of(self, name: str | None) -> Aligner:
        """Return the aligner of a model; without a name, of the model itself.

        Raises
        ------
        ModelNotFoundError
        """
        if name is None:
            return self.aligner
        if name not in self.aligners:
            served = ", ".join(f"`{known}`" for known in self.aligners)
            msg = f"The model `{name}` does not exist here; this server has {served}."
            raise ModelNotFoundError(msg)
        return self.aligners[name]


async def context_of(request: Request) -> Context:
    """Return the app's context; a coroutine, for FastAPI runs anything else in a thread."""
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
