"""Every bad input gets OpenAI's error object, naming what to do; the server stays up."""

from __future__ import annotations

import asyncio
import json

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
    ("body", "status", "code", "param"),
    [
        ({"messages": []}, 400, "invalid_value", "messages"),
        ({"messages": "hi"}, 400, "invalid_value", "messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, 400, "invalid_value",
         "messages[0].role"),
        ({"messages": [{"role": "user"}]}, 400, "missing_required_parameter",
         "messages[0].content"),
        ({"model": "gpt-9"}, 404, "model_not_found", "model"),
        ({"temperature": -1}, 400, "invalid_value", "temperature"),
        ({"top_p": 0}, 400, "invalid_value", "top_p"),
        ({"n": 0}, 400, "invalid_value", "n"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"seed": "x"}, 400, "invalid_value", "seed"),
        ({"tools": []}, 400, "invalid_value", "tools"),
        ({"presence_penalty": 1}, 400, "unsupported_parameter", "presence_penalty"),
        ({"palette": []}, 400, "invalid_value", "palette"),
        ({"palette": {"target": {}}}, 400, "unknown_parameter", "palette.target"),
        ({"palette": {"targets": {"wrods": "keep"}}}, 400, "unknown_value",
         "palette.targets.wrods"),
        ({"palette": {"targets": {"words": {"quantile": "high"}}}}, 400, "invalid_palette",
         "palette.targets.words.quantile"),
        ({"palette": {"targets": {"words": {"quantile": 1.5}}}}, 400, "invalid_palette",
         "palette.targets.words.quantile"),
        ({"palette": {"targets": {"words": 3}}}, 400, "invalid_palette",
         "palette.targets.words"),
        ({"palette": {"targets": {}, "candidates": 0}}, 400, "invalid_palette",
         "palette.candidates"),
        ({"palette": {"targets": {}, "candidates": 10_000}}, 400, "invalid_palette",
         "palette.candidates"),
        ({"palette": {"targets": {}, "candidates": 64}}, 400, "invalid_palette",
         "palette.candidates"),
        ({"palette": {"targets": {}, "floors": {"wrods": 1}}}, 400, "unknown_value",
         "palette.floors.wrods"),
        ({"palette": {"targets": {"words": {"quantile": 0.5, "of": "traffic"}},
                      "scope": "answer"}}, 400, "invalid_palette", "palette.targets.words.of"),
        ({"messages": [{"role": "user", "content": "a " * 600}]}, 400,
         "context_length_exceeded", "messages"),
    ],
)  # fmt: skip
async def test_bad_request(running, body, status, code, param):
    reply = await running.chat(**body)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (status, code, param)
    assert set(error) >= {"message", "type", "param", "code"}
    assert len(error["message"]) > 10
    assert (await running.chat()).status_code == 200


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("kind", ["at_least", "quantile", "multiplier"])
async def test_targets_that_are_no_numbers(running, number, kind):
    body = json.dumps(chat_body(palette={"targets": {"words": {kind: 0}}}))
    reply = await running.client.post(
        "/v1/chat/completions",
        content=body.replace(f'"{kind}": 0', f'"{kind}": {number}'),
        headers={"content-type": "application/json"},
    )
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert error["param"] == f"palette.targets.words.{kind}"


async def test_unknown_value_suggests_the_known_ones(running):
    reply = await running.chat(palette={"targets": {"wrods": "keep"}})
    assert "words" in reply.json()["error"]["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 5000])
async def test_bodies_that_are_no_request(running, content):
    reply = await running.client.post("/v1/chat/completions", content=content)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]


async def test_ten_megabytes(running):
    body = chat_body(messages=[{"role": "user", "content": "x" * 10_000_000}])
    reply = await running.client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 413
    assert "max_body_bytes" in reply.json()["error"]["message"]


async def test_ten_megabytes_without_a_length(running):
    async def chunks():
        for _ in range(100):
            yield b"x" * 100_000

    reply = await running.client.post("/v1/chat/completions", content=chunks())
    assert reply.status_code == 413


async def test_a_length_that_is_a_lie(running):
    async def chunks():
        for _ in range(100):
            yield b"x" * 100_000

    headers = {"content-length": "5"}
    reply = await running.client.post("/v1/chat/completions", content=chunks(), headers=headers)
    assert reply.status_code == 413


async def test_the_body_at_the_limit_is_taken(running):
    limit = running.context.settings.max_body_bytes
    text = json.dumps(chat_body(user=""))
    for size, status in ((limit, 200), (limit + 1, 413)):
        content = text.replace('"user": ""', f'"user": "{"x" * (size - len(text))}"').encode()
        assert len(content) == size
        reply = await running.client.post(
            "/v1/chat/completions",
            content=content,
            headers={"content-type": "application/json"},
        )
        assert reply.status_code == status


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({f"x{i}": 1 for i in range(40_000)}, 400),
        ({"metadata": {f"x{i}": "y" for i in range(40_000)}}, 400),
        ({"messages": [{"role": "nobody"}] * 20_000}, 400),
        ({"messages": [{"role": "user", "content": "a:[{"}] * 100}, 200),
        ({"messages": [{"role": "user", "content": 'a "quoted" \\ ' + ":[{" * 20_000}]}, 200),
    ],
    ids=["fields", "metadata", "messages", "a conversation", "signs in a text"],
)
async def test_the_number_of_parts_is_bounded(running, fields, status):
    reply = await running.chat(**fields)
    assert reply.status_code == status
    assert status == 200 or reply.json()["error"]["code"] == "body_too_complex"


@pytest.mark.parametrize("depth", [101, 900, 5000, 500_000])
@pytest.mark.parametrize("sign", ["[", '{"a":'])
@pytest.mark.parametrize("before", ["", '{"model": "fake", "messages": ', '{"a": "\\"", "b": '])
async def test_the_depth_is_bounded(running, depth, sign, before):
    content = (before + sign * depth)[:1_500_000]
    reply = await running.client.post("/v1/chat/completions", content=content)
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "body_too_complex"


async def test_a_hundred_levels_are_no_matter(running):
    palette = {"targets": {"words": 1}}
    text = json.dumps(chat_body(palette=palette)).replace("1}", "[" * 97 + "]" * 97 + "}")
    reply = await running.client.post(
        "/v1/chat/completions", content=text, headers={"content-type": "application/json"}
    )
    assert reply.json()["error"]["code"] == "invalid_palette"


@pytest.mark.parametrize(
    "content", [b'"' + b'\\"' * 900_000, b'"\\' * 900_000, b'"' * 1_900_001, b"\\" * 1_900_000]
)
async def test_strings_without_an_end_take_no_time(running, content):
    async with asyncio.timeout(20):
        reply = await running.client.post("/v1/chat/completions", content=content)
    assert reply.status_code == 400


async def test_megabytes_are_not_sent_back(running):
    reply = await running.chat(model="m" * 1_000_000)
    assert reply.status_code in (400, 404)
    assert len(reply.content) < 10_000
    assert reply.json()["error"]["param"] == "model"


@pytest.mark.parametrize("fields", ['"model": "\\ud83d"', '"model": "fake", "\\ud83d": 1'])
async def test_half_a_surrogate_pair_is_no_failure(running, fields):
    content = f'{{{fields}, "messages": [{{"role": "user", "content": "hi"}}]}}'
    reply = await running.client.post(
        "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
    )
    assert reply.status_code in (400, 404)
    assert reply.json()["error"]["code"] in ("invalid_value", "model_not_found")


@pytest.mark.parametrize("path", ["/nothing", "/v1/nothing", "/v1/models/none"])
async def test_unknown_paths(running, path):
    reply = await running.client.get(path)
    assert reply.status_code == 404
    assert reply.json()["error"]["message"]


async def test_wrong_method(running):
    reply = await running.client.get("/v1/chat/completions")
    assert reply.status_code == 405
    assert reply.json()["error"]["code"] == "method_not_allowed"


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
