"""pydantic-ai on our server: the palette goes in by `extra_body`, its report is kept on demand."""

from __future__ import annotations

import openai
import pytest

pytest.importorskip("pydantic_ai", reason="pydantic-ai is not installed")

from pydantic import BaseModel
from pydantic_ai import Agent, ModelHTTPError, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from server import embedded
from tests.clients.servers import FAR, KEY, MODEL, SHORT

PALETTE = {"extra_body": {"palette": SHORT}, "openai_include_unmapped_response_data": True}


def model_of(base_url, name=MODEL, key=KEY):
    client = openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0)
    return client, OpenAIChatModel(name, provider=OpenAIProvider(openai_client=client))


@pytest.fixture
async def model(able):
    client, model = model_of(able.base_url)
    async with client:
        yield model


def report(message):
    return message.provider_details["unmapped"]


async def test_a_model(real_url):
    client, model = model_of(real_url, embedded.CHAT_MODEL_NAME)
    palette = {"targets": {"helpful": {"gain": 0.2}}}
    async with client:
        found = await Agent(model, model_settings={"extra_body": {"palette": palette}}).run("Hi")
    assert found.output
    assert found.response.finish_reason == "stop"


async def test_a_palette_and_its_report(model):
    found = await Agent(model).run("hi", model_settings=PALETTE)
    assert report(found.response)["response"]["palette"]["status"] == "met"
    assert found.usage.details["rejected_prediction_tokens"] > 0


async def test_stream_ends_with_the_report(model):
    agent = Agent(model, model_settings={**PALETTE, "seed": 3})
    whole = await agent.run("hi")
    async with agent.run_stream("hi") as streamed:
        text = "".join([piece async for piece in streamed.stream_text(delta=True)])
        usage = streamed.usage
        message = streamed.response
    assert text == whole.output
    assert usage.output_tokens == whole.usage.output_tokens
    assert report(message)["chunks"][-1]["response"]["palette"]["status"] == "met"


async def test_logprobs_and_stop(model):
    settings = {"openai_logprobs": True, "openai_top_logprobs": 2, "stop_sequences": ["lorem"]}
    found = await Agent(model).run("hi", model_settings={**PALETTE, **settings})
    entries = found.response.provider_details["logprobs"]
    assert "".join(entry["token"] for entry in entries) == found.output


async def test_a_tool_is_called_and_its_result_read(model):
    called = []
    agent = Agent(model, model_settings=PALETTE)

    @agent.tool_plain
    def find(number: int) -> str:
        called.append(number)
        return "found"

    assert (await agent.run("Find 7.")).output
    assert called == [7]


class Found(BaseModel):
    word: str
    number: int


@pytest.mark.parametrize("how", [NativeOutput, ToolOutput])
async def test_structured_output(model, how):
    found = await Agent(model, output_type=how(Found), model_settings=PALETTE).run("Find 7.")
    assert found.output == Found(word="Find 7.", number=7)


@pytest.mark.parametrize(
    ("settings", "name", "key", "status"),
    [
        ({"temperature": 9.0}, MODEL, KEY, 400),
        ({}, MODEL, "sk-wrong", 401),
        ({}, "gpt-9", KEY, 404),
        ({"extra_body": {"palette": FAR}}, MODEL, KEY, 422),
    ],
    ids=["400", "401", "404", "422"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_errors(able, settings, name, key, status, stream):
    client, model = model_of(able.base_url, name, key)
    async with client:
        agent = Agent(model, model_settings=settings)
        asked = agent.run_stream("hi").__aenter__() if stream else agent.run("hi")
        with pytest.raises(ModelHTTPError) as caught:
            await asked
    assert caught.value.status_code == status
    if status == 422:
        assert caught.value.body["palette"]["certificate"]["direction"] == {"words": -1.0}
