"""Failures and a full queue: what clients are told, and when to come back; OpenAI's own client."""

from __future__ import annotations

import asyncio

import numpy as np
import openai
import pytest
from pydantic import SecretStr

from rewards import ScoringError
from rewards.suite import Attempt
from server import admission as admissions
from server.admission import Admission, QueueFullError
from server.backends.base import BackendError, BackendUnavailableError
from tests.server.conftest import chat_body, run_fake
from tests.server.fakes import FakeBackend
from tests.server.test_disconnect import listening
from tests.server.waiting import time_is_up, until

USER = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("failure", "status"),
    [(BackendUnavailableError("gone"), 503), (BackendError("broke"), 500), (KeyError("x"), 500)],
)
async def test_backend_failures(running, failure, status):
    running.backend.failure = failure
    palette = {"targets": {"words": {"multiplier": 1}}}
    assert (await running.chat(palette=palette)).status_code == status
    running.backend.failure = None
    assert (await running.chat(palette=palette)).status_code == 200
    assert running.context.aligner.admission.n_running == 0


@pytest.mark.parametrize("bad", ["raise", "nan"])
async def test_reward_failures(running, monkeypatch, bad):
    suite = running.context.aligner.rewards
    good = suite.attempt

    async def attempt(samples, may_fail, names=None, *, more):
        if bad == "raise":
            raise ScoringError("words", ("words",), "out of order")
        return Attempt(np.full((len(samples), 3), np.nan), {})

    monkeypatch.setattr(suite, "attempt", attempt)
    palette = {"targets": {"words": {"multiplier": 1}}}
    reply = await running.chat(palette=palette)
    assert reply.status_code == 500
    monkeypatch.setattr(suite, "attempt", good)
    assert (await running.chat(palette=palette)).status_code == 200


async def test_health_answers_while_requests_wait(tmp_path, settings):
    backend = FakeBackend(hold=True)
    async with run_fake(tmp_path, settings, backend) as running:
        waiting = [asyncio.create_task(running.chat()) for _ in range(16)]
        admission = running.context.aligner.admission
        await until(lambda: admission.n_running + admission.n_waiting == 16)
        for path in ("/health", "/ready", "/version", "/v1/models", "/v1/palette/values"):
            assert (await running.client.get(path)).status_code == 200
        assert not any(task.done() for task in waiting)
        backend.released.set()
        assert {(await task).status_code for task in waiting} == {200}


async def test_full_queue(tmp_path, settings):
    backend = FakeBackend(hold=True)
    small = settings.model_copy(update={"max_running": 1, "max_queue": 1})
    async with run_fake(tmp_path, small, backend) as running:
        waiting = [asyncio.create_task(running.chat()) for _ in range(2)]
        await until(lambda: running.context.aligner.admission.n_waiting == 1)
        reply = await running.chat()
        assert reply.status_code == 429
        assert int(reply.headers["retry-after"]) >= 1
        backend.released.set()
        assert {(await task).status_code for task in waiting} == {200}


async def test_admission_frees_what_a_cancelled_request_held():
    admission = Admission(max_running=1, max_queue=1)
    async with admission:

        async def enter():
            async with admission:
                pass

        waiting = asyncio.create_task(enter())
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await enter()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert admission.n_waiting == 0
    async with admission:
        assert admission.n_running == 1


# when to come back


async def enter(admission):
    async with admission:
        pass


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand, for the admission."""
    now = [0.0]
    monkeypatch.setattr(admissions.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("max_running", "service_s", "expected"), [(1, 4.0, 8), (2, 4.0, 4), (1, 0.01, 1), (1, 1e6, 60)]
)
async def test_retry_after_is_the_time_the_queue_takes(clock, max_running, service_s, expected):
    admission = Admission(max_running, max_queue=1)
    for _ in range(3):
        async with admission:
            clock[0] += service_s
    free, released = asyncio.Event(), asyncio.Event()
    n_inside = 0

    async def hold():
        nonlocal n_inside
        async with admission:
            n_inside += 1
            if n_inside == max_running:
                free.set()
            await released.wait()

    inside = [asyncio.create_task(hold()) for _ in range(max_running)]
    await free.wait()
    waiting = asyncio.create_task(enter(admission))
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError) as caught:
        await enter(admission)
    assert caught.value.retry_after_s == expected
    released.set()
    await asyncio.gather(*inside, waiting)


async def test_retry_after_follows_recent_times(clock):
    admission = Admission(max_running=1, max_queue=0)
    for service_s in [100.0] * 3 + [2.0] * 60:
        async with admission:
            clock[0] += service_s
    assert 2 <= admission.retry_after_s <= 3


async def test_a_backend_that_is_away_says_when_to_come_back(running):
    running.backend.failure = BackendUnavailableError("restarting")
    reply = await running.chat()
    assert reply.status_code == 503
    assert int(reply.headers["retry-after"]) > 1


async def test_a_wrong_method_says_which_are_right(running):
    reply = await running.client.get("/v1/chat/completions")
    assert reply.headers["allow"] == "POST"


# the official client


FAR = {"targets": {"words": {"at_most": 0.5}}, "candidates": 4}
LONG = [{"role": "user", "content": "x" * 3_000_000}]


@pytest.mark.parametrize(
    ("fields", "kind", "status", "code"),
    [
        ({"temperature": 9}, openai.BadRequestError, 400, "invalid_value"),
        ({"model": "gpt-9"}, openai.NotFoundError, 404, "model_not_found"),
        ({"messages": LONG}, openai.APIStatusError, 413, "body_too_large"),
        ({"extra_body": {"palette": FAR}}, openai.UnprocessableEntityError, 422,
         "palette_infeasible"),
    ],
)  # fmt: skip
async def test_mistakes_raise_the_right_class(tmp_path, settings, fields, kind, status, code):
    async with listening(tmp_path, settings, FakeBackend()) as (_, port), client(port) as api:
        with pytest.raises(kind) as caught:
            await api.chat.completions.create(**chat_body(**fields))
        check(caught.value, status, code)


async def test_a_wrong_key_raises_authentication_error(tmp_path, settings):
    locked = settings.model_copy(update={"api_keys": (SecretStr("sk-right"),)})
    async with listening(tmp_path, locked, FakeBackend()) as (_, port):
        async with client(port, "sk-wrong") as api:
            with pytest.raises(openai.AuthenticationError) as caught:
                await api.chat.completions.create(**chat_body())
            check(caught.value, 401, "invalid_api_key")
        async with client(port, "sk-right") as api:
            assert (await api.chat.completions.create(**chat_body())).choices


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_a_full_queue_raises_rate_limit_error(tmp_path, settings, stream):
    small = settings.model_copy(update={"max_running": 1, "max_queue": 0})
    backend = FakeBackend(hold=True)
    async with listening(tmp_path, small, backend) as (_, port), client(port) as api:
        first = asyncio.create_task(api.chat.completions.create(**chat_body()))
        await until(lambda: backend.n_started == 1)
        with pytest.raises(openai.APIError) as caught:
            await ask(api, stream=stream)
        assert caught.value.code == "queue_full"
        if not stream:
            assert isinstance(caught.value, openai.RateLimitError)
            assert int(caught.value.response.headers["retry-after"]) >= 1
        backend.released.set()
        assert (await first).choices


async def test_a_stopping_server_raises_internal_server_error_503(tmp_path, settings):
    async with listening(tmp_path, settings, FakeBackend()) as (running, port), client(port) as api:
        running.context.drain.begin(30)
        with pytest.raises(openai.InternalServerError) as caught:
            await api.chat.completions.create(**chat_body())
        check(caught.value, 503, "draining")


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_a_request_over_its_time_raises_504(tmp_path, settings, stream):
    backend = FakeBackend(hold=True)
    async with listening(tmp_path, settings, backend) as (running, port), client(port) as api:
        asking = asyncio.create_task(ask(api, stream=stream))
        await until(lambda: backend.n_started == 1)
        time_is_up(running.context.drain)
        with pytest.raises(openai.APIError) as caught:
            await asking
        if stream:
            assert caught.value.code == "request_timeout"
        else:
            assert isinstance(caught.value, openai.InternalServerError)
            check(caught.value, 504, "request_timeout")
        assert backend.n_cancelled == 1


def client(port, key="none"):
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)


async def ask(api, *, stream):
    """Return once the answer is there to its end."""
    answer = await api.chat.completions.create(**chat_body(stream=stream))
    if stream:
        async for _ in answer:
            pass


def check(error, status, code):
    assert (error.status_code, error.code) == (status, code)
    assert error.request_id.startswith("req_")
    assert error.body["message"]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"palette": []}, "palette: must be a JSON object"),
        ({"messages": []}, "messages: must have at least 1 item"),
        ({"messages": {}}, "messages: must be a JSON array"),
    ],
)
async def test_faults_are_told_in_terms_of_json(running, body, sentence):
    reply = await running.client.post("/v1/chat/completions", json=chat_body(**body))
    assert reply.json()["error"]["message"] == sentence


async def test_addresses_that_are_not_there(running):
    nowhere = (await running.client.get("/v1/nope")).json()["error"]
    assert (nowhere["code"], "/docs" in nowhere["message"]) == ("unknown_url", True)
    reply = await running.client.get("/v1/chat/completions")
    assert reply.headers["allow"] == "POST"
    assert reply.json()["error"]["code"] == "method_not_allowed"
    assert "/docs" in reply.json()["error"]["message"]


async def test_floors_that_nothing_clears_are_the_field_to_change(running):
    reply = await running.chat(palette={"floors": {"words": 1e6}})
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (422, "palette_infeasible")
    assert error["param"] == "palette.floors"
    assert "words >= 1e+06" in error["message"]
