"""The official Python client over a socket and with a key: retries, ids, helpers, leaving.

What it makes of answers and errors is tested in tests/server as well; here is what needs a server
that it can wait for.
"""

from __future__ import annotations

import threading

import openai
import pytest

from server import embedded
from tests.clients.servers import FAR, KEY, MODEL, QUESTION, SHORT, ObedientBackend

PALETTE = {"extra_body": {"palette": SHORT}}
ASKED = {"model": MODEL, "messages": QUESTION}


def client_of(served, **fields):
    fields = {"api_key": KEY, "max_retries": 0, **fields}
    return openai.OpenAI(base_url=served.base_url, **fields)


@pytest.fixture
def client(able):
    with client_of(able) as client:
        yield client


@pytest.fixture
def slept(monkeypatch):
    """Seconds that the client wanted to sleep before a retry, and what happens instead."""
    slept, then = [], []

    def sleep(seconds):
        assert threading.current_thread() is threading.main_thread()
        slept.append(seconds)
        for act in then:
            act()

    monkeypatch.setattr(openai._base_client.time, "sleep", sleep)
    return slept, then


def test_the_key_of_the_environment(real_url, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", real_url)
    with openai.OpenAI() as client:
        assert [model.id for model in client.models.list()] == [embedded.CHAT_MODEL_NAME]


def test_request_ids(client):
    answer = client.chat.completions.create(**ASKED)
    assert answer._request_id.startswith("req_")
    given = {"x-request-id": "mine-1"}
    assert client.chat.completions.create(**ASKED, extra_headers=given)._request_id == "mine-1"
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.chat.completions.create(
            **ASKED, extra_body={"palette": FAR}, extra_headers={"x-request-id": "mine-2"}
        )
    assert caught.value.request_id == "mine-2"


def test_raw_answers(client):
    raw = client.chat.completions.with_raw_response.create(**ASKED, **PALETTE)
    assert int(raw.headers["openai-processing-ms"]) >= 0
    assert raw.parse().model_extra["palette"]["status"] == "met"
    with client.chat.completions.with_streaming_response.create(
        **ASKED, **PALETTE, stream=True
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[0].startswith(":")
    assert lines[-1] == "data: [DONE]"


def test_a_full_queue_is_tried_again_when_the_server_says(serve, slept):
    served = serve(ObedientBackend(hold=True), max_running=1, max_queue=0)
    answers = []

    def ask():
        with client_of(served) as other:
            answers.append(other.chat.completions.create(**ASKED))

    first = threading.Thread(target=ask)
    first.start()
    served.until(lambda: served.backend.n_started == 1)
    seconds, then = slept
    then.append(lambda: served.inside(served.backend.released.set))
    then.append(first.join)
    refused = []
    with client_of(served, max_retries=1) as client:
        client._client.event_hooks["response"].append(
            lambda response: refused.append((response.status_code, response.headers))
        )
        assert client.chat.completions.create(**ASKED).choices
    assert answers
    assert [status for status, _ in refused] == [429, 200]
    assert seconds == [float(refused[0][1]["retry-after"])]


def test_a_stopping_server_is_tried_again_when_it_says(serve, slept):
    served = serve()
    served.inside(lambda: served.running.context.drain.begin(7))
    raises = pytest.raises(openai.InternalServerError)
    with client_of(served, max_retries=2) as client, raises as caught:
        client.chat.completions.create(**ASKED)
    assert caught.value.status_code == 503
    seconds, _ = slept
    assert len(seconds) == 2
    assert all(1 <= second <= 7 for second in seconds)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"temperature": 9}, openai.BadRequestError),
        ({"extra_body": {"palette": FAR}}, openai.UnprocessableEntityError),
        ({"model": "gpt-9"}, openai.NotFoundError),
    ],
)
def test_mistakes_are_not_tried_again(serve, slept, fields, kind):
    with client_of(serve(), max_retries=5) as client, pytest.raises(kind):
        client.chat.completions.create(**{**ASKED, **fields})
    assert slept[0] == []


def test_a_client_that_does_not_wait_takes_its_work_along(serve):
    served = serve(ObedientBackend(hold=True))
    with client_of(served, timeout=1.0) as client, pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(**ASKED)
    served.until(lambda: served.backend.n_cancelled == 1)


def test_a_stream_that_is_closed_takes_its_work_along(serve):
    served = serve(ObedientBackend(hold=True))
    with client_of(served) as client:
        stream = client.chat.completions.create(**ASKED, stream=True)
        served.until(lambda: served.backend.n_started == 1)
        stream.close()
        served.until(lambda: served.backend.n_cancelled == 1)


def test_its_stream_helper(real):
    asked = {"model": embedded.CHAT_MODEL_NAME, "messages": QUESTION, "seed": 5, "n": 2}
    palette = {"palette": {"targets": {"positive": {"gain": 0.2}}}}
    whole = real.chat.completions.create(**asked, extra_body=palette)
    with real.chat.completions.stream(**asked, extra_body=palette) as stream:
        kinds = [event.type for event in stream]
        found = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= set(kinds)
    assert [choice.message.content for choice in found.choices] == [
        choice.message.content for choice in whole.choices
    ]


def test_a_conversation_of_two_turns(real):
    """An answer goes back as the client's own object."""
    asked = {"model": embedded.CHAT_MODEL_NAME, "max_tokens": 12}
    first = real.chat.completions.create(messages=QUESTION, **asked).choices[0].message
    again = [*QUESTION, first, {"role": "user", "content": "Tell me more."}]
    assert real.chat.completions.create(messages=again, **asked).choices[0].message.content
