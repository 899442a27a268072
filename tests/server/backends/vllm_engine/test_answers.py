"""How an answer ends, what shapes it, and what is refused."""

from __future__ import annotations

import json

import pytest

from server.backends.base import ContextLengthError, PromptError
from tests.server.backends.vllm_engine.conftest import ENGINE, LONG, collect, never_ending

pytestmark = ENGINE


# How an answer ends


async def test_the_token_limit_counts_the_end_token(backend):
    candidates = await collect(backend, n=32, seed=1, max_tokens=24)
    assert {c.finish_reason for c in candidates} == {"stop", "length"}
    for c in candidates:
        assert c.n_tokens == len(c.tokens) + (c.finish_reason == "stop") <= 24
        assert "".join(token.token for token in c.tokens) == c.text
        assert "<|" not in c.text


async def test_answers_end_before_the_first_stop_string(backend):
    whole = await collect(backend, n=16, seed=2, max_tokens=40)
    stops = ("you", ". ", "")
    cut = await collect(backend, n=16, seed=2, max_tokens=40, stop=stops)
    n_cut = 0
    for a, b in zip(whole, cut, strict=True):
        places = [a.text.index(stop) for stop in stops if stop and stop in a.text]
        assert b.text == (a.text[: min(places)] if places else a.text)
        assert b.finish_reason == ("stop" if places else a.finish_reason)
        assert "".join(token.token for token in b.tokens).startswith(b.text)
        n_cut += bool(places)
    assert n_cut > 4


async def test_answers_end_where_the_context_does(backend):
    prompt = await backend.render(LONG)
    room = backend.max_context - len(prompt.token_ids)
    stream = backend.generate(prompt, 2, never_ending(), 0)
    assert [c.n_tokens async for c in stream] == [room, room]


async def test_every_candidate_fits_the_schema(backend):
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["good", "bad"]}, "stars": {"enum": [1, 2, 3]}},
        "required": ["mood", "stars"],
        "additionalProperties": False,
    }
    candidates = await collect(backend, n=16, max_tokens=64, json_schema=json.dumps(schema))
    found = [json.loads(c.text) for c in candidates]
    assert all(set(one) == {"mood", "stars"} for one in found)
    assert len({(one["mood"], one["stars"]) for one in found}) > 1


async def test_biases_and_penalties_are_felt(backend):
    common = {"n": 8, "max_tokens": 12}
    forced = await collect(backend, logit_bias=((300, 100.0),), **common)
    (token,) = {t.token for c in forced for t in c.tokens}

    async def count(**penalty):
        candidates = await collect(backend, logit_bias=((300, 14.0),), **penalty, **common)
        return sum(t.token == token for c in candidates for t in c.tokens)

    unpenalised = await count()
    assert await count(frequency_penalty=2.0) < unpenalised
    assert await count(presence_penalty=2.0) < unpenalised
    # A repetition penalty this strong leaves no token that was there before.
    for c in await collect(backend, n=4, max_tokens=40, repetition_penalty=1000.0):
        assert len({t.token for t in c.tokens}) == len(c.tokens)


# What is refused


async def test_prompts_too_long_are_refused(backend):
    with pytest.raises(
        ContextLengthError, match=r"maximum context length is 1024 tokens.*resulted"
    ):
        await backend.render([{"role": "user", "content": "rice " * 2000}])


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temperature": 0.005}, "at least 0.01"),
        ({"logit_bias": ((99_999, 1.0),)}, "vocab"),
        ({"json_schema": '{"type": "nonsense"}'}, "refuses this request"),
    ],
    ids=str,
)
async def test_what_vllm_cannot_do_is_refused(backend, sampling, message):
    with pytest.raises(PromptError, match=message):
        await collect(backend, **sampling)
    assert await collect(backend)
