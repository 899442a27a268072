"""Every bad request gets OpenAI's error object, naming what to change, and harms nothing."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.server.conftest import chat_body


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
