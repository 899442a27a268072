"""Refuses request bodies over a limit before they are held in memory."""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import BodyTooLargeError, reply_to


class BodyLimit:
    """ASGI middleware: a body above `max_bytes`, announced or not, gets 413."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting its body."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.max_bytes:
            await self._refuse(scope, receive, send)
            return
        n_bytes = 0

        async def counted() -> Message:
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > self.max_bytes:
                raise BodyTooLargeError(self._message())
            return message

        async def guarded(message: Message) -> None:
            # FastAPI makes of any failure to read the body a reply of its own: it is replaced.
            if n_bytes <= self.max_bytes:
                await send(message)

        await self.app(scope, counted, guarded)
        if n_bytes > self.max_bytes:
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = reply_to(BodyTooLargeError(self._message()))
        await JSONResponse(reply.body(), reply.status)(scope, receive, send)

    def _message(self) -> str:
        return (
            f"the body is larger than this server takes ({self.max_bytes} bytes); shorten the "
            "conversation, or have the operator raise max_body_bytes"
        )
