"""Stopping: what runs is finished, what comes is sent elsewhere, and nothing takes for ever."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import pytest

from server import embedded
from server.draining import EXEMPT_PATHS, Drain, DrainingError, Lifetime
from tests.server.conftest import run_fake
from tests.server.fakes import FakeBackend
from tests.server.waiting import time_is_up, until

SHORT = {"targets": {"words": {"at_most": 8.0}}, "candidates": 4}


def events(text):
    found = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data")]
    return [line if line == "[DONE]" else json.loads(line) for line in found]


@pytest.fixture
async def held(tmp_path, settings):
    """An app whose backend answers when it is released."""
    async with run_fake(tmp_path, settings, FakeBackend(hold=True)) as running:
        yield running


async def start(running, **body):
    """Return a request that is being generated."""
    before = running.backend.n_started
    task = asyncio.create_task(running.chat(**body))
    await until(lambda: running.backend.n_started > before)
    return task


# draining


async def test_ready_turns_red_and_probes_answer(running):
    assert (await running.client.get("/ready")).json()["status"] == "ready"
    running.context.drain.begin(30)
    reply = await running.client.get("/ready")
    assert (reply.status_code, reply.json()["status"]) == (503, "draining")
    for path in EXEMPT_PATHS - {"/ready"}:
        assert (await running.client.get(path)).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/palette/values", "/nothing", "/docs"])
async def test_what_comes_is_sent_elsewhere(running, path):
    running.context.drain.begin(12.5)
    reply = await running.client.get(path)
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "13"
    assert reply.headers["connection"] == "close"
    assert reply.json()["error"]["code"] == "draining"
    assert reply.headers["x-request-id"]


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("palette", [SHORT, None], ids=["palette", "bare"])
async def test_what_runs_is_finished(held, stream, palette):
    drain = held.context.drain
    task = await start(held, stream=stream, palette=palette)
    assert drain.n_running == 1
    drain.begin(30)
    assert not drain.is_done
    assert (await held.chat()).status_code == 503
    held.backend.released.set()
    reply = await task
    assert reply.status_code == 200
    assert not stream or events(reply.text)[-1] == "[DONE]"
    assert drain.n_running == 0
    assert drain.is_done
    assert held.backend.n_cancelled == 0


async def test_what_waits_in_the_queue_is_finished_too(tmp_path, settings):
    backend = FakeBackend(hold=True)
    small = settings.model_copy(update={"max_running": 1})
    async with run_fake(tmp_path, small, backend) as running:
        tasks = [await start(running), asyncio.create_task(running.chat())]
        await until(lambda: running.context.aligner.admission.n_waiting == 1)
        running.context.drain.begin(30)
        backend.released.set()
        assert [(await task).status_code for task in tasks] == [200, 200]


async def test_what_does_not_finish_is_cut(held):
    drain = held.context.drain
    plain, stream = await start(held), await start(held, stream=True)
    drain.begin(0)
    assert drain.is_done
    drain.cut()
    drain.cut()  # a second time changes nothing
    reply = await plain
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "draining")
    assert reply.headers["retry-after"] == "1"
    (error,) = events((await stream).text)
    assert error["error"]["code"] == "draining"
    assert held.backend.n_cancelled == 2
    assert held.context.aligner.admission.n_running == 0


async def test_a_request_already_over_its_time_is_let_be():
    """Its generation is being cancelled, which may take a moment."""
    unwinding, released = asyncio.Event(), asyncio.Event()

    async def app(scope, receive, send):
        try:
            await asyncio.Event().wait()
        finally:
            unwinding.set()
            await released.wait()

    drain = Drain()
    lifetime = Lifetime(app, drain, timeout_s=0.01)
    task = asyncio.create_task(lifetime({"type": "http", "path": "/"}, None, None))
    await unwinding.wait()
    drain.begin(0)
    drain.cut()
    assert drain.n_running == 1
    released.set()
    with pytest.raises(DrainingError):
        await task
    assert drain.n_running == 0


async def test_the_first_signal_sets_the_time(running):
    drain = running.context.drain
    drain.begin(10)
    drain.begin(1000)
    assert 1 <= drain.retry_after_s <= 10


# the time of a request


@pytest.mark.parametrize("palette", [SHORT, None], ids=["palette", "bare"])
async def test_a_request_that_takes_too_long(held, palette):
    task = await start(held, palette=palette)
    time_is_up(held.context.drain)
    reply = await task
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (504, "request_timeout")
    assert error["type"] == "server_error"
    assert "request_timeout_s" in error["message"]
    assert held.backend.n_cancelled == 1
    assert held.context.aligner.admission.n_running == 0
    held.backend.released.set()
    assert (await held.chat(palette=palette)).status_code == 200


async def test_a_stream_that_takes_too_long(held):
    task = await start(held, stream=True)
    time_is_up(held.context.drain)
    reply = await task
    assert reply.status_code == 200
    (error,) = events(reply.text)
    assert error["error"]["code"] == "request_timeout"
    assert held.backend.n_cancelled == 1


@pytest.fixture
async def hurried(tmp_path, settings):
    """As `held`, and a request may take a twentieth of a second."""
    quick = settings.model_copy(update={"request_timeout_s": 0.05})
    async with run_fake(tmp_path, quick, FakeBackend(hold=True)) as running:
        yield running


async def test_the_queue_counts_too(hurried):
    admission = hurried.context.aligner.admission
    requests = [hurried.chat() for _ in range(admission.max_running + 1)]
    replies = await asyncio.gather(*requests)
    assert {reply.status_code for reply in replies} == {504}
    assert "(0.05 s)" in replies[0].json()["error"]["message"]
    assert (admission.n_running, admission.n_waiting) == (0, 0)


async def test_a_body_that_never_ends(hurried):
    async def body():
        yield b"{"
        await asyncio.Event().wait()

    reply = await hurried.client.post("/v1/chat/completions", content=body())
    assert reply.status_code == 504


async def test_another_timeout_is_no_504(running):
    running.backend.failure = TimeoutError("of something else")
    reply = await running.chat()
    assert reply.json()["error"]["code"] == "internal_error"


# a real server


@contextmanager
def serving(folder, **environment):
    """A server with the embedded models, one request at a time; gives process and address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "log"
    common = {"STATE_DIR": str(folder), "MAX_RUNNING": "1", "LOG_LEVEL": "debug"}
    environment = {"DRAIN_TIMEOUT_S": "120"} | common | environment
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "server", "serve", "--port", str(port)],
            stderr=stderr,
            env={**os.environ, **{f"PALETTE_{key}": text for key, text in environment.items()}},
        )
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                httpx.get(f"{url}/ready").raise_for_status()
                break
            except httpx.TransportError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
        yield process, url, log
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


QUESTION = "How do I keep my canary alive?"


def body(**fields):
    palette = {"targets": {"helpful": "keep"}, "candidates": 32}
    messages = [{"role": "user", "content": QUESTION}]
    model = embedded.CHAT_MODEL_NAME
    return {"model": model, "messages": messages, "palette": palette, **fields}


@contextmanager
def busy(url, n_ahead=6):
    """A stream behind other requests: it has begun, and has a second or more to go."""
    with httpx.Client(base_url=url, timeout=60) as client:
        ahead = [
            client.send(
                client.build_request("POST", "/v1/chat/completions", json=body(stream=True)),
                stream=True,
            )
            for _ in range(n_ahead)
        ]
        with client.stream("POST", "/v1/chat/completions", json=body(stream=True)) as stream:
            lines = stream.iter_lines()
            assert next(lines) == ": choosing"
            yield lines
        for one in ahead:
            one.close()


def rest(lines):
    return events("\n".join(lines))


def test_a_stream_is_finished_before_the_server_stops(tmp_path):
    with serving(tmp_path) as (process, url, log):
        with busy(url) as lines:
            process.terminate()
            while (reply := httpx.get(f"{url}/ready")).status_code == 200:
                pass  # the signal is under way
            assert reply.json()["status"] == "draining"
            assert reply.json()["running"] + reply.json()["waiting"] > 0
            refused = httpx.post(f"{url}/v1/chat/completions", json=body())
            assert refused.status_code == 503
            assert 1 <= int(refused.headers["retry-after"]) <= 120
            assert refused.headers["connection"] == "close"
            found = rest(lines)
        assert found[-1] == "[DONE]"
        assert found[-2]["palette"]["status"] == "met"
        assert process.wait(timeout=20) == 0
        text = log.read_text()
    assert "Traceback" not in text
    assert text.count("POST /v1/chat/completions 200") == 7
    # The log is at debug, and holds neither the question nor an answer.
    assert "canary" not in text
    answer = "".join(event["choices"][0]["delta"].get("content", "") for event in found[:-1])
    assert answer
    assert answer[:20] not in text


def test_a_second_signal_does_not_wait(tmp_path):
    with serving(tmp_path) as (process, url, log), busy(url) as lines:
        process.send_signal(signal.SIGINT)
        while httpx.get(f"{url}/ready").status_code == 200:
            pass
        process.send_signal(signal.SIGINT)
        assert rest(lines)[-1]["error"]["code"] == "draining"
        assert process.wait(timeout=20) == 0
    assert "Traceback" not in log.read_text()


def test_the_wait_has_an_end(tmp_path):
    with serving(tmp_path, DRAIN_TIMEOUT_S="0") as (process, url, log), busy(url) as lines:
        process.terminate()
        assert rest(lines)[-1]["error"]["code"] == "draining"
        assert process.wait(timeout=20) == 0
    assert "Traceback" not in log.read_text()
