"""Server-sent events: comments until the answer is chosen, then OpenAI's chunks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse

from server.errors import reply_to


def event(data: dict[str, Any]) -> bytes:
    """Return one event. Compact JSON in UTF-8; never more than one line."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return f"data: {text}\n\n".encode()


T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


async def streamed(
    work: Awaitable[T], chunks: Callable[[T], list[dict[str, Any]]], keepalive_s: float
) -> StreamingResponse:
    """Return the response that streams the result of `work` once it is there.

    What is refused at once, as by a full queue, is raised here: the status is still to be sent.
    """
    events = stream(work, chunks, keepalive_s)
    first = await anext(events)

    async def with_first() -> AsyncIterator[bytes]:
        async with aclosing(events):  # type: ignore[type-var]
            yield first
            async for each in events:
                yield each

    return StreamingResponse(
        with_first(),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def stream(
    work: Awaitable[T], chunks: Callable[[T], list[dict[str, Any]]], keepalive_s: float
) -> AsyncIterator[bytes]:
    """Yield comments while `work` goes on, then its chunks and ``[DONE]``.

    An error becomes an error event, as the official clients expect once the status is sent; one
    that comes before the first comment is raised. Closing the iterator (the client left) cancels
    the work.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.sleep(0)
        if task.done():
            task.result()
        yield b": choosing\n\n"
        while True:
            done, _ = await asyncio.wait({task}, timeout=keepalive_s)
            if done:
                break
            yield b": still choosing\n\n"
        try:
            result = task.result()
        except Exception as error:  # noqa: BLE001  # all of them become an event
            yield event(reply_to(error).body())
            return
        for chunk in chunks(result):
            yield event(chunk)
        yield DONE
    finally:
        task.cancel()
