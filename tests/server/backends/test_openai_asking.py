"""Questions about answers, put to an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest
from numpy.testing import assert_allclose

from rewards import Sample
from server.backends.base import UpstreamError
from server.backends.openai_asking import answer_of, n_prompt_tokens
from server.backends.openai_remote import OpenAIRemoteBackend
from tests.server.backends.fake_upstream import FakeUpstream, Fault, listening
from tests.server.waiting import until

WORDS = (("Yes", " Yes", "yes"), ("No", " No", "no"))
SAMPLE = Sample(({"role": "user", "content": "Hi"},), "Oh, it is you.")


class Answering(FakeUpstream):
    """Says yes with a probability that depends on the question."""

    def _choice(self, body, index):
        choice = super()._choice(body, index)
        if body.get("top_logprobs") == 20 and self.has_logprobs:
            question = body["messages"][-1]["content"]
            top = {"Yes": 0.5, " Yes": 0.125, "No": 0.25, "The": 0.1, "kind": 0.02}
            if "rude" in question:
                top = {"No": 0.5, "N": 0.25, " ": 0.125, "The": 0.1}
            if "blue" in question:
                top = {"Blue": 0.9, " ": 0.05}
            choice["logprobs"]["content"][0]["top_logprobs"] = [
                {"token": token, "logprob": math.log(p), "bytes": None} for token, p in top.items()
            ]
        return choice


@pytest.fixture
async def upstream():
    fake = Answering()
    async with listening(fake.app) as url:
        backend = OpenAIRemoteBackend(url, max_connections=2, extra_body={"chat": 1})
        await backend.start()
        fake.bodies.clear()
        yield fake, backend
        await backend.close()


async def test_the_mass_of_yes_and_no_is_read_from_the_likeliest_tokens(upstream):
    fake, backend = upstream
    backend.check_words(WORDS)
    judged = await backend.ask(SAMPLE, ["Is it kind?", "Is it rude?"], WORDS)
    # No yes among the second's: it is as likely as the least of those told, at most.
    assert_allclose(np.exp(judged.logprobs), [[0.625, 0.25], [0.1, 0.75]])
    assert judged.n_tokens == 2 * 11
    bodies = sorted(fake.bodies, key=lambda body: body["messages"][-1]["content"])
    for body, question in zip(bodies, ("Is it kind?", "Is it rude?"), strict=True):
        assert body["messages"] == [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Oh, it is you."},
            {"role": "user", "content": question},
        ]
        wanted = {"max_tokens": 1, "temperature": 1, "top_p": 1, "top_logprobs": 20, "chat": 1}
        assert wanted.items() <= body.items()
        assert not body.get("stream")


async def test_more_questions_than_connections_take_turns(upstream):
    fake, backend = upstream
    found = await backend.ask(SAMPLE, [f"Is it kind {i}?" for i in range(9)], WORDS)
    assert found.logprobs.shape == (9, 2)
    assert fake.n_peak <= 2


async def test_what_can_be_tried_again_is(upstream):
    fake, backend = upstream
    fake.faults.append(Fault(status=503))
    assert (await backend.ask(SAMPLE, ["Is it kind?"], WORDS)).logprobs.shape == (1, 2)
    assert len(fake.bodies) == 2


async def test_cancelled_questions_stop_upstream(upstream):
    fake, backend = upstream
    fake.released.clear()
    asked = asyncio.create_task(backend.ask(SAMPLE, ["Is it kind?", "Is it rude?"], WORDS))
    await until(lambda: fake.n_active == 2)
    asked.cancel()
    await until(lambda: fake.n_left == 2)


async def test_a_reply_without_yes_or_no_is_an_error(upstream):
    _, backend = upstream
    with pytest.raises(ValueError, match=r"none of the 2 likeliest beginnings.*'Yes'.*'no'"):
        await backend.ask(SAMPLE, ["Is it kind?", "Which is blue?"], WORDS)


async def test_a_refusal_is_told_without_its_words(upstream):
    fake, backend = upstream
    fake.faults.append(Fault(status=400, message="you said: my secret"))
    with pytest.raises(ValueError, match=r"refuses the question \(PromptError\)$") as caught:
        await backend.ask(SAMPLE, ["Is it kind?"], WORDS)
    assert caught.value.__suppress_context__


async def test_an_upstream_without_log_probabilities_cannot_judge():
    async with listening(Answering(has_logprobs=False).app) as url:
        backend = OpenAIRemoteBackend(url)
        await backend.start()
        try:
            with pytest.raises(ValueError, match="reports no log-probabilities"):
                backend.check_words(WORDS)
        finally:
            await backend.close()


@pytest.mark.parametrize(
    "reply",
    [
        None,
        {"choices": []},
        {"choices": [{"logprobs": None}]},
        {"choices": [{"logprobs": {"content": [{"token": "Yes", "logprob": -1.0}]}}]},
        {"choices": [{"logprobs": {"content": [{"top_logprobs": []}]}}]},
    ],
)
def test_a_reply_without_the_likeliest_tokens_is_an_error(reply):
    with pytest.raises(UpstreamError, match="does not tell the likeliest first tokens"):
        answer_of(reply, WORDS)


@pytest.mark.parametrize(
    ("reply", "n_tokens"),
    [
        ({"usage": {"prompt_tokens": 7}}, 7),
        ({"usage": {"prompt_tokens": -7}}, 0),
        ({"usage": {"prompt_tokens": "7"}}, 0),
        ({"usage": {}}, 0),
        ({"usage": None}, 0),
        ({"usage": 7}, 0),
        ({}, 0),
        (None, 0),
    ],
)
def test_tokens_of_a_question_are_those_the_upstream_tells(reply, n_tokens):
    assert n_prompt_tokens(reply) == n_tokens


def test_a_token_that_two_sets_begin_with_says_nothing():
    top = [{"token": token, "logprob": logprob} for token, logprob in (("T", -1), ("True", -2))]
    reply = {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}
    assert answer_of(reply, [["True"], ["That is false"]]) == [-2, -2]
