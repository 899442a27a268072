"""The official client's own machinery on our answers: its stream, its parsers, its accumulators."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest
from pydantic import BaseModel

from server.routes import completions
from tests.server.conftest import run_fake
from tests.server.fakes import EVERYTHING, FakeBackend
from tests.server.waiting import until

QUESTION = [{"role": "user", "content": "Find a word."}]
SHORT = {"palette": {"targets": {"words": {"at_most": 8.0}}, "candidates": 8}}


class Words(BaseModel):
    words: str


class Find(BaseModel):
    word: str


@pytest.fixture
async def client(tmp_path, settings):
    async with run_fake(tmp_path, settings, FakeBackend(features=EVERYTHING)) as running:
        running.app.include_router(completions.router)
        transport = httpx.ASGITransport(app=running.app)
        async with openai.AsyncOpenAI(
            base_url="http://test/v1",
            api_key="none",
            max_retries=0,
            http_client=httpx.AsyncClient(transport=transport),
        ) as client:
            yield client


async def test_structured_answers(client):
    answer = await client.chat.completions.parse(
        model="fake", messages=QUESTION, response_format=Words, extra_body=SHORT
    )
    assert answer.choices[0].message.parsed.words
    assert answer.model_extra["palette"]["candidates"] == 8


async def test_parsed_calls_and_their_results(client):
    tools = [openai.pydantic_function_tool(Find)]
    answer = await client.chat.completions.parse(
        model="fake", messages=QUESTION, tools=tools, tool_choice="required", extra_body=SHORT
    )
    message = answer.choices[0].message
    assert all(call.function.parsed_arguments.word for call in message.tool_calls)
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "found"} for call in message.tool_calls
    ]
    again = await client.chat.completions.create(
        model="fake", messages=[*QUESTION, message, *results], tools=tools, extra_body=SHORT
    )
    assert again.choices[0].message.role == "assistant"


@pytest.mark.parametrize("choice", ["none", "required"])
async def test_its_stream_helper_puts_the_same_answer_together(client, choice):
    asked = {
        "model": "fake", "messages": QUESTION, "seed": 3, "tool_choice": choice,
        "tools": [openai.pydantic_function_tool(Find)], "extra_body": SHORT,
    }  # fmt: skip
    whole = await client.chat.completions.create(**asked)
    async with client.chat.completions.stream(**asked) as stream:
        async for _ in stream:
            pass
        found = (await stream.get_final_completion()).choices[0]
    expected = whole.choices[0]
    assert found.finish_reason == expected.finish_reason
    assert found.message.content == expected.message.content
    assert [call.function.arguments for call in found.message.tool_calls or []] == [
        call.function.arguments for call in expected.message.tool_calls or []
    ]


async def test_text_completions(client):
    asked = {"model": "fake", "prompt": ["a", "b"], "seed": 3, "n": 2, "logprobs": 2}
    whole = await client.completions.create(**asked)
    texts = dict.fromkeys(range(4), "")
    async for chunk in await client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {choice.index: choice.text for choice in whole.choices}


async def test_refusals_name_the_field(client):
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(
            model="fake", messages=QUESTION, reasoning_effort="high"
        )
    assert caught.value.param == "reasoning_effort"


async def test_errors_in_a_stream_raise(tmp_path, settings):
    backend = FakeBackend(hold=True)
    async with run_fake(tmp_path, settings, backend) as running:
        transport = httpx.ASGITransport(app=running.app)
        http_client = httpx.AsyncClient(transport=transport)
        async with openai.AsyncOpenAI(
            base_url="http://test/v1", api_key="none", http_client=http_client
        ) as client:
            asked = client.chat.completions.create(model="fake", messages=QUESTION, stream=True)
            streaming = asyncio.create_task(asked)
            await until(lambda: backend.n_started == 1)
            backend.failure = RuntimeError("secret")
            backend.released.set()
            stream = await streaming
            with pytest.raises(openai.APIError, match="internal error"):
                async for _ in stream:
                    pass
