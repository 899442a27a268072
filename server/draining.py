"""How long a request may take, and which may still come in while the server stops."""

from __future__ import annotations

import asyncio
import math
import time

from starlette.types import ASGIApp, Receive, Scope, Send

# Answered to the last: they tell an orchestrator and an operator how the stop goes.
EXEMPT_PATHS = frozenset({"/health", "/ready", "/metrics", "/version"})


class DrainingError(Exception):
    """The server is stopping: this request was not taken, or not finished.

    Attributes
    ----------
    retry_after_s : int
        By then this server is gone and another one may answer in its place.
    """

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestTimeoutError(Exception):
    """A request took longer than the operator allows."""


class Drain:
    """Whether the server stops, and the requests that it waits for.

    Attributes
    ----------
    is_draining : bool
        Once `begin` was called: no request is taken any more.
    """

    def __init__(self) -> None:
        self.is_draining = False
        self.is_over = False
        self._ends = math.inf
        self._running: set[asyncio.Timeout] = set()

    @property
    def n_running(self) -> int:
        """Requests that came in and are not answered to the end yet, streams included."""
        return len(self._running)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to wait for, or no time."""
        return not self._running or time.monotonic() >= self._ends

    @property
    def retry_after_s(self) -> int:
        """Seconds until this server is gone, at least 1; it does not say when it will not stop."""
        left = self._ends - time.monotonic()
        return max(1, math.ceil(left)) if math.isfinite(left) else 1

    def begin(self, timeout_s: float) -> None:
        """Take no new request and give those that run `timeout_s`; safe in a signal handler."""
        if not self.is_draining:
            self._ends = time.monotonic() + timeout_s
            self.is_draining = True

    def cut(self) -> None:
        """End the requests that still run: each is cancelled and gets `DrainingError`."""
        self.is_over = True
        now = asyncio.get_running_loop().time()
        for limit in self._running:
            if not limit.expired():
                limit.reschedule(now)

    def enter(self, limit: asyncio.Timeout) -> None:
        """Count a request, by its time limit."""
        self._running.add(limit)

    def leave(self, limit: asyncio.Timeout) -> None:
        """Count it no longer."""
        self._running.discard(limit)


class Lifetime:
    """ASGI middleware: refuses requests while draining, and ends those that take too long.

    Raises `DrainingError` and `RequestTimeoutError`, once what the request had started is
    cancelled.
    """

    def __init__(self, app: ASGIApp, drain: Drain, timeout_s: float) -> None:
        self.app = app
        self.drain = drain
        self.timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, within its time."""
        if scope["type"] != "http" or scope["path"] in EXEMPT_PATHS:
            await self.app(scope, receive, send)
            return
        if self.drain.is_draining:
            msg = "this server is stopping and takes no new requests; send it again later"
            raise DrainingError(msg, self.drain.retry_after_s)
        limit = asyncio.timeout(self.timeout_s)
        self.drain.enter(limit)
        try:
            async with limit:
                await self.app(scope, receive, send)
        except TimeoutError:
            if not limit.expired():  # somebody else's
                raise
            if self.drain.is_over:
                msg = "this server stopped before the answer was finished; send it again later"
                raise DrainingError(msg, self.drain.retry_after_s) from None
            msg = (
                f"the request took longer than this server allows ({self.timeout_s:g} s): ask for "
                "fewer tokens or candidates, or have the operator raise request_timeout_s"
            )
            raise RequestTimeoutError(msg) from None
        finally:
            self.drain.leave(limit)
