"""Refuses bodies that are too large to hold, or too intricate to check, before they are parsed."""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import BodyTooComplexError, BodyTooLargeError, ClientLeftError

# Validators and templates recurse, and each wrong field is an error to collect.
MAX_DEPTH = 100
MAX_PARTS = 30_000  # colons and brackets: a plain message has four

# One that is not closed goes to the end: tried again from each later quote, it would never end.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKETS = re.compile(rb"[\[\]{}]")


class BodyLimit:
    """ASGI middleware: reads the body, up to `max_bytes`, and hands it on in one piece.

    Raises `BodyTooLargeError`, `BodyTooComplexError` and, when it does not come to its end,
    `ClientLeftError`.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, once its body is known to be within the limits."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > self.max_bytes:
            raise self._too_large()
        body = await self._read(receive)
        _check_structure(body)
        is_given = False

        async def replay() -> Message:
            nonlocal is_given
            if is_given:
                return await receive()  # that the client has left
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeftError
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(
            f"the body is larger than this server takes ({self.max_bytes} bytes); shorten the "
            "conversation, or have the operator raise max_body_bytes"
        )


def _check_structure(body: bytes) -> None:
    """Raise `BodyTooComplexError` for JSON with too many fields or levels."""
    if len(body) <= MAX_DEPTH:
        return
    skeleton = _STRING.sub(b"", body)
    if sum(skeleton.count(sign) for sign in (b":", b"[", b"]", b"{", b"}")) > MAX_PARTS:
        msg = (
            f"the body has more fields, objects and lists than this server takes (about "
            f"{MAX_PARTS // 4} messages): send fewer"
        )
        raise BodyTooComplexError(msg)
    depth = 0
    for bracket in _BRACKETS.finditer(skeleton):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > MAX_DEPTH:
            msg = f"the body is nested more than {MAX_DEPTH} levels deep; flatten it"
            raise BodyTooComplexError(msg)
