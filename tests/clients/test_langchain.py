"""LangChain's chat model on our server: its own standard suite, and what it makes of a palette.

Of that suite these are off: images, audio, PDFs and Anthropic's blocks (this server reads text
only), cassettes, another model's name in one call (this server has one), and JSON without a schema
(a backend without a model cannot guess the fields from the question). LangChain drops fields that
it does not know: the palette's report is read from the HTTP client beneath it.
"""

from __future__ import annotations

import json

import httpx
import openai
import pytest

pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
pytest.importorskip("langchain_tests", reason="langchain-tests is not installed")

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

from server import embedded
from tests.clients.servers import FAR, KEY, MODEL, SHORT
from tests.server.fakes import WORDS

pytestmark = [
    # Raised by langchain-openai itself: of an answer already parsed, and of pydantic's old models.
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning"),
    pytest.mark.filterwarnings("ignore:Received a Pydantic BaseModel V1 schema:UserWarning"),
]


class Standard(ChatModelIntegrationTests):
    """The suite that providers' own packages run."""

    @property
    def chat_model_class(self):
        return ChatOpenAI

    @property
    def chat_model_params(self):
        return {**self.where, "max_retries": 0, "stream_usage": True}

    @property
    def supports_model_override(self):
        return False

    @pytest.fixture
    async def clients(self):
        """HTTP clients that are closed: those LangChain makes never are."""
        async with httpx.AsyncClient() as later:
            with httpx.Client() as now:
                yield {"http_client": now, "http_async_client": later}


class TestStandardWithTools(Standard):
    @pytest.fixture(autouse=True)
    def _on(self, able, clients):
        palette = {"extra_body": {"palette": SHORT}}
        self.where = {
            "base_url": able.base_url, "api_key": KEY, "model": MODEL, **clients, **palette,
        }  # fmt: skip


class TestStandardOnAModel(Standard):
    """The embedded model writes text only."""

    has_tool_calling = has_tool_choice = has_structured_output = False

    @pytest.fixture(autouse=True)
    def _on(self, real_url, clients):
        self.where = {
            "base_url": real_url, "api_key": KEY, "model": embedded.CHAT_MODEL_NAME, **clients,
        }  # fmt: skip


@pytest.fixture
def seen():
    """Bodies of the answers, as the HTTP client sees them."""
    return []


@pytest.fixture
def model(able, seen):
    def keep(response):
        if response.headers["content-type"] == "application/json":
            seen.append(json.loads(response.read()))

    with httpx.Client(event_hooks={"response": [keep]}) as client:
        yield ChatOpenAI(
            model=MODEL, base_url=able.base_url, api_key=KEY, max_retries=0, http_client=client
        )


def test_a_palette_in_the_extra_body(model, seen):
    answer = model.bind(extra_body={"palette": SHORT}).invoke("hi")
    (whole,) = seen
    assert whole["palette"]["status"] == "met"
    assert "palette" not in str(answer)
    spent = answer.response_metadata["token_usage"]
    assert spent["total_tokens"] == whole["usage"]["total_tokens"]
    assert spent["completion_tokens_details"]["rejected_prediction_tokens"] > 0


def test_stream_adds_up(model):
    bound = model.bind(extra_body={"palette": SHORT}, seed=4)
    chunks = list(bound.stream("hi", stream_usage=True))
    whole = sum(chunks[1:], chunks[0])
    assert whole.content == bound.invoke("hi").content
    assert whole.response_metadata["finish_reason"] == "stop"
    assert whole.usage_metadata["output_tokens"] > len(whole.content.split())


def test_choices_logprobs_and_seed(model):
    asked = {"logprobs": True, "top_logprobs": 2, "seed": 3, "extra_body": {"palette": SHORT}}
    one, again = (model.bind(**asked).invoke("hi") for _ in range(2))
    assert one.content == again.content
    entries = one.response_metadata["logprobs"]["content"]
    assert "".join(each["token"] for each in entries) == one.content
    assert {len(each["top_logprobs"]) for each in entries} == {2}
    asked = {"n": 2, "seed": 3, "extra_body": {"palette": SHORT}}
    (several,) = model.generate([[HumanMessage("hi")]], **asked).generations
    assert len({each.text for each in several}) == 2


def test_batch_is_one_answer_each(model):
    answers = model.bind(extra_body={"palette": SHORT}).batch(["a", "b", "c"])
    assert all(set(answer.content.split()) <= set(WORDS) for answer in answers)


@pytest.mark.parametrize(
    ("fields", "kind", "code"),
    [
        ({"temperature": 9.0}, openai.BadRequestError, "invalid_value"),
        ({"model": "gpt-9"}, openai.NotFoundError, "model_not_found"),
        ({"extra_body": {"palette": FAR}}, openai.UnprocessableEntityError, "palette_infeasible"),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_errors(model, fields, kind, code, stream):
    bound = model.bind(**fields)
    with pytest.raises(kind) as caught:
        list(bound.stream("hi")) if stream else bound.invoke("hi")
    assert caught.value.code == code


def test_a_wrong_key(able):
    with httpx.Client() as client, pytest.raises(openai.AuthenticationError):
        ChatOpenAI(
            model=MODEL, base_url=able.base_url, api_key="sk-wrong", http_client=client
        ).invoke("hi")
