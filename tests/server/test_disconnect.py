"""A client that leaves takes its work with it: behind a real socket, plain and streamed."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import asynccontextmanager

import pytest
import uvicorn

from tests.server.conftest import chat_body, run_fake
from tests.server.fakes import FakeBackend
from tests.server.waiting import until

SHORT = {"targets": {"words": {"at_most": 8.0}}, "candidates": 4}


@asynccontextmanager
async def listening(folder, settings, backend):
    """Run the app behind uvicorn in this loop; yields the app's parts and the port."""
    async with run_fake(folder, settings, backend) as running:
        config = uvicorn.Config(
            running.app, port=0, lifespan="off", ws="none", log_level="warning",
            timeout_graceful_shutdown=2,
        )  # fmt: skip
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        await until(lambda: server.started)
        try:
            yield running, server.servers[0].sockets[0].getsockname()[1]
        finally:
            server.should_exit = True
            await serving


async def connect(port, body, path="/v1/chat/completions"):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    await writer.drain()
    return reader, writer


async def answer(port, body):
    """Return status and body of a request whose client stays."""
    reader, writer = await connect(port, body)
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    content = json.loads(await reader.readexactly(length))
    writer.close()
    await writer.wait_closed()
    return int(head.split()[1]), content


async def leave(writer, *, abruptly=False):
    if abruptly:
        writer.transport.abort()
    writer.close()
    await asyncio.gather(writer.wait_closed(), return_exceptions=True)


@pytest.mark.parametrize("abruptly", [False, True], ids=["close", "reset"])
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("palette", [SHORT, None], ids=["palette", "bare"])
async def test_leaving_cancels_the_generation(tmp_path, settings, stream, palette, abruptly):
    backend = FakeBackend(hold=True)
    async with listening(tmp_path, settings, backend) as (running, port):
        reader, writer = await connect(port, chat_body(palette=palette, stream=stream))
        await until(lambda: backend.n_started == 1)
        if stream:
            assert b" 200 OK" in await reader.readuntil(b": choosing\n\n")
        admission = running.context.aligner.admission
        assert admission.n_running == 1
        await leave(writer, abruptly=abruptly)
        await until(lambda: backend.n_cancelled == 1)
        await until(lambda: admission.n_running == 0)
        backend.released.set()
        status, body = await answer(port, chat_body(palette=palette))
        assert status == 200
        assert body["choices"]
    assert backend.n_cancelled == 1


async def test_leaving_between_two_comments_of_a_stream(tmp_path, settings):
    backend = FakeBackend(hold=True)
    quick = settings.model_copy(update={"keepalive_s": 0.02})
    async with listening(tmp_path, quick, backend) as (_, port):
        reader, writer = await connect(port, chat_body(palette=SHORT, stream=True))
        for _ in range(3):
            await reader.readuntil(b": still choosing\n\n")
        await leave(writer)
        await until(lambda: backend.n_cancelled == 1)


async def test_leaving_while_the_answer_streams(tmp_path, settings, monkeypatch):
    """The answer is chosen by then: nothing runs on, and the next request is served."""
    backend = FakeBackend()
    async with listening(tmp_path, settings, backend) as (running, port):
        for _ in range(10):
            reader, writer = await connect(port, chat_body(stream=True, n=8))
            await reader.readuntil(b"data: ")
            await leave(writer, abruptly=True)
        assert (await answer(port, chat_body()))[0] == 200
        assert running.context.aligner.admission.n_running == 0
    assert backend.n_cancelled == 0


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_leaving_the_queue(tmp_path, settings, stream):
    backend = FakeBackend(hold=True)
    small = settings.model_copy(update={"max_running": 1, "max_queue": 1})
    async with listening(tmp_path, small, backend) as (running, port):
        admission = running.context.aligner.admission
        _, first = await connect(port, chat_body())
        await until(lambda: backend.n_started == 1)
        _, second = await connect(port, chat_body(stream=stream))
        await until(lambda: admission.n_waiting == 1)
        assert (await answer(port, chat_body()))[0] == 429
        await leave(second)
        await until(lambda: admission.n_waiting == 0)
        # The place in the queue is free again, and its next holder is served.
        third = asyncio.create_task(answer(port, chat_body()))
        await until(lambda: admission.n_waiting == 1)
        await leave(first)
        await until(lambda: backend.n_cancelled == 1)
        backend.released.set()
        assert (await third)[0] == 200
        await until(lambda: admission.n_running == 0)
    assert backend.n_started == 2


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_leaving_cancels_the_scoring(tmp_path, settings, stream, monkeypatch):
    backend = FakeBackend()
    async with listening(tmp_path, settings, backend) as (running, port):
        scoring, cancelled = [], []

        async def attempt(samples, may_fail, names=None, *, more):
            scoring.append(len(samples))
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(len(samples))
                raise

        monkeypatch.setattr(running.context.aligner.rewards, "attempt", attempt)
        _, writer = await connect(port, chat_body(palette=SHORT, stream=stream))
        await until(lambda: len(scoring) == 4)
        await leave(writer)
        await until(lambda: len(cancelled) == 4)
        await until(lambda: running.context.aligner.admission.n_running == 0)


async def test_leaving_the_score_route(tmp_path, settings, monkeypatch):
    async with listening(tmp_path, settings, FakeBackend()) as (running, port):
        found = []

        async def score(samples, names=None):
            found.append("scoring")
            try:
                await asyncio.Event().wait()
            finally:
                found.append("ended")

        monkeypatch.setattr(running.context.aligner.rewards, "score", score)
        body = {"messages": [{"role": "user", "content": "hi"}], "answers": ["a"]}
        _, writer = await connect(port, body, "/v1/palette/score")
        await until(lambda: found == ["scoring"])
        await leave(writer)
        await until(lambda: found == ["scoring", "ended"])


async def test_many_leave_and_nothing_is_left_behind(tmp_path, settings, caplog):
    backend = FakeBackend(hold=True)
    caplog.set_level(logging.WARNING)
    async with listening(tmp_path, settings, backend) as (running, port):
        caplog.clear()
        bodies = [chat_body(palette=SHORT, stream=bool(i % 2), seed=i) for i in range(24)]
        connections = [await connect(port, body) for body in bodies]
        await until(lambda: backend.n_started == 24)
        for _, writer in connections:
            await leave(writer, abruptly=True)
        admission = running.context.aligner.admission
        await until(lambda: admission.n_running == 0)
        assert backend.n_cancelled == 24
        assert (await running.client.get("/ready")).json()["running"] == 0
        # A client that leaves is no fault of the server's: no traceback, no error.
        assert caplog.records == []
        backend.released.set()
        assert (await answer(port, chat_body(palette=SHORT)))[0] == 200


async def test_the_others_go_on(tmp_path, settings):
    backend = FakeBackend(hold=True)
    async with listening(tmp_path, settings, backend) as (_, port):
        staying = [
            asyncio.create_task(answer(port, chat_body(palette=SHORT, seed=i))) for i in range(4)
        ]
        _, writer = await connect(port, chat_body(palette=SHORT))
        await until(lambda: backend.n_started == 5)
        await leave(writer)
        await until(lambda: backend.n_cancelled == 1)
        backend.released.set()
        assert [(await one)[0] for one in staying] == [200] * 4
    assert backend.n_cancelled == 1
