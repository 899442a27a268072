"""An OpenAI-compatible server with the habits and faults of real ones, behind a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from server.errors import ClientLeftError
from server.routes.context import until_client_leaves
from tests.server.waiting import until

# U+2028 is a line break to some readers of lines, and no end of an event.
WORDS = ("the", "green", "house", "\u2028", "Zürich", "🙂", "rain")
END = "<|end|>"


@dataclass
class Fault:
    """What one request gets instead of an answer.

    `cut_after`: the stream breaks off once so many choices are finished. `hang`: no byte comes.
    """

    status: int = 200
    message: str = "bad luck"
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    hang: bool = False
    body: str | None = None


@dataclass
class FakeUpstream:
    """Answers of 1 to 12 words that depend on the seed alone; child i of n has seed + i."""

    owned_by: str = "vllm"
    model: str = "up/model"
    key: str | None = None
    max_model_len: int | None = 256
    refused: set[str] = field(default_factory=set)
    largest_n: int = 128
    ignores_n: bool = False
    copies: bool = False
    has_logprobs: bool = True
    tells_end_token: bool = True
    streams_usage: bool = True
    streams_logprobs: bool = True
    order: Callable[[int], Iterable[int]] = lambda n: reversed(range(n))
    message: dict[str, Any] = field(default_factory=dict)
    finish: Callable[[int], str | None] = lambda seed: None
    faults: deque[Fault] = field(default_factory=deque)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    n_active: int = 0
    n_peak: int = 0
    n_left: int = 0

    def __post_init__(self) -> None:
        self.released = asyncio.Event()
        self.released.set()
        self.last_held = False
        self.app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
            ]
        )

    def answer(self, seed: int) -> tuple[str, list[str]]:
        rng = np.random.default_rng(seed)
        words = [str(word) for word in rng.choice(WORDS, size=int(rng.integers(1, 13)))]
        tokens = [words[0], *(f" {word}" for word in words[1:])]
        return "".join(tokens), tokens

    async def models(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        card = {"id": self.model, "object": "model", "owned_by": self.owned_by, "created": 1}
        if self.max_model_len:
            card["max_model_len"] = self.max_model_len
        return JSONResponse({"object": "list", "data": [card]})

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if refusal := self._refusal(request) or self._bad(body):
            return refusal
        fault = self.faults.popleft() if self.faults else Fault()
        if fault.status != 200:
            if fault.body is not None:
                return Response(fault.body, fault.status, fault.headers)
            return _error(fault.status, fault.message, fault.code, fault.headers)
        if fault.body is not None:
            return Response(fault.body, media_type="application/json")
        if body.get("stream"):
            return StreamingResponse(self._stream(body, fault), media_type="text/event-stream")
        try:
            return await until_client_leaves(request, self._whole(body, fault))
        except ClientLeftError:
            return Response(status_code=499)

    def _refusal(self, request: Request) -> Response | None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return _error(401, "Incorrect API key provided: sk-secr**t", "invalid_api_key")
        return None

    def _bad(self, body: dict[str, Any]) -> Response | None:
        if body["model"] != self.model:
            return _error(404, f"The model {body['model']} does not exist", "model_not_found")
        for name in self.refused & body.keys():
            return _error(400, f"Unsupported parameter: {name}", "unsupported_parameter")
        if body.get("n", 1) > self.largest_n:
            return _error(400, f"n must be at most {self.largest_n}")
        n_prompt = sum(len(message["content"].split()) for message in body["messages"])
        if n_prompt > (self.max_model_len or 10**9):
            return _error(400, f"This model's maximum context length is {self.max_model_len}.")
        return None

    def _choice(self, body: dict[str, Any], index: int) -> dict[str, Any]:
        seed = body.get("seed", len(self.bodies)) + (0 if self.copies else index)
        text, tokens = self.answer(seed)
        entries = [*tokens, END] if self.tells_end_token else tokens
        choice = {
            "index": index,
            "message": {"role": "assistant", "content": text, **self.message},
            "finish_reason": self.finish(seed) or "stop",
            "logprobs": None,
        }
        if self.tells_end_token:
            choice["stop_reason"] = None
        if body.get("logprobs") and self.has_logprobs:
            k = body.get("top_logprobs", 0)
            top = [{"token": word, "logprob": -2.0} for word in WORDS[:k]]
            choice["logprobs"] = {
                "content": [
                    {"token": token, "logprob": -0.5 * (at + 1), "bytes": None, "top_logprobs": top}
                    for at, token in enumerate(entries)
                ]
            }
        return choice

    def _choices(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        return [self._choice(body, i) for i in range(1 if self.ignores_n else body.get("n", 1))]

    def _usage(self, body: dict[str, Any], choices: list[dict[str, Any]]) -> dict[str, int]:
        seeds = [body.get("seed", len(self.bodies)) + choice["index"] for choice in choices]
        return {
            "prompt_tokens": 11,
            "completion_tokens": sum(len(self.answer(seed)[1]) + 1 for seed in seeds),
        }

    async def _whole(self, body: dict[str, Any], fault: Fault) -> Response:
        with self._counted():
            if fault.hang:
                await asyncio.Event().wait()
            await self.released.wait()
            choices = self._choices(body)
            reply = {"choices": choices, "usage": self._usage(body, choices)}
            return Response(json.dumps(reply, ensure_ascii=False), media_type="application/json")

    async def _stream(self, body: dict[str, Any], fault: Fault) -> AsyncIterator[bytes]:
        with self._counted():
            if fault.hang:
                await asyncio.Event().wait()
            choices = self._choices(body)
            yield b": a comment\n\n"
            for choice in choices:
                delta = {"role": "assistant", "content": ""}
                yield _event({"choices": [{"index": choice["index"], "delta": delta}]})
            if not self.last_held:
                await self.released.wait()
            for n_done, index in enumerate(self.order(len(choices))):
                choice = choices[index]
                if not self.streams_logprobs:
                    choice["logprobs"] = None
                if fault.cut_after == n_done:
                    raise RuntimeError("the upstream breaks")
                if n_done == len(choices) - 1:
                    await self.released.wait()
                for chunk in _chunks(choice):
                    yield _event({"choices": [chunk]})
            if self.streams_usage and body.get("stream_options", {}).get("include_usage"):
                yield _event({"choices": [], "usage": self._usage(body, choices)})
            yield b"data: [DONE]\n\n"

    @contextlib.contextmanager
    def _counted(self):
        self.n_active += 1
        self.n_peak = max(self.n_peak, self.n_active)
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            self.n_left += 1
            raise
        finally:
            self.n_active -= 1


def _chunks(choice: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the choice a token a chunk; the end token's is the last."""
    index, text = choice["index"], choice["message"]["content"]
    entries = choice["logprobs"]["content"] if choice["logprobs"] else []
    pieces = [text] if not entries else [entry["token"] for entry in entries]
    chunks = []
    for at, piece in enumerate(pieces):
        delta = {} if piece == END else {"content": piece}
        logprobs = {"content": [entries[at]]} if entries else None
        chunks.append({"index": index, "delta": delta, "logprobs": logprobs})
    last = {"index": index, "delta": {}} if pieces[-1] != END else chunks.pop()
    last["finish_reason"] = choice["finish_reason"]
    if "stop_reason" in choice:
        last["stop_reason"] = choice["stop_reason"]
    return [*chunks, last]


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def _error(
    status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    error = {"message": message, "type": "invalid_request_error", "code": code}
    return JSONResponse({"error": error}, status, headers)


@asynccontextmanager
async def listening(app: Any) -> AsyncIterator[str]:
    """Serve an app on a free loopback port, in this loop; gives its ``/v1`` address."""
    config = uvicorn.Config(
        app, port=0, lifespan="off", ws="none", log_level="critical", timeout_graceful_shutdown=2
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        await serving
