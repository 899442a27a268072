"""Text completions: prompts as they are, one or many, whole and streamed, with a palette too."""

from __future__ import annotations

import asyncio

import pytest

from rewards import Message
from server.routes import completions
from tests.server.conftest import events, run_fake
from tests.server.fakes import EVERYTHING, FakeBackend
from tests.server.waiting import until

SHORT = {"targets": {"words": {"at_most": 8.0}}, "candidates": 16}


def with_route(found):
    found.app.include_router(completions.router)
    return found


@pytest.fixture
async def running(tmp_path, settings):
    async with run_fake(tmp_path, settings, FakeBackend(features=EVERYTHING)) as found:
        yield with_route(found)


async def complete(running, prompt="Tell me more.", **fields):
    body = {"model": "fake", "prompt": prompt, **fields}
    return await running.client.post("/v1/completions", json=body)


async def completed(running, prompt="Tell me more.", **fields):
    reply = await complete(running, prompt, **fields)
    assert reply.status_code == 200, reply.text
    return reply.json()


async def test_a_text_is_continued_without_a_template(running):
    body = await completed(running, "Once there was", seed=1, max_tokens=30)
    prompt, sampling, seed = running.backend.asked[-1]
    assert prompt.is_raw
    assert prompt.messages == (Message(role="user", content="Once there was"),)
    assert (sampling.max_tokens, seed) == (30, 1)
    assert body["object"] == "text_completion"
    assert body["usage"]["prompt_tokens"] == 3
    assert "palette" not in body


async def test_openais_default_length(running):
    await completed(running)
    assert running.backend.asked[-1][1].max_tokens == 16


async def test_token_ids(running):
    await completed(running, [5, 6, 7])
    assert running.backend.asked[-1][0].messages[0]["content"] == "w5 w6 w7"


@pytest.mark.parametrize("prompts", [["a b", "c d e"], [[1, 2], [3, 4, 5]]], ids=str)
async def test_choices_are_numbered_through(running, prompts):
    body = await completed(running, prompts, n=2, seed=9)
    assert [one["index"] for one in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == 5
    assert len({one["text"] for one in body["choices"]}) == 4
    alone = await completed(running, prompts[0], n=2, seed=9)
    assert [one["text"] for one in alone["choices"]] == [one["text"] for one in body["choices"][:2]]


async def test_a_long_list_leaves_places_to_others(tmp_path, settings):
    narrow = settings.model_copy(update={"max_running": 8, "max_queue": 0})
    backend = FakeBackend(hold=True, features=EVERYTHING)
    async with run_fake(tmp_path, narrow, backend) as running:
        with_route(running)
        many = asyncio.create_task(complete(running, ["a"] * 30))
        await until(lambda: backend.n_started == 4)
        other = asyncio.create_task(running.chat())
        await until(lambda: backend.n_started == 5)
        backend.released.set()
        assert len((await many).json()["choices"]) == 30
        assert (await other).status_code == 200


async def test_echo(running):
    plain = await completed(running, "Once ", seed=1)
    echoed = await completed(running, "Once ", seed=1, echo=True)
    assert echoed["choices"][0]["text"] == "Once " + plain["choices"][0]["text"]


async def test_logprobs(running):
    choice = (await completed(running, logprobs=2, seed=1))["choices"][0]
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"]
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)
    for token, logprob, top in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert top[token] == logprob
        assert 1 <= len(top) <= 3
    bare = (await completed(running, logprobs=0, seed=1))["choices"][0]["logprobs"]
    assert bare["top_logprobs"] is None
    assert bare["token_logprobs"] == found["token_logprobs"]


async def test_palette_reads_the_prompt_as_the_users(running, monkeypatch):
    scored = []
    rewards = running.context.aligner.rewards
    attempt = rewards.attempt

    async def watched(samples, may_fail, names=None, *, more):
        scored.extend(samples)
        return await attempt(samples, may_fail, names, more=more)

    monkeypatch.setattr(rewards, "attempt", watched)
    body = await completed(running, "Once", palette=SHORT, seed=3)
    assert {sample.messages for sample in map(frozen, scored)} == {(("user", "Once"),)}
    report = body["palette"]
    assert report["candidates"] == 16
    assert report["realised"]["words"] == len(body["choices"][0]["text"].split())
    assert any("template" in warning for warning in report["calibration"]["warnings"])


def frozen(sample):
    class Read:
        messages = tuple((one["role"], one["content"]) for one in sample.messages)

    return Read


async def test_a_report_for_each_prompt(running):
    body = await completed(running, ["a", "b", "c"], palette=SHORT, seed=3)
    realised = [one["realised"]["words"] for one in body["palette"]]
    assert realised == [len(one["text"].split()) for one in body["choices"]]
    chunks = events(await complete(running, ["a", "b", "c"], palette=SHORT, seed=3, stream=True))
    assert [one["realised"]["words"] for one in chunks[-1]["palette"]] == realised


async def test_nothing_clears_the_floors(running):
    floors = {"floors": {"words": 20}, "candidates": 2}
    body = await completed(running, ["a", "b"], palette=floors, seed=0, n=2)
    assert [(one["index"], one["finish_reason"]) for one in body["choices"]] == [
        (0, "content_filter"), (2, "content_filter"),
    ]  # fmt: skip


@pytest.mark.parametrize("fields", [{}, {"echo": True}, {"logprobs": 1}], ids=str)
async def test_stream(running, fields):
    fields = {"prompt": ["a b", "c"], "n": 2, "seed": 4, "palette": SHORT, **fields}
    whole = await completed(running, **fields)
    reply = await complete(running, stream=True, stream_options={"include_usage": True}, **fields)
    chunks = events(reply)
    for choice in whole["choices"]:
        parts = [
            one for chunk in chunks for one in chunk["choices"] if one["index"] == choice["index"]
        ]
        assert "".join(one["text"] for one in parts) == choice["text"]
        assert [one["finish_reason"] for one in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        if "logprobs" in fields:
            for name, values in choice["logprobs"].items():
                told = [
                    value for one in parts if one["logprobs"] for value in one["logprobs"][name]
                ]
                assert told == values
    assert chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert "palette" in chunks[-1]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["a " * 600, ["a", "a " * 600]], ids=["one", "list"])
async def test_too_long(running, prompt, stream):
    reply = await complete(running, prompt, stream=stream)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "prompt"
    assert "maximum context length" in reply.json()["error"]["message"]
    assert running.backend.n_started == 0


async def test_one_failure_ends_them_all(running):
    running.backend.failure = RuntimeError("secret")
    reply = await complete(running, ["a", "b"])
    assert reply.status_code == 500
    assert "secret" not in reply.text
    assert running.context.aligner.admission.n_running == 0


async def test_a_backend_without_raw_prompts(tmp_path, settings):
    async with run_fake(tmp_path, settings) as running:
        reply = await complete(with_route(running))
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "prompt"


async def test_best_of_says_what_does_it_here(running):
    error = (await complete(running, best_of=5)).json()["error"]
    assert "palette" in error["message"]


async def test_unknown_model(running):
    reply = await complete(running, model="gpt-9")
    assert reply.status_code == 404
