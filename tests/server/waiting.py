"""Waiting for what happens elsewhere, with an end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from server.draining import Drain
from server.drawing import Draw
from tests.server.fakes import FakeBackend


async def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Return once `condition` holds; raise TimeoutError when it does not come about."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  # what is waited for has no event to set
            await asyncio.sleep(0.005)


def time_is_up(drain: Drain) -> None:
    """Let the time of every request that runs be over."""
    for limit in drain._running:
        limit.reschedule(asyncio.get_running_loop().time())


def let_deadlines_wait(monkeypatch: pytest.MonkeyPatch, backend: FakeBackend) -> None:
    """Let deadlines come once all candidates that have a permit are scored."""

    async def wait(draw: Draw, work: asyncio.Future[None], moment: float) -> None:
        permits = backend.permits
        assert permits is not None
        await until(
            lambda: work.done() or (permits.locked() and len(draw.finished) == len(draw.ready()[0]))
        )

    monkeypatch.setattr(Draw, "_wait", wait)
