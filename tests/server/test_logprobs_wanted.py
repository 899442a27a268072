"""Log-probabilities cost the engine time: they are asked for where somebody reads them."""

from __future__ import annotations

import math
from contextlib import asynccontextmanager

import httpx
import pytest

from rewards import load_rewards
from server.app import running_app
from tests.server.conftest import chat_body
from tests.server.fakes import FakeBackend

GIVEN = {"targets": {"words": {"multiplier": -1}}, "candidates": 4}
TEXT_ONLY = """\
version: 1
scorers:
  words: {kind: lexical, measure: words}
values:
  words: {from: words, unit: words}
"""


@pytest.mark.parametrize(
    ("fields", "is_asked"),
    [
        ({}, False),
        ({"logprobs": True}, True),
        ({"logprobs": True, "top_logprobs": 2}, True),
        ({"palette": GIVEN}, True),  # one of the values is the log-likelihood
    ],
)
async def test_who_reads_them(running, fields, is_asked):
    answer = (await running.chat(**fields)).json()
    assert running.backend.asked_logprobs == [is_asked]
    if "logprobs" in fields:
        told = answer["choices"][0]["logprobs"]["content"]
        assert all(math.isfinite(token["logprob"]) for token in told)
    if "palette" in fields:
        assert math.isfinite(answer["palette"]["realised"]["log_likelihood"])


@pytest.mark.parametrize("fields", [{"logprobs": 0}, {"logprobs": 2}, {}])
async def test_text_completions(tmp_path, settings, fields):
    backend = FakeBackend(features=frozenset({"logprobs", "raw_prompts"}))
    async with served(tmp_path, settings, backend) as client:
        answer = await client.post(
            "/v1/completions", json={"model": "fake", "prompt": "Once"} | fields
        )
        assert answer.status_code == 200
    assert backend.asked_logprobs == ["logprobs" in fields]


async def test_values_of_the_text_need_none(tmp_path, settings):
    backend = FakeBackend()
    async with served(tmp_path, settings, backend) as client:
        answer = await client.post("/v1/chat/completions", json=chat_body(palette=GIVEN))
        assert answer.json()["palette"]["realised"]["words"] > 0
    assert backend.asked_logprobs == [False]


async def test_streams_without_them_have_a_chunk_for_each_token(running):
    body = chat_body(stream=True, seed=1)
    streamed = await running.client.post("/v1/chat/completions", json=body)
    whole = (await running.chat(seed=1)).json()
    n_deltas = streamed.text.count('"content":"') - 1  # the first is the empty one
    assert n_deltas == whole["usage"]["completion_tokens"] - 1
    assert "NaN" not in streamed.text


@asynccontextmanager
async def served(folder, settings, backend):
    """Run an app with one value, of the text alone; give its client."""
    path = folder / "text.yaml"
    path.write_text(TEXT_ONLY)
    async with running_app(settings, backend=backend, rewards=load_rewards(path)) as app:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client
