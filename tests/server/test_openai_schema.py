"""OpenAI's published schemas, as its own client has them, against what is taken and given here."""

from __future__ import annotations

import json
from typing import get_type_hints

import pytest
from openai.types import Completion, Model
from openai.types import completion_create_params as text_params
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat import completion_create_params as chat_params
from openai.types.shared import ErrorObject
from pydantic import BaseModel

from server.openai_requests import ChatCompletionRequest, CompletionRequest
from server.routes import completions
from tests.server.conftest import chat_body, events, run_fake
from tests.server.fakes import EVERYTHING, FakeBackend

# What is ours in an answer, and vLLM's name for thinking.
OURS = {"palette", "reasoning_content", "max_model_len"}
SHORT = {"targets": {"words": {"at_most": 8.0}}, "candidates": 8}
MESSAGES = [{"role": "user", "content": "Tell me more."}]
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
PREDICTION = {"type": "content", "content": "The small green house."}
SCHEMA = {"name": "words", "strict": True, "schema": {"type": "object", "properties": {}}}

# Every field of OpenAI's request: values that are served or change nothing, and values that are
# refused because an answer without them would not be what was asked.
CHAT_FIELDS = {
    # served
    "messages": ([MESSAGES], [[], "hi"]),
    "model": (["fake"], []),
    "frequency_penalty": ([1.5, -2, None], [2.5]),
    "logit_bias": ([{"17": -100}, {}, None], [{"17": 101}, {"-1": 1}, {"1000": 1}, {"the": 1}]),
    "logprobs": ([True, False, None], []),
    "max_completion_tokens": ([5, None], [0]),
    "max_tokens": ([5, None], [0]),
    "n": ([2, None], [0, 129]),
    "parallel_tool_calls": ([], [True]),  # only with tools
    "presence_penalty": ([1.5, -2, None], [-3]),
    "response_format": (
        [{"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": SCHEMA}],
        [{"type": "xml"}, {"type": "json_schema"}],
    ),
    "seed": ([1, -1, None], ["x"]),
    "stop": (["a", ["a", "b"], [], None], [""]),
    "stream": ([True, False, None], []),
    "stream_options": ([], [{"include_usage": True}]),  # only with stream
    "temperature": ([0, 2, None], [-1, 3]),
    "tool_choice": (["none", None], ["auto", "required", {"type": "allowed_tools"}]),
    "tools": ([[TOOL]], [[], [{"type": "custom", "custom": {"name": "x"}}]]),
    "top_logprobs": ([], [2]),  # only with logprobs
    "top_p": ([0.5, None], [0, 1.5]),
    # no effect on an answer, at OpenAI neither
    "metadata": ([{"team": "a"}, None], []),
    "prediction": ([PREDICTION, None], []),
    "prompt_cache_key": (["a", None], []),
    "prompt_cache_options": ([{"mode": "explicit"}], []),
    "prompt_cache_retention": (["24h", None], []),
    "safety_identifier": (["a", None], []),
    "user": (["a", None], []),
    # neutral values only
    "modalities": ([["text"], None], [["text", "audio"]]),
    "service_tier": (["auto", "default", None], ["flex", "priority", "scale", "fast"]),
    "store": ([False, None], [True]),
    "verbosity": (["medium", None], ["low", "high"]),
    # refused
    "audio": ([None], [{"voice": "alloy", "format": "mp3"}]),
    "function_call": ([None], ["auto", {"name": "find"}]),
    "functions": ([None], [[{"name": "find"}]]),
    "moderation": ([None], [{"model": "omni-moderation-latest"}]),
    "reasoning_effort": ([None], ["none", "high"]),
    "web_search_options": ([None], [{}]),
}
TEXT_FIELDS = {
    "model": (["fake"], []),
    "prompt": (["a", ["a", "b"], [1, 2], [[1], [2, 3]]], [None, "", [], [1000], [[-1]]]),
    "best_of": ([1, None], [2]),
    "echo": ([True, False, None], []),
    "frequency_penalty": ([1.5, None], [2.5]),
    "logit_bias": ([{"17": -100}, None], [{"17": 101}]),
    "logprobs": ([0, 3, None], [-1, True, 21]),
    "max_tokens": ([5, None], [0]),
    "n": ([2, None], [0]),
    "presence_penalty": ([1.5, None], [-3]),
    "seed": ([1, None], ["x"]),
    "stop": (["a", ["a", "b"], None], [""]),
    "stream": ([True, False, None], []),
    "stream_options": ([], [{"include_usage": True}]),
    "suffix": ([None], ["the end"]),
    "temperature": ([0, 2, None], [3]),
    "top_p": ([0.5, None], [0]),
    "user": (["a"], []),
}


@pytest.fixture
async def running(tmp_path, settings):
    async with run_fake(tmp_path, settings, FakeBackend(features=EVERYTHING)) as found:
        found.app.include_router(completions.router)
        yield found


def fields_of(params):
    return {
        name
        for kind in (
            params.CompletionCreateParamsNonStreaming, params.CompletionCreateParamsStreaming
        )
        for name in get_type_hints(kind)
    }  # fmt: skip


def test_the_tables_are_openais_fields():
    assert set(CHAT_FIELDS) == fields_of(chat_params)
    assert set(TEXT_FIELDS) == fields_of(text_params)


@pytest.mark.parametrize(
    ("request_type", "table"),
    [(ChatCompletionRequest, CHAT_FIELDS), (CompletionRequest, TEXT_FIELDS)],
)
def test_beyond_openais_there_is_the_palette_and_what_clients_of_vllm_send(request_type, table):
    ours = {"palette", "top_k", "min_p", "repetition_penalty"}
    assert set(request_type.model_fields) == set(table) | ours


def cases(table, which):
    return [(name, value) for name, values in table.items() for value in values[which]]


@pytest.mark.parametrize(("name", "value"), cases(CHAT_FIELDS, 0))
async def test_chat_takes(running, name, value):
    reply = await running.chat(**{name: value})
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(("name", "value"), cases(CHAT_FIELDS, 1))
async def test_chat_refuses(running, name, value):
    check_refused(await running.chat(**{name: value}), name)


@pytest.mark.parametrize(("name", "value"), cases(TEXT_FIELDS, 0))
async def test_completions_take(running, name, value):
    body = {"model": "fake", "prompt": "Tell me more."} | {name: value}
    reply = await running.client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(("name", "value"), cases(TEXT_FIELDS, 1))
async def test_completions_refuse(running, name, value):
    body = {"model": "fake", "prompt": "Tell me more."} | {name: value}
    check_refused(await running.client.post("/v1/completions", json=body), name)


def check_refused(reply, name):
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    strict(ErrorObject, error)
    assert error["param"].split(".")[0].split("[")[0] == name
    assert error["type"] == "invalid_request_error"


def strict(kind, data):
    """Check one object against the client's type: nothing missing, nothing more, no coercion."""
    found = kind.model_validate_json(json.dumps(data), strict=True)
    nothing_more(found)
    return found


def nothing_more(found):
    assert set(found.model_extra or {}) <= OURS, found.model_extra
    for name in found.model_fields_set - OURS:
        inner = getattr(found, name)
        for one in inner if isinstance(inner, list) else [inner]:
            if isinstance(one, BaseModel):
                nothing_more(one)


BODIES = [
    {},
    {"palette": SHORT},
    {"n": 3, "palette": SHORT | {"report": "full"}},
    {"logprobs": True, "top_logprobs": 3},
    {"service_tier": "auto"},
    {"tools": [TOOL], "tool_choice": "required", "logprobs": True},
    {"tools": [TOOL], "palette": SHORT, "n": 4},
    {"palette": {"floors": {"words": 20}, "candidates": 2}, "seed": 0},  # nothing to serve
    {"response_format": {"type": "json_object"}},
    {"max_tokens": 2, "n": 2},
]


@pytest.mark.parametrize("body", BODIES, ids=str)
@pytest.mark.parametrize("thinks", [False, True])
async def test_chat_completion(running, body, thinks):
    running.backend.thinks = thinks
    answer = (await running.chat(**body)).json()
    found = strict(ChatCompletion, answer)
    assert found.choices
    for choice in found.choices:
        assert (choice.finish_reason == "tool_calls") == bool(choice.message.tool_calls)


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("body", BODIES, ids=str)
async def test_chat_completion_chunks(running, body, usage):
    running.backend.thinks = True
    reply = await running.chat(stream=True, stream_options={"include_usage": usage}, **body)
    chunks = [strict(ChatCompletionChunk, one) for one in events(reply)]
    assert len({(one.id, one.created, one.model, one.system_fingerprint) for one in chunks}) == 1
    n = len({choice.index for one in chunks for choice in one.choices})
    ends = [choice for one in chunks for choice in one.choices if choice.finish_reason]
    assert sorted(choice.index for choice in ends) == list(range(n))
    assert (chunks[-1].usage is not None) == usage
    assert all(one.usage is None for one in chunks[:-1])


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"n": 2, "logprobs": 2, "prompt": ["a b", "c d"]},
        {"logprobs": 0},
        {"echo": True, "palette": SHORT},
        {"palette": {"floors": {"words": 20}, "candidates": 2}, "seed": 0},
    ],
    ids=str,
)
async def test_text_completion(running, body):
    body = {"model": "fake", "prompt": "Tell me more."} | body
    whole = (await running.client.post("/v1/completions", json=body)).json()
    strict(Completion, whole)
    reply = await running.client.post(
        "/v1/completions", json=body | {"stream": True, "stream_options": {"include_usage": True}}
    )
    for chunk in events(reply):
        for choice in chunk["choices"]:
            # The published type has no null, and every chunk but a choice's last one has it.
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        strict(Completion, chunk)


async def test_models(running):
    listed = (await running.client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert set(listed) == {"object", "data"}
    for model in listed["data"]:
        strict(Model, model)
    strict(Model, (await running.client.get("/v1/models/fake")).json())


@pytest.mark.parametrize(
    ("fields", "status"),
    [({"model": "gpt-9"}, 404), ({"palette": {"targets": {"words": {"at_least": 30}}}}, 422)],
)
async def test_errors(running, fields, status):
    reply = await running.client.post("/v1/chat/completions", json=chat_body(**fields))
    assert reply.status_code == status
    assert set(reply.json()) == {"error"}
    strict(ErrorObject, reply.json()["error"])
