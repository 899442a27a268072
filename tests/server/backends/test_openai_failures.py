"""Upstreams that fail, refuse, hang or answer nonsense: what is tried again, what is told."""

from __future__ import annotations

import json
from email.utils import formatdate
from time import time

import pytest

from rewards import Message
from server.backends.base import (
    BackendUnavailableError,
    ContextLengthError,
    PromptError,
    UpstreamBusyError,
    UpstreamError,
    UpstreamTimeoutError,
)
from tests.server.backends.fake_upstream import FakeUpstream, Fault
from tests.server.backends.upstream_backend import connected, draw
from tests.server.waiting import until

pytestmark = pytest.mark.usefixtures("_quick_pauses")


@pytest.mark.parametrize("size", ["auto", 1])
@pytest.mark.parametrize(
    "fault",
    [
        Fault(429, headers={"Retry-After": "0"}),
        Fault(429, headers={"Retry-After": formatdate(time() - 5)}),
        Fault(429, headers={"Retry-After": "soon"}),
        Fault(500),
        Fault(503, body="<html>upstream connect error</html>"),
        Fault(body='{"error": {"message": "engine", "code": 500}}'),
        Fault(body="half a {"),
        Fault(cut_after=0),
    ],
    ids=["429", "429 date", "429 nonsense", "500", "503 page", "error in 200", "no JSON", "cut"],
)
async def test_what_may_succeed_is_tried_again(fault, size):
    upstream = FakeUpstream()
    async with connected(upstream, n_per_request=size) as backend:
        upstream.faults.extend([fault, fault])
        assert len(await draw(backend, 4)) == 4
        # A reply that is no stream cannot be cut.
        n_faults = 0 if fault.cut_after is not None and size == 1 else 2
        assert len(upstream.bodies) == (1 if size == "auto" else 4) + n_faults
        assert backend.health() == {"state": "ok"}


async def test_only_what_is_missing_is_asked_for_again():
    upstream = FakeUpstream()
    async with connected(upstream) as backend:
        whole = await draw(backend, 8)
        upstream.bodies.clear()
        upstream.faults.append(Fault(cut_after=3))
        assert await draw(backend, 8) == whole
        first, *again = upstream.bodies
        assert [(body["seed"] - first["seed"], body.get("n")) for body in again] == [(0, 5)]
        # With gaps, each run of those that are missing.
        upstream.bodies.clear()
        upstream.order = lambda n: [1, 3, 6, 0, 2, 4, 5, 7][:n] if n == 8 else range(n)
        upstream.faults.append(Fault(cut_after=3))
        found = await draw(backend, 8)
        assert [(one.text, one.tokens) for one in found] == [(o.text, o.tokens) for o in whole]
        first, *again = upstream.bodies
        asked = [(body["seed"] - first["seed"], body.get("n")) for body in again]
        assert asked == [(0, None), (2, None), (4, 2), (7, None)]


@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [
        (Fault(429, headers={"Retry-After": "0"}), UpstreamBusyError, "no more requests"),
        (Fault(429, code="insufficient_quota"), UpstreamError, "insufficient_quota"),
        (Fault(500, "boom"), UpstreamError, "answered 500"),
        (Fault(503), BackendUnavailableError, "unavailable"),
        (
            Fault(301, headers={"Location": "http://elsewhere.test/"}),
            UpstreamError,
            "301; redirects",
        ),
        (Fault(404), UpstreamError, "404"),
        (Fault(403), UpstreamError, "key"),
        (Fault(body="[]"), UpstreamError, "form"),
        (Fault(body='{"choices": []}'), UpstreamError, "left out"),
        (Fault(400, "temperature is not supported"), PromptError, "temperature is not supported"),
        (Fault(422, "bad role"), PromptError, "bad role"),
        (Fault(400, "x", code="context_length_exceeded"), ContextLengthError, "x"),
        (
            Fault(400, "the request exceeds the available context size"),
            ContextLengthError,
            "context size",
        ),
    ],
)
async def test_each_failure_has_its_error(fault, kind, says, caplog):
    upstream = FakeUpstream()
    async with connected(upstream) as backend:
        upstream.faults.extend([fault] * 10)
        with pytest.raises(kind, match=says):
            await draw(backend, 2)
        upstream.faults.clear()
        assert len(await draw(backend, 2)) == 2
    assert "boom" not in caplog.text


async def test_a_long_pause_is_passed_on_not_waited_for():
    upstream = FakeUpstream()
    async with connected(upstream) as backend:
        upstream.faults.append(Fault(429, headers={"Retry-After": "86400"}))
        with pytest.raises(UpstreamBusyError) as caught:
            await draw(backend)
    assert caught.value.retry_after_s == 86400
    assert len(upstream.bodies) == 1


async def test_a_hanging_upstream_is_given_up_and_left():
    upstream = FakeUpstream()
    async with connected(upstream) as backend:
        upstream.faults.append(Fault(hang=True))
        usual, backend._upstream._timeout_s = backend._upstream._timeout_s, 0.3
        with pytest.raises(UpstreamTimeoutError, match=r"0\.3 s"):
            await draw(backend)
        backend._upstream._timeout_s = usual
        await until(lambda: upstream.n_active == 0)
        assert len(upstream.bodies) == 1  # not tried again
        assert len(await draw(backend)) == 4


async def test_too_long_a_conversation():
    long = (Message(role="user", content="word " * 300),)
    async with connected(FakeUpstream()) as backend:
        with pytest.raises(ContextLengthError, match="maximum context length is 256"):
            await draw(backend, messages=long)


async def test_answers_of_some_are_served_and_told(caplog):
    upstream = FakeUpstream()
    async with connected(upstream, n_per_request=1, max_retries=0) as backend:
        upstream.faults.extend([Fault(500), Fault(hang=True), Fault(500)])
        backend._upstream._timeout_s = 0.3
        found = await draw(backend, 8)
        assert len(found) == 5
        assert len({one.index for one in found}) == 5
        assert "3 of 8 candidates did not come" in caplog.text
        upstream.faults.extend([Fault(500)] * 5)
        with pytest.raises(UpstreamError, match="answered 500"):
            await draw(backend, 8)
        await until(lambda: upstream.n_active == 0)


async def test_a_refusal_is_no_partial_failure():
    upstream = FakeUpstream()
    async with connected(upstream, n_per_request=1) as backend:
        upstream.faults.append(Fault(400, "bad role"))
        with pytest.raises(PromptError, match="bad role"):
            await draw(backend, 8)


async def test_malformed_choices_are_an_error():
    upstream = FakeUpstream()
    async with connected(upstream, max_retries=0) as backend:
        for choice in (
            {"index": -1, "message": {"content": "a"}, "finish_reason": "stop"},
            {"index": "0", "message": {"content": "a"}, "finish_reason": "stop"},
            {"index": 0, "message": {"content": ["a"]}, "finish_reason": "stop"},
            {"index": 0, "message": {"content": "a"}, "finish_reason": {}},
            {"index": 0, "message": {"content": "a"}, "finish_reason": None},
            {"index": 0, "message": {"tool_calls": [{}]}, "finish_reason": "stop"},
        ):
            upstream.faults.append(Fault(body=json.dumps({"choices": [choice]})))
            with pytest.raises(UpstreamError, match=r"form|left out"):
                await draw(backend, 1)


async def test_filtered_answers_are_no_candidates():
    upstream = FakeUpstream()
    async with connected(upstream) as backend:
        base = (await draw(backend, 8)) and upstream.bodies[0]["seed"]
        upstream.finish = lambda seed: "content_filter" if seed in (base, base + 5) else None
        found = await draw(backend, 8)
        assert [one.index for one in found] == [1, 2, 3, 4, 6, 7]
        upstream.finish = lambda seed: "content_filter"
        with pytest.raises(UpstreamError, match="content_filter"):
            await draw(backend, 8)
