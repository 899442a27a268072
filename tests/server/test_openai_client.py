"""The official client against a real server with the embedded models: what a user does first."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from server import embedded
from tests.running_server import running_server

MODEL = embedded.CHAT_MODEL_NAME
QUESTION = [{"role": "user", "content": "How do I keep my houseplants alive?"}]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    state = tmp_path_factory.mktemp("state")
    with (
        running_server(PALETTE_STATE_DIR=str(state)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def create(client: openai.OpenAI, palette: object = None, **fields):
    return client.chat.completions.create(
        model=MODEL, messages=QUESTION, extra_body={"palette": palette}, **fields
    )


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_plain(client):
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION)
    assert len(answer.choices[0].message.content.split()) > 3
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_palette_by_quantiles(client):
    targets = {"humorous": {"quantile": 0.75}, "helpful": "keep", "words": {"at_most": 30}}
    answer = create(client, {"targets": targets})
    report = answer.model_extra["palette"]
    assert report["status"] == "met"
    assert report["calibration"]["valid"], report["calibration"]["warnings"]
    assert set(report["targets"]) == set(targets)
    expected = {name: level["level"] for name, level in report["expected"].items()}
    assert expected["humorous"] >= report["targets"]["humorous"] - 1e-6
    assert expected["words"] <= 30 + 1e-6
    details = answer.usage.completion_tokens_details
    assert details.rejected_prediction_tokens > 0


def test_stream(client):
    palette = {"targets": {"positive": {"gain": 0.3}}}
    whole = create(client, palette, seed=11)
    chunks = list(
        create(client, palette, seed=11, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 5
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].model_extra["palette"]["status"] == "met"


def test_three_choices_with_logprobs(client):
    answer = create(
        client, {"targets": {"helpful": {"gain": 0.3}}}, n=3, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        tokens = choice.logprobs.content
        assert "".join(token.token for token in tokens) == choice.message.content
        assert all(len(token.top_logprobs) == 2 for token in tokens)


def test_seed_stop_and_length(client):
    first, second = (create(client, seed=5, max_tokens=12).choices[0] for _ in range(2))
    assert first.message.content == second.message.content
    assert first.finish_reason == "length"
    stopped = create(client, seed=5, stop=[" the", "."]).choices[0]
    assert "." not in stopped.message.content


def test_infeasible_names_the_combination_the_nearest_and_the_smallest_n(client):
    targets = {"helpful": {"gain": 0.9}, "humorous": {"gain": 0.9}}
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        create(client, {"targets": targets, "candidates": 4})
    error = caught.value.body
    assert error["code"] == "palette_infeasible"
    assert "helpful" in error["message"]
    found = error["palette"]
    assert set(found["certificate"]["direction"]) == {"helpful", "humorous"}
    assert found["certificate"]["asked"] > found["certificate"]["limit"]
    assert found["min_candidates"] > 4
    served = create(client, {**found["nearest"], "candidates": 4})
    assert served.model_extra["palette"]["status"] == "met"
    enough = {"targets": targets, "candidates": found["min_candidates"]}
    assert create(client, enough).model_extra["palette"]["status"] == "met"


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"palette": {"targets": {"funny": "keep"}}}, openai.BadRequestError),
        ({"palette": {"targets": {"helpful": {"quantile": "high"}}}}, openai.BadRequestError),
        ({"palette": 3}, openai.BadRequestError),
        ({"temperature": 9}, openai.BadRequestError),
    ],
)
def test_mistakes_raise_the_right_class(client, fields, kind):
    palette = fields.pop("palette", None)
    with pytest.raises(kind) as caught:
        create(client, palette, **fields)
    assert caught.value.body["message"]


def test_unknown_model(client):
    with pytest.raises(openai.NotFoundError, match=MODEL):
        client.chat.completions.create(model="gpt-9", messages=QUESTION)


def test_penalties_and_biases(client):
    one = create(client, seed=5, max_tokens=6, logit_bias={"300": 100}, logprobs=True).choices[0]
    assert len({token.token for token in one.logprobs.content}) == 1
    palette = {"targets": {"positive": {"gain": 0.2}}}
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        extra_body={"palette": palette, "min_p": 0.05, "repetition_penalty": 1.1},
    )
    assert answer.choices[0].message.content


def test_messages_of_many_kinds(client):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "Hello!"}], "name": "ann"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot."}]},
            *QUESTION,
        ],
    )
    assert answer.choices[0].message.content


def test_a_deadline(client):
    answer = create(client, {"targets": {"positive": {"gain": 0.2}}, "deadline_ms": 60_000})
    deadline = answer.model_extra["palette"]["deadline"]
    assert (deadline["asked"], deadline["used"], deadline["met"]) == (16, 16, True)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "find"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"10000000": 1}}, "logit_bias"),
    ],
)
def test_what_this_backend_cannot_do_is_refused(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, **fields)
    assert caught.value.param == param
