"""The outermost layer: request ids, errors that nobody turned into an answer, the access log."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.alignment_stages import Served
from server.draining import EXEMPT_PATHS
from server.errors import reply_to
from server.metrics import Metrics
from server.request_id import RequestRecord, current_request, request_id
from server.streaming import event

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499
# For the last words to a client that does not read.
_LAST_WORDS_S = 5.0


class Access:
    """ASGI middleware around all others.

    Every answer carries ``x-request-id`` and ``openai-processing-ms``. An exception becomes an
    OpenAI error object, or an error event where a stream has begun; an answer of another kind that
    has begun is broken off.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request, whatever happens inside."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = RequestRecord(request_id(Headers(scope=scope).get("x-request-id")))
        answer = _Answer(record, send)
        token = current_request.set(record)
        try:
            with self.metrics.in_progress.track_inprogress():
                try:
                    await self.app(scope, receive, answer.send)
                except Exception as error:  # noqa: BLE001  # nothing is outside of this
                    await answer.fail(error, scope, receive)
        finally:
            self._ended(scope, record, answer)
            current_request.reset(token)

    def _ended(self, scope: Scope, record: RequestRecord, answer: _Answer) -> None:
        seconds = time.perf_counter() - answer.started
        is_cut = not answer.is_whole and record.error is None
        status = CLIENT_LEFT if is_cut else answer.status
        # The path as a client wrote it is no label: there are as many as clients care to invent.
        route = getattr(scope.get("route"), "path", "none")
        self.metrics.answered(scope["method"], route, status, seconds)
        if record.error is not None:
            self.metrics.failed(record.error)
        logger.log(
            logging.DEBUG if scope["path"] in EXEMPT_PATHS else logging.INFO,
            "%s %s %d %.0f ms%s",
            quote(scope["method"]),
            quote(scope["path"])[:200],
            status,
            seconds * 1e3,
            _details(record),
        )


class _Answer:
    """The answer as it goes out, and how far it is."""

    def __init__(self, record: RequestRecord, send: Send) -> None:
        self.started = time.perf_counter()
        self.status = 0
        self.is_whole = False
        self._record = record
        self._send = send
        self._is_stream = False

    async def send(self, message: Message) -> None:
        """Send on, with the headers of every answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._record.id
            headers["openai-processing-ms"] = f"{(time.perf_counter() - self.started) * 1e3:.0f}"
            self._is_stream = headers.get("content-type", "").startswith("text/event-stream")
        elif not message.get("more_body", False):
            self.is_whole = True
        await self._send(message)

    async def fail(self, error: Exception, scope: Scope, receive: Receive) -> None:
        """Tell the client of an error in the way that is still open."""
        reply = reply_to(error)
        if not self.status:
            whole = JSONResponse(reply.body(), reply.status, headers=reply.headers)
            await whole(scope, receive, self.send)
        elif self._is_stream and not self.is_whole:
            with contextlib.suppress(TimeoutError):  # it does not read: there is no telling it
                async with asyncio.timeout(_LAST_WORDS_S):
                    await self.send({"type": "http.response.body", "body": event(reply.body())})


def _details(record: RequestRecord) -> str:
    """Return what is known beyond HTTP, as `` name=value`` words."""
    words = ""
    if record.model is not None:
        words = (
            f" model={record.model} palette={record.palette} candidates={record.n_candidates}"
            f" tokens={record.spent_tokens} served={record.served_tokens}"
        )
    return words if record.error is None else f"{words} error={record.error}"


def note(served: Served, metrics: Metrics) -> None:
    """Count what the aligner answered, and keep it for the access line of the request."""
    metrics.served(served)
    report = served.report
    record = current_request.get()
    if record is not None:
        record.model = served.model
        record.palette = "none" if report is None else report.status
        record.n_candidates += served.n_candidates
        record.spent_tokens += served.spent_tokens
        record.served_tokens += served.served_tokens
    if report is not None and logger.isEnabledFor(logging.DEBUG):
        told = ", ".join(
            f"{name} {level.level:.4g} -> {report.realised.get(name, math.nan):.4g}"
            for name, level in report.expected.items()
        )
        logger.debug("expected -> realised: %s; ess %.3g, kl %.3g", told, report.ess, report.kl)
