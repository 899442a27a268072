"""Streams: comments, deltas that add up to the answer, one end a choice, errors early and late."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from server.backends.base import BackendError, Candidate, TokenLogprob
from server.routes.chat_answer import pieces
from server.streaming import stream, streamed
from tests.server.conftest import events, run_fake
from tests.server.fakes import THOUGHT, FakeBackend
from tests.server.waiting import until

SHORT = {"targets": {"words": {"at_most": 8.0}}, "candidates": 16}
TOOL = {"type": "function", "function": {"name": "find"}}


def put_together(chunks):
    """Return the messages that a client makes of the chunks, with their ends, by index."""
    found = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            one = found.setdefault(
                choice["index"], {"message": {}, "logprobs": [], "finish_reason": None}
            )
            assert one["finish_reason"] is None, "nothing comes after the end of a choice"
            one["finish_reason"] = choice["finish_reason"]
            one["logprobs"] += (choice["logprobs"] or {}).get("content", [])
            for name, value in choice["delta"].items():
                if name == "tool_calls":
                    calls = one["message"].setdefault("tool_calls", [])
                    for part in value:
                        if part["index"] == len(calls):
                            calls.append({name: part[name] for name in ("id", "type", "function")})
                        else:
                            arguments = part["function"]["arguments"]
                            calls[part["index"]]["function"]["arguments"] += arguments
                elif isinstance(value, str):
                    one["message"][name] = one["message"].get(name, "") + value
                else:
                    one["message"].setdefault(name, value)
    return found


def without_ids(message):
    calls = [{**call, "id": "call"} for call in message.get("tool_calls", [])]
    return {**message, **({"tool_calls": calls} if calls else {})}


@pytest.mark.parametrize(
    "body",
    [
        {"seed": 1},
        {"seed": 1, "palette": SHORT},
        {"seed": 1, "n": 3, "palette": SHORT, "logprobs": True, "top_logprobs": 2},
        {"seed": 1, "n": 4, "tools": [TOOL], "logprobs": True},
        {"seed": 1, "tools": [TOOL], "tool_choice": "required", "palette": SHORT},
        {"seed": 0, "palette": {"floors": {"words": 20}, "candidates": 2}},
        {"seed": 1, "response_format": {"type": "json_object"}, "logprobs": True},
        {"seed": 1, "max_tokens": 1, "n": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("thinks", [False, True])
async def test_deltas_add_up_to_the_answer(able, body, thinks):
    able.backend.thinks = thinks
    whole = (await able.chat(**body)).json()
    chunks = events(await able.chat(stream=True, stream_options={"include_usage": True}, **body))
    found = put_together(chunks)
    assert sorted(found) == [choice["index"] for choice in whole["choices"]]
    for choice in whole["choices"]:
        one = found[choice["index"]]
        assert without_ids(one["message"]) == without_ids(choice["message"])
        assert one["finish_reason"] == choice["finish_reason"]
        if body.get("logprobs"):
            assert one["logprobs"] == choice["logprobs"]["content"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert ("palette" in chunks[-1]) == ("palette" in whole)
    assert not any("palette" in chunk for chunk in chunks[:-1])


async def test_a_call_begins_with_its_name(able):
    chunks = events(await able.chat(stream=True, tools=[TOOL], tool_choice="required"))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": None, "refusal": None}
    first = deltas[1]["tool_calls"][0]
    assert first["id"].startswith("call_")
    assert first["function"] == {"name": "find", "arguments": ""}
    assert set(deltas[2]["tool_calls"][0]) == {"index", "function"}


async def test_thoughts_come_before_the_answer(able):
    able.backend.thinks = True
    chunks = events(await able.chat(stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[1] == {"reasoning_content": THOUGHT}
    assert not any("reasoning_content" in delta for delta in deltas[2:])


async def test_no_usage_unless_asked_for(able):
    for options in ({}, {"stream_options": {"include_usage": False}}):
        chunks = events(await able.chat(stream=True, **options))
        assert all("usage" not in chunk for chunk in chunks)


def candidate(text, *tokens):
    listed = tuple(TokenLogprob(token, -1.0) for token in tokens)
    return Candidate(0, text, listed, len(listed), "stop")


@pytest.mark.parametrize(
    ("drawn", "cut"),
    [
        (candidate("a b", "a", " b"), [("a", 0, 1), (" b", 1, 2)]),
        (candidate("é!", "\ufffd", "\ufffd", "!"), [("é!", 0, 3)]),
        (candidate("aé", "a", "\ufffd", "\ufffd"), [("a", 0, 1), ("é", 1, 3)]),
        (candidate("ab", "a", "bc"), [("a", 0, 1), ("b", 1, 2)]),
        (candidate("a", "a", "<x>"), [("a", 0, 2)]),
        (candidate("ab", "a"), [("a", 0, 1), ("b", 1, 1)]),
        (candidate("", "<x>"), [("", 0, 1)]),
        (candidate("ab", "", "ab"), [("ab", 0, 2)]),
        (candidate("ab"), [("ab", 0, 0)]),
        (candidate(""), []),
    ],
)
def test_pieces(drawn, cut):
    assert pieces(drawn) == cut


# Errors, early and late


async def test_a_full_queue_is_told_by_its_status(tmp_path, settings):
    backend = FakeBackend(hold=True)
    small = settings.model_copy(update={"max_running": 1, "max_queue": 0})
    async with run_fake(tmp_path, small, backend) as running:
        first = asyncio.create_task(running.chat(stream=True))
        await until(lambda: backend.n_started == 1)
        reply = await running.chat(stream=True)
        assert reply.status_code == 429
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.json()["error"]["code"] == "queue_full"
        backend.released.set()
        assert (await first).text.endswith("data: [DONE]\n\n")
        assert (await running.chat(stream=True)).status_code == 200


async def test_what_fails_later_is_the_last_event(tmp_path, settings):
    backend = FakeBackend(hold=True)
    async with run_fake(tmp_path, settings, backend) as running:
        task = asyncio.create_task(running.chat(stream=True, palette=SHORT))
        await until(lambda: backend.n_started == 1)
        backend.failure = BackendError("the model broke")
        backend.released.set()
        reply = await task
    assert reply.status_code == 200
    last = reply.text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "generation_failed"
    assert "[DONE]" not in reply.text


async def test_work_that_fails_at_once_raises_before_the_response():
    async def work():
        raise BackendError("no")

    with pytest.raises(BackendError):
        await streamed(work(), lambda _: [], 1.0)


async def test_comments_until_there_is_something_to_say():
    finished = asyncio.Event()

    async def work():
        await finished.wait()
        return "answer"

    found = []
    async for part in stream(work(), lambda result: [{"said": result}], 0.005):
        found.append(part)
        if len(found) == 4:
            finished.set()
    comments = [part for part in found if part.startswith(b":")]
    assert comments[0] == b": choosing\n\n"
    assert len(comments) >= 4
    assert found[-2:] == [b'data: {"said":"answer"}\n\n', b"data: [DONE]\n\n"]


async def test_a_response_that_nobody_reads_leaves_no_work():
    ended = asyncio.Event()

    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    response = await streamed(work(), lambda _: [], 1.0)
    del response
    async with asyncio.timeout(10):
        await ended.wait()


def test_every_token_is_in_one_piece():
    drawn = candidate("one two", "one", " t", "wo")
    for text in ("one two", "one t", "on", ""):
        cut = pieces(replace(drawn, text=text))
        assert "".join(piece for piece, _, _ in cut) == text
        borders = [border for _, first, last in cut for border in (first, last)]
        assert borders[0] == 0
        assert borders[-1] == 3
        assert borders[1:-1:2] == borders[2::2]
