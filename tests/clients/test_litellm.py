"""LiteLLM in front of our server.

It keeps the palette's report on whole answers and on the last chunk of a stream; with
`include_usage` it makes the last chunk itself, and the report is lost. Its exceptions are
subclasses of the official client's; 422 and 400 are one to it.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

# Else it fetches a list of prices when it is imported.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
pytest.importorskip("litellm", reason="litellm is not installed")

import litellm
import openai

from server import embedded
from tests.clients.servers import FAR, KEY, MODEL, QUESTION, SHORT, ObedientBackend

PALETTE = {"extra_body": {"palette": SHORT}}

# Raised by litellm itself, from pydantic 2.11 on, on every chunk without a delta.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the 'model_:DeprecationWarning")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """It makes an event loop where there is none, and never closes it: here is one."""
    monkeypatch.setattr(litellm, "suppress_debug_info", True)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


@pytest.fixture
def where(able):
    return {"model": f"openai/{MODEL}", "api_base": able.base_url, "api_key": KEY, "num_retries": 0}


@pytest.fixture
def complete(where):
    def complete(**fields):
        return litellm.completion(**{**where, "messages": QUESTION, **fields})

    return complete


def test_a_model(real_url):
    answer = litellm.completion(
        model=f"openai/{embedded.CHAT_MODEL_NAME}",
        api_base=real_url,
        api_key=KEY,
        messages=QUESTION,
        max_tokens=12,
        extra_body={"palette": {"targets": {"helpful": {"gain": 0.2}}}},
    )
    assert answer.choices[0].message.content
    assert answer.palette["status"] == "met"


def test_too_long_is_known_as_that(real_url):
    """It goes by OpenAI's words; the code is not looked at."""
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(
            model=f"openai/{embedded.CHAT_MODEL_NAME}",
            api_base=real_url,
            api_key=KEY,
            messages=[{"role": "user", "content": "word " * 5000}],
        )


def test_plain(complete):
    answer = complete()
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert not hasattr(answer, "palette")


def test_a_palette_in_the_extra_body(complete):
    answer = complete(**PALETTE)
    assert answer.palette["candidates"] == SHORT["candidates"]
    assert answer.usage.completion_tokens_details.rejected_prediction_tokens > 0


def test_stream_ends_with_the_report(complete):
    whole = complete(**PALETTE, seed=3)
    chunks = list(complete(**PALETTE, seed=3, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].palette["realised"] == whole.palette["realised"]


def test_stream_with_usage(complete):
    whole = complete(**PALETTE, seed=3)
    asked = {**PALETTE, "seed": 3, "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(complete(**asked))
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    put_together = litellm.stream_chunk_builder(chunks)
    assert put_together.choices[0].message.content == whole.choices[0].message.content


def test_choices_logprobs_and_stop(complete):
    answer = complete(**PALETTE, n=2, logprobs=True, top_logprobs=2, seed=3, stop=["lorem"])
    assert len({choice.message.content for choice in answer.choices}) == 2
    for choice in answer.choices:
        entries = choice.logprobs.content
        assert "".join(entry.token for entry in entries) == choice.message.content
        assert {len(entry.top_logprobs) for entry in entries} == {2}


def test_tools(complete):
    parameters = {"type": "object", "properties": {"number": {"type": "integer"}}}
    tool = {"type": "function", "function": {"name": "find", "parameters": parameters}}
    asked = {"messages": [{"role": "user", "content": "Find 7."}], "tools": [tool], **PALETTE}
    for fields in ({}, {"stream": True}):
        answer = complete(**asked, **fields)
        if fields:
            answer = litellm.stream_chunk_builder(list(answer))
        (call,) = answer.choices[0].message.tool_calls
        assert (call.function.name, call.function.arguments) == ("find", '{"number": 7}')
        assert answer.choices[0].finish_reason == "tool_calls"


def test_text_completions(where):
    asked = {**where, "model": f"text-completion-openai/{MODEL}"}
    answer = litellm.text_completion(**asked, prompt=["a", "b"], n=2)
    assert len(answer.choices) == 4


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize(
    ("fields", "kind", "official"),
    [
        ({"temperature": 9}, litellm.BadRequestError, openai.BadRequestError),
        ({"api_key": "sk-wrong"}, litellm.AuthenticationError, openai.AuthenticationError),
        ({"model": "openai/gpt-9"}, litellm.NotFoundError, openai.NotFoundError),
        ({"extra_body": {"palette": FAR}}, litellm.BadRequestError, openai.BadRequestError),
    ],
    ids=["400", "401", "404", "422"],
)
def test_errors(complete, fields, kind, official, stream):
    with pytest.raises(kind) as caught:
        complete(**fields, stream=stream)
    assert isinstance(caught.value, official)
    if "extra_body" in fields:
        assert "no choice among 4 candidates" in str(caught.value)


def test_a_full_queue_is_a_rate_limit(serve):
    served = serve(ObedientBackend(hold=True), max_running=1, max_queue=0)
    asked = {
        "model": f"openai/{MODEL}", "api_base": served.base_url, "api_key": KEY,
        "messages": QUESTION, "max_retries": 0,
    }  # fmt: skip
    with (
        openai.OpenAI(base_url=served.base_url, api_key=KEY) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(client.chat.completions.create, model=MODEL, messages=QUESTION)
        served.until(lambda: served.backend.n_started == 1)
        with pytest.raises(litellm.RateLimitError):
            litellm.completion(**asked)
        served.inside(served.backend.released.set)
        assert first.result(20).choices
