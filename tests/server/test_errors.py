"""Every bad input gets OpenAI's error object, naming what to do; the server stays up."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest

from rewards import ScoringError
from server.admission import Admission, QueueFullError
from server.backends.base import BackendError, BackendUnavailableError
from tests.server.conftest import chat_body, run_fake
from tests.server.fakes import FakeBackend

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
        ({"tools": []}, 400, "unknown_parameter", "tools"),
        ({"presence_penalty": 1}, 400, "invalid_value", "presence_penalty"),
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
    good = suite.score

    async def score(samples, names=None):
        if bad == "raise":
            raise ScoringError("words", ("words",), "out of order")
        return np.full((len(samples), 3), np.nan)

    monkeypatch.setattr(suite, "score", score)
    palette = {"targets": {"words": {"multiplier": 1}}}
    reply = await running.chat(palette=palette)
    assert reply.status_code == 500
    monkeypatch.setattr(suite, "score", good)
    assert (await running.chat(palette=palette)).status_code == 200


async def test_health_answers_while_requests_wait(tmp_path, settings):
    backend = FakeBackend(hold=True)
    async with run_fake(tmp_path, settings, backend) as running:
        waiting = [asyncio.create_task(running.chat()) for _ in range(16)]
        await asyncio.sleep(0.05)
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
        await asyncio.sleep(0.05)
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
