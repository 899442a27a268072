"""The backend in front of the fake upstream, and what it draws from there."""

from __future__ import annotations

from contextlib import aclosing, asynccontextmanager

from rewards import Message
from server.backends.base import SamplingSettings
from server.backends.openai_remote import OpenAIRemoteBackend
from tests.server.backends.fake_upstream import FakeUpstream, listening

HELLO = (Message(role="user", content="Tell me more."),)


@asynccontextmanager
async def connected(upstream: FakeUpstream, **options):
    """A started backend; what the start asked is forgotten."""
    async with listening(upstream.app) as url:
        backend = OpenAIRemoteBackend(url, **options)
        try:
            await backend.start()
            upstream.bodies.clear()
            upstream.headers.clear()
            upstream.n_peak = 0
            yield backend
        finally:
            await backend.close()


async def draw(backend, n=4, *, messages=HELLO, sampling=None, seed=1, tools=None, **options):
    prompt = await backend.render(messages, tools)
    stream = backend.generate(prompt, n, sampling or SamplingSettings(), seed, **options)
    async with aclosing(stream):
        found = [candidate async for candidate in stream]
    return sorted(found, key=lambda candidate: candidate.index)
