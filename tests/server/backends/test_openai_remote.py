"""The backend in front of a server that speaks OpenAI's protocol, well or badly."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import socket
from contextlib import aclosing, asynccontextmanager
from email.utils import formatdate
from time import time

import numpy as np
import pytest
from pydantic import SecretStr

from rewards import Message
from server.backends import openai_remote, openai_transport
from server.backends.base import (
    BackendUnavailableError,
    ContextLengthError,
    ModelLoadError,
    PromptError,
    SamplingSettings,
    Tools,
    UpstreamBusyError,
    UpstreamError,
    UpstreamTimeoutError,
)
from server.backends.openai_remote import OpenAIRemoteBackend
from server.calibrator import calibrate
from tests.server.backends.fake_upstream import FakeUpstream, Fault, listening
from tests.server.conftest import run_fake
from tests.server.fakes import lexical_rewards
from tests.server.waiting import until

HELLO = (Message(role="user", content="Tell me more."),)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(openai_transport, "_FIRST_DELAY_S", 0.001)
    monkeypatch.setattr(openai_remote, "_FIRST_CHECK_S", 0.005)


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


# what is asked, and what comes


async def test_one_request_for_all_where_the_upstream_has_n():
    upstream = FakeUpstream()
    async with connected(upstream) as backend:
        assert backend.model_id == "up/model"
        assert backend.max_context == 256
        assert {"top_k", "min_p", "logprobs", "tools"} <= backend.features
        found = await draw(backend, 8)
    (body,) = upstream.bodies
    assert body["n"] == 8
    assert body["stream"]
    assert [one.index for one in found] == list(range(8))
    for one in found:
        text, tokens = upstream.answer(body["seed"] + one.index)
        assert one.text == text
        assert [token.token for token in one.tokens] == tokens  # without the end token
        assert [token.logprob for token in one.tokens] == [
            -0.5 * (i + 1) for i in range(len(tokens))
        ]
        assert one.n_tokens == len(tokens) + 1
        assert one.finish_reason == "stop"
    assert [one.n_prompt_tokens for one in found if one.n_prompt_tokens] == [11]


@pytest.mark.parametrize(
    "habit",
    [
        {"refused": {"n"}},
        {"refused": {"stream_options"}},
        {"ignores_n": True},
        {"copies": True},
        {"streams_logprobs": False},
    ],
    ids=["n refused", "stream refused", "n ignored", "n gives copies", "no logprobs in streams"],
)
async def test_parallel_requests_where_it_does_not(habit):
    upstream = FakeUpstream(owned_by="someone", **habit)
    async with connected(upstream) as backend:
        found = await draw(backend, 8)
    assert len(upstream.bodies) == 8
    assert all("n" not in body and "stream" not in body for body in upstream.bodies)
    seeds = sorted(body["seed"] for body in upstream.bodies)
    assert seeds == list(range(seeds[0], seeds[0] + 8))
    assert [one.text for one in found] == [upstream.answer(seeds[0] + i)[0] for i in range(8)]
    assert all(one.n_prompt_tokens == 11 for one in found)
    assert all(one.n_tokens == len(one.tokens) + 1 for one in found)


async def test_candidates_are_the_same_by_n_in_groups_and_in_parallel():
    upstream = FakeUpstream()
    drawn = []
    for size in ("auto", 3, 1):
        async with connected(upstream, n_per_request=size) as backend:
            drawn.append([(one.text, one.tokens) for one in await draw(backend, 8, seed=5)])
            assert len(upstream.bodies) == {"auto": 1, 3: 3, 1: 8}[size]
    assert drawn[0] == drawn[1] == drawn[2]


async def test_seeds_next_to_each_other_share_no_candidate():
    upstream = FakeUpstream()
    async with connected(upstream) as backend:
        for seed in (0, 1, 2, 2**63 - 1):
            await draw(backend, 16, seed=seed)
    seeds = np.array([body["seed"] for body in upstream.bodies])
    assert (np.abs(np.diff(np.sort(seeds))) >= 16).all()
    assert seeds.min() >= 0
    assert seeds.max() < 2**31 - 1024


async def test_an_upstream_without_seeds():
    upstream = FakeUpstream(refused={"seed"})
    async with connected(upstream) as backend:
        assert len(await draw(backend, 4)) == 4
    assert all("seed" not in body for body in upstream.bodies)


async def test_the_newer_name_of_max_tokens():
    upstream = FakeUpstream(refused={"max_tokens"})
    async with connected(upstream) as backend:
        await draw(backend, 2, sampling=SamplingSettings(max_tokens=9))
    assert upstream.bodies[0]["max_completion_tokens"] == 9
    assert "max_tokens" not in upstream.bodies[0]


async def test_a_request_with_too_many_answers_is_asked_in_smaller_ones():
    upstream = FakeUpstream(largest_n=5)
    async with connected(upstream) as backend:
        found = await draw(backend, 16)
        assert len(found) == 16
        assert len({one.index for one in found}) == 16
        upstream.bodies.clear()
        await draw(backend, 16)
        assert all(body.get("n", 1) <= 5 for body in upstream.bodies)  # remembered
        assert len(upstream.bodies) <= 6


async def test_every_field_goes_by_its_name_there():
    upstream = FakeUpstream()
    sampling = SamplingSettings(
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        max_tokens=7,
        stop=("a", "b"),
        min_p=0.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        repetition_penalty=1.1,
        logit_bias=((5, -100.0),),
        json_schema='{"type": "object", "required": ["a"]}',
    )
    async with connected(upstream, extra_body={"chat_template_kwargs": {"a": 1}}) as backend:
        await draw(backend, 2, sampling=sampling, top_logprobs=3)
    (body,) = upstream.bodies
    body.pop("seed")
    assert body == {
        "model": "up/model",
        "messages": [{"role": "user", "content": "Tell me more."}],
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "max_tokens": 7,
        "stop": ["a", "b"],
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": -100.0},
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "answer",
                "schema": {"type": "object", "required": ["a"]},
                "strict": True,
            },
        },
        "chat_template_kwargs": {"a": 1},
        "logprobs": True,
        "top_logprobs": 3,
        "n": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize(
    ("owned_by", "sent"),
    [
        ("vllm", {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}),
        ("llamacpp", {"top_k": -1, "min_p": 0.0}),
        ("palette", {"top_k": 0}),
        ("openai", {}),
    ],
)
async def test_neutral_values_are_sent_where_the_server_has_other_defaults(owned_by, sent):
    upstream = FakeUpstream(owned_by=owned_by)
    async with connected(upstream) as backend:
        await draw(backend, 1)
    names = ("top_k", "min_p", "repetition_penalty")
    assert {name: upstream.bodies[0][name] for name in names if name in upstream.bodies[0]} == sent


async def test_a_penalty_that_the_upstream_does_not_know_is_refused():
    async with connected(FakeUpstream(owned_by="openai")) as backend:
        assert "top_k" not in backend.features
        with pytest.raises(PromptError, match="repetition_penalty"):
            await draw(backend, sampling=SamplingSettings(repetition_penalty=1.2))


async def test_tools_and_reasoning():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    upstream = FakeUpstream()
    definition = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    tools = Tools((json.dumps(definition),), choice="f", is_parallel=False)
    async with connected(upstream) as backend:
        upstream.message = {"content": None, "tool_calls": [call], "reasoning_content": "Hm."}
        upstream.finish = lambda seed: "tool_calls"
        (one, _) = await draw(backend, 2, tools=tools)
    assert (one.text, one.reasoning, one.finish_reason) == ("", "Hm.", "tool_calls")
    assert [(call.name, call.arguments) for call in one.tool_calls] == [("f", '{"a": 1}')]
    (body,) = upstream.bodies
    assert body["tools"] == [definition]
    assert body["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert body["parallel_tool_calls"] is False
    assert "stream" not in body


async def test_strict_tools_where_the_upstream_does_not_hold_them():
    strict = json.dumps({"type": "function", "function": {"name": "f", "strict": True}})
    async with connected(FakeUpstream()) as backend:
        with pytest.raises(PromptError, match="strict"):
            await backend.render(HELLO, Tools((strict,)))
        await backend.render(HELLO, Tools((strict,), choice="required"))
    async with connected(FakeUpstream(owned_by="openai")) as backend:
        await backend.render(HELLO, Tools((strict,)))


async def test_a_stop_string_is_no_end_token():
    """vLLM names the string that ended an answer: its last token is then one of the answer's."""
    upstream = FakeUpstream(message={"content": "a"})
    original = upstream._choice

    def choice(body, index):
        made = original(body, index)
        if made["logprobs"]:
            made["logprobs"]["content"][-1]["token"] = " b"
        return {**made, "stop_reason": " b"}

    upstream._choice = choice
    async with connected(upstream, n_per_request=1) as backend:
        (one,) = await draw(backend, 1)
    assert one.tokens[-1].token == " b"


async def test_answers_of_a_server_that_leaves_the_end_token_out():
    upstream = FakeUpstream(owned_by="openai", tells_end_token=False)
    for size in ("auto", 1):
        async with connected(upstream, n_per_request=size) as backend:
            for one in await draw(backend, 6):
                assert "".join(token.token for token in one.tokens) == one.text
                assert one.n_tokens == len(one.tokens) + 1


async def test_what_was_spent_adds_up_without_logprobs():
    upstream = FakeUpstream(has_logprobs=False)
    async with connected(upstream) as backend:
        assert "logprobs" not in backend.features
        found = await draw(backend, 6)
    (body,) = upstream.bodies
    assert "logprobs" not in body
    assert all(one.tokens == () for one in found)
    spent = sum(len(upstream.answer(body["seed"] + i)[1]) + 1 for i in range(6))
    assert sum(one.n_tokens for one in found) == spent


async def test_logprobs_that_go_missing_are_an_error_not_a_score():
    upstream = FakeUpstream()
    async with connected(upstream) as backend:
        upstream.has_logprobs = False
        with pytest.raises(UpstreamError, match="log-probabilities"):
            await draw(backend)


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


# failures


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


# one Palette in front of another


async def test_palette_in_front_of_palette(tmp_path, settings):
    """The same answers as the upstream's own backend gives, aligned here on its own values."""
    (tmp_path / "up").mkdir()
    (tmp_path / "down").mkdir()
    async with (
        run_fake(tmp_path / "up", settings) as behind,
        listening(behind.app) as url,
        run_fake(
            tmp_path / "down", settings, OpenAIRemoteBackend(url, extra_body={"palette": None})
        ) as front,
    ):
        assert front.backend.health() == {"state": "ok"}
        lengths, rewards = [], []
        palette = {"targets": {"words": {"at_most": 7.0}}, "candidates": 8, "report": "full"}
        for seed in range(150):
            reply = await front.chat(palette=palette, seed=seed)
            assert reply.status_code == 200, reply.text
            body = reply.json()
            lengths.append(len(body["choices"][0]["message"]["content"].split()))
            detail = body["palette"]["candidates_detail"]
            assert len(detail) == 8
            rewards += [
                (one["rewards"]["words"], one["rewards"]["log_likelihood"]) for one in detail
            ]
    # The fake's answers have 1 to 20 words, each length as likely (deviation 5.8), and mean
    # log-probability -1 a word; five standard errors of 1,200.
    words, likelihoods = np.array(rewards).T
    assert abs(words.mean() - 10.5) < 5 * 5.8 / math.sqrt(1200)
    assert abs((words * likelihoods).sum() / words.sum() + 1) < 5 / math.sqrt(words.sum())
    assert np.bincount(words.astype(int), minlength=21)[1:].min() > 30
    expected = body["palette"]["expected"]["words"]["level"]
    assert expected <= 7 + 1e-6
    assert abs(np.mean(lengths) - expected) < 5 * 5.0 / math.sqrt(150)


class Started:
    """A backend that is started already: nothing is probed again."""

    def __init__(self, backend):
        self._backend = backend

    def __getattr__(self, name):
        return getattr(self._backend, name)

    async def start(self):
        pass

    async def close(self):
        pass


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (Fault(500), 502, "upstream_failed"),
        (Fault(503), 503, "backend_unavailable"),
        (Fault(hang=True), 504, "upstream_timeout"),
        (Fault(429, headers={"Retry-After": "77"}), 429, "upstream_busy"),
        (Fault(400, "bad role"), 400, "invalid_messages"),
    ],
)
async def test_errors_travel_to_the_client(tmp_path, settings, fault, status, code):
    upstream = FakeUpstream()
    async with (
        connected(upstream, max_retries=0, timeout_s=1.0) as backend,
        run_fake(tmp_path, settings, Started(backend)) as front,
    ):
        upstream.faults.append(fault)
        reply = await front.chat(model="up/model", palette=None)
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
        if status == 429:
            assert reply.headers["Retry-After"] == "77"
        reply = await front.chat(model="up/model", palette=None)
        assert reply.json()["usage"]["prompt_tokens"] == 11


@pytest.mark.parametrize("scope", ["traffic", "answer"])
async def test_fewer_candidates_are_told(tmp_path, settings, scope):
    upstream = FakeUpstream()
    palette = {"targets": {"words": {"gain": -0.2}}, "candidates": 8, "scope": scope}
    async with (
        connected(upstream, n_per_request=1, max_retries=0) as backend,
        run_fake(tmp_path, settings, Started(backend)) as front,
    ):
        upstream.faults.extend([Fault(500)] * 3)
        report = (await front.chat(model="up/model", palette=palette, seed=3)).json()["palette"]
        assert report["candidates"] == 5
        assert "5 of 8" in report["calibration"]["warnings"][0]
        assert "upstream" in report["calibration"]["warnings"][0]
        # Five are not enough for six choices.
        upstream.faults.extend([Fault(500)] * 3)
        reply = await front.chat(model="up/model", palette=palette, n=6)
        assert reply.status_code == 502
        assert "5 of 8" in reply.json()["error"]["message"]


async def test_values_that_read_log_probabilities_need_them(tmp_path, settings):
    async with connected(FakeUpstream(has_logprobs=False)) as backend:
        with pytest.raises(ModelLoadError, match="log_likelihood is computed from log-prob"):
            async with run_fake(tmp_path, settings, Started(backend)):
                pass


async def test_a_calibration_leaves_out_what_is_not_whole(tmp_path, caplog):
    upstream = FakeUpstream()
    rewards = lexical_rewards(tmp_path)
    await rewards.start()
    prompts = [HELLO] * 20 + [(Message(role="user", content="word " * 300),)]
    async with connected(upstream, n_per_request=1, max_retries=0) as backend:
        upstream.faults.extend([Fault(500)] * 2)
        calibration = await calibrate(
            backend, rewards, prompts, n_candidates=4, sampling=SamplingSettings(),
            prompts_source="test", concurrency=1,
        )  # fmt: skip
    await rewards.close()
    assert calibration.pilot.rewards.shape[:2] == (19, 4)
    assert "1 of 21 prompts did not get all" in caplog.text
    assert "1 of 21 prompts do not fit" in caplog.text
