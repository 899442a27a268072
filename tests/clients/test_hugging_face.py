"""Hugging Face's inference client: it keeps fields it does not know, on answers and on chunks."""

from __future__ import annotations

import pytest

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from server import embedded
from tests.clients.servers import FAR, KEY, MODEL, QUESTION, SHORT

PALETTE = {"extra_body": {"palette": SHORT}}


@pytest.fixture
def chat(able):
    client = InferenceClient(base_url=able.base_url, api_key=KEY)

    def chat(**fields):
        return client.chat_completion(**{"messages": QUESTION, "model": MODEL, **fields})

    return chat


def test_a_model(real_url):
    answer = InferenceClient(base_url=real_url, api_key=KEY).chat.completions.create(
        messages=QUESTION,
        model=embedded.CHAT_MODEL_NAME,
        max_tokens=12,
        extra_body={"palette": {"targets": {"helpful": {"gain": 0.2}}}},
    )
    assert answer.choices[0].message.content
    assert answer.palette["status"] == "met"


def test_plain(chat):
    answer = chat()
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert not hasattr(answer, "palette")


def test_a_palette_in_the_extra_body(chat):
    answer = chat(**PALETTE)
    assert answer.palette["status"] == "met"
    assert answer.usage.completion_tokens_details["rejected_prediction_tokens"] > 0


def test_stream_ends_with_report_and_usage(chat):
    whole = chat(**PALETTE, seed=3)
    asked = {**PALETTE, "seed": 3, "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(chat(**asked))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].palette["realised"] == whole.palette["realised"]
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


async def test_stream_without_threads(able):
    async with AsyncInferenceClient(base_url=able.base_url, api_key=KEY) as client:
        stream = await client.chat_completion(QUESTION, model=MODEL, stream=True, **PALETTE)
        chunks = [chunk async for chunk in stream]
    assert chunks[-1].palette["status"] == "met"


def test_choices_logprobs_seed_and_stop(chat):
    asked = {**PALETTE, "n": 2, "logprobs": True, "top_logprobs": 2, "seed": 3, "stop": ["lorem"]}
    one, again = (chat(**asked) for _ in range(2))
    assert [choice.message for choice in one.choices] == [
        choice.message for choice in again.choices
    ]
    assert one.choices[0].message.content != one.choices[1].message.content
    for choice in one.choices:
        entries = choice.logprobs.content
        assert "".join(entry.token for entry in entries) == choice.message.content
        assert {len(entry.top_logprobs) for entry in entries} == {2}


def test_tools(chat):
    parameters = {"type": "object", "properties": {"number": {"type": "integer"}}}
    tool = {"type": "function", "function": {"name": "find", "parameters": parameters}}
    asked = [{"role": "user", "content": "Find 7."}]
    (call,) = chat(messages=asked, tools=[tool], **PALETTE).choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("find", '{"number": 7}')


def test_a_schema_in_the_form_this_client_sends(chat):
    """With a base URL it rewrites every JSON schema into TGI's form, which is not OpenAI's."""
    schema = {"type": "object", "properties": {"word": {"type": "string"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "found", "schema": schema}}
    answer = chat(response_format=wanted, **PALETTE)
    assert answer.choices[0].message.content == '{"word": "Find a word."}'


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize(
    ("fields", "status", "says"),
    [
        ({"temperature": 9}, 400, "temperature"),
        ({"model": "gpt-9"}, 404, "gpt-9"),
        ({"extra_body": {"palette": FAR}}, 422, "no choice among 4 candidates"),
    ],
    ids=["400", "404", "422"],
)
def test_errors(chat, fields, status, says, stream):
    with pytest.raises(HfHubHTTPError) as caught:
        list(chat(**fields, stream=stream))
    assert caught.value.response.status_code == status
    assert says in str(caught.value)
    assert caught.value.request_id.startswith("req_")


def test_a_wrong_key(able):
    with pytest.raises(HfHubHTTPError) as caught:
        InferenceClient(base_url=able.base_url, api_key="sk-wrong").chat_completion(
            QUESTION, model=MODEL
        )
    assert caught.value.response.status_code == 401
