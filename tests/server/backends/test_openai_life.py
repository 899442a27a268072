"""The backend in front of an upstream from start to end: its connections, its health, its logs."""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import aclosing

import numpy as np
import pytest
from pydantic import SecretStr

from server.backends.base import (
    BackendUnavailableError,
    ModelLoadError,
    PromptError,
    SamplingSettings,
    UpstreamError,
)
from server.backends.openai_remote import OpenAIRemoteBackend
from tests.server.backends.fake_upstream import FakeUpstream, Fault, listening
from tests.server.backends.upstream_backend import HELLO, connected, draw
from tests.server.waiting import until

pytestmark = pytest.mark.usefixtures("_quick_pauses")


# as they finish; leaving


async def test_a_finished_answer_does_not_wait_for_the_others():
    upstream = FakeUpstream()
    async with connected(upstream) as backend:
        upstream.released.clear()
        upstream.last_held = True
        prompt = await backend.render(HELLO)
        stream = backend.generate(prompt, 4, SamplingSettings(), 1)
        async with aclosing(stream):
            first = [await anext(stream) for _ in range(3)]
            assert upstream.n_active == 1
            assert [one.index for one in first] == [3, 2, 1]
            upstream.released.set()
            assert (await anext(stream)).index == 0


@pytest.mark.parametrize("size", ["auto", 1])
@pytest.mark.parametrize("how", ["close", "cancel"])
async def test_leaving_closes_the_connections(size, how):
    upstream = FakeUpstream()
    async with connected(upstream, n_per_request=size) as backend:
        upstream.released.clear()
        for _ in range(5):
            drawing = asyncio.create_task(draw(backend, 4))
            await until(lambda: upstream.n_active == (1 if size == "auto" else 4))
            drawing.cancel()
            if how == "cancel":
                await asyncio.sleep(0)
                drawing.cancel()  # twice, as when a server shuts down meanwhile
            await asyncio.gather(drawing, return_exceptions=True)
            await until(lambda: upstream.n_active == 0)
        upstream.released.set()
        assert len(await draw(backend, 4)) == 4
    assert upstream.n_left == 5 * (1 if size == "auto" else 4)


async def test_places_of_those_who_leave_are_free_again():
    """Also of those who wait for a connection, or whose connection is being made."""
    upstream = FakeUpstream()
    rng = np.random.default_rng(0)
    async with connected(upstream, n_per_request=1, max_connections=3) as backend:
        upstream.released.clear()
        for _ in range(60):
            drawing = asyncio.create_task(draw(backend, 8))
            for _ in range(int(rng.integers(0, 12))):
                await asyncio.sleep(0)
            drawing.cancel()
            await asyncio.gather(drawing, return_exceptions=True)
        await until(lambda: upstream.n_active == 0)
        upstream.released.set()
        assert len(await draw(backend, 8)) == 8


async def test_connections_are_limited_and_used_again():
    upstream = FakeUpstream()
    async with connected(upstream, n_per_request=1, max_connections=3, timeout_s=60) as backend:
        upstream.released.clear()
        drawing = asyncio.gather(*(draw(backend, 8, seed=i) for i in range(6)))
        await until(lambda: upstream.n_active == 3)
        upstream.released.set()
        many = await drawing
    assert [len(found) for found in many] == [8] * 6
    assert upstream.n_peak == 3


# start, health, end


@pytest.mark.parametrize(
    ("habit", "options", "says"),
    [
        ({"key": "right"}, {"api_key": SecretStr("wrong")}, "refuses this server's API key"),
        ({}, {"model": "other"}, r"404.*it lists up/model"),
        ({"has_logprobs": False}, {"features": ["logprobs"]}, "log-probabilities"),
        ({"ignores_n": True}, {"n_per_request": 8}, "n_per_request"),
        ({"refused": {"messages"}}, {}, "Unsupported parameter: messages"),
    ],
)
async def test_what_stops_the_start(habit, options, says):
    with pytest.raises(ModelLoadError, match=says) as caught:
        async with connected(FakeUpstream(**habit), **options):
            pass
    assert "wrong" not in str(caught.value)
    assert "sk-" not in str(caught.value)


async def test_nobody_listens():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        backend = OpenAIRemoteBackend(f"http://127.0.0.1:{probe.getsockname()[1]}/v1")
        with pytest.raises(ModelLoadError, match="cannot be reached"):
            await backend.start()
        await backend.close()


async def test_trouble_shows_in_health_and_ends_by_itself():
    upstream = FakeUpstream(key="right")
    async with connected(upstream, api_key=SecretStr("right")) as backend:
        upstream.key = "another"
        with pytest.raises(UpstreamError, match="API key"):
            await draw(backend)
        health = backend.health()
        assert health["state"] == "failing"
        assert "refuses the API key" in health["reason"]
        n_before = len(upstream.bodies)
        upstream.faults.extend([Fault(503)] * 2)
        upstream.key = "right"
        await until(lambda: backend.health() == {"state": "ok"})
        assert len(upstream.bodies) >= n_before + 3
        assert upstream.bodies[-1]["max_tokens"] == 1
        assert len(await draw(backend)) == 4


async def test_the_upstream_goes_and_comes_back():
    upstream = FakeUpstream()
    async with listening(upstream.app) as url:
        backend = OpenAIRemoteBackend(url)
        await backend.start()
    with pytest.raises(BackendUnavailableError, match="cannot be reached"):
        await draw(backend)
    assert backend.health()["state"] == "failing"
    await backend.close()
    assert backend.health() == {"state": "stopped"}


async def test_closing_ends_requests_in_flight():
    upstream = FakeUpstream()
    async with connected(upstream) as backend:
        upstream.released.clear()
        drawing = asyncio.create_task(draw(backend))
        await until(lambda: upstream.n_active == 1)
        await backend.close()
        with pytest.raises(BackendUnavailableError, match="shutting down"):
            await drawing
        await until(lambda: upstream.n_active == 0)
        with pytest.raises(BackendUnavailableError):
            await draw(backend)
        await backend.close()


async def test_the_fingerprint_holds_over_restarts_and_tells_models_apart():
    upstream = FakeUpstream()
    async with listening(upstream.app) as url:
        prints = []
        for options in ({}, {}, {"extra_body": {"chat_template_kwargs": {"thinking": False}}}):
            backend = OpenAIRemoteBackend(url, **options)
            await backend.start()
            prints.append(backend.fingerprint)
            await backend.close()
        upstream.model = "up/other"
        backend = OpenAIRemoteBackend(url)
        await backend.start()
        prints.append(backend.fingerprint)
        await backend.close()
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("127.0.0.1:8000/v1", {}),
        ("ftp://host/v1", {}),
        ("http://user:pass@host/v1", {}),
        ("https://host/v1?key=1", {}),
        ("http://host:port/v1", {}),
        ("http://host/v1", {"min_share": 0}),
        ("http://host/v1", {"n_per_request": 0}),
        ("http://host/v1", {"extra_body": {"n": 3}}),
    ],
)
def test_mistakes_in_the_options(url, options):
    with pytest.raises(ValueError, match=r"address|min_share|n_per_request|extra_body") as caught:
        OpenAIRemoteBackend(url, **options)
    assert "pass" not in str(caught.value).replace("password", "")


async def test_logs_hold_no_texts_and_no_key(caplog):
    caplog.set_level(logging.DEBUG)
    upstream = FakeUpstream(key="sk-very-secret")
    async with connected(upstream, api_key=SecretStr("sk-very-secret")) as backend:
        upstream.faults.append(Fault(500, "Tell me more."))
        found = await draw(backend)
        upstream.faults.extend([Fault(400, "Tell me more.")] * 2)
        with pytest.raises(PromptError):
            await draw(backend)
    assert upstream.headers[0]["authorization"] == "Bearer sk-very-secret"
    ours = [r for r in caplog.records if r.name.startswith(("server", "httpx", "httpcore"))]
    text = "\n".join(record.getMessage() for record in ours)
    assert "sk-very" not in text
    assert "Tell me" not in text
    assert all(one.text not in text for one in found if len(one.text) > 20)
