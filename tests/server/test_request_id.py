"""Every answer says its id, every log line carries it, and no log line holds a text."""

from __future__ import annotations

import asyncio
import logging
import re

import pytest

from server.backends.base import BackendError
from server.request_id import RequestIdFilter, current_request, request_id
from tests.server.conftest import chat_body, run_fake
from tests.server.fakes import WORDS, FakeBackend
from tests.server.waiting import until

SHORT = {"targets": {"words": {"at_most": 8.0}}, "candidates": 4}
CANARY = "canary-7f3a"


@pytest.fixture
def logs(caplog):
    """The log at its most talkative, each record with its request's id."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="server")  # a server started by another test sets it
    caplog.handler.addFilter(RequestIdFilter())
    return caplog


def access(logs):
    return [record for record in logs.records if record.name == "server.access"]


# ids


@pytest.mark.parametrize("given", ["a", "req_1", "0" * 128, "!~", "6b1e/7:8"])
async def test_the_clients_own_id_is_kept(running, given):
    reply = await running.client.get("/v1/models", headers={"x-request-id": given})
    assert reply.headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", [None, "", "0" * 129, "a b", "a\tb", "é", "a\x7fb"])
async def test_another_one_is_made_where_it_is_none(running, given):
    headers = [] if given is None else [(b"x-request-id", given.encode())]
    replies = [await running.client.get("/v1/models", headers=headers) for _ in range(2)]
    found = {reply.headers["x-request-id"] for reply in replies}
    assert len(found) == 2
    assert all(re.fullmatch("req_[0-9a-f]{32}", one) for one in found)


@pytest.mark.parametrize("given", ["a\nb", "a\r\nX-Evil: 1", "a\n"])
def test_an_id_does_not_break_lines(given):
    assert request_id(given).startswith("req_")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (chat_body(), 200),
        (chat_body(palette=SHORT), 200),
        (chat_body(stream=True), 200),
        (chat_body(n=0), 400),
        (chat_body(model="other"), 404),
        (chat_body(messages=[{"role": "user", "content": "x" * 3_000_000}]), 413),
        (chat_body(palette={"targets": {"words": {"at_least": 1e6}}}), 422),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
async def test_every_answer_has_one(running, body, status):
    reply = await running.client.post(
        "/v1/chat/completions", json=body, headers={"x-request-id": "mine"}
    )
    assert reply.status_code == status
    assert reply.headers["x-request-id"] == "mine"
    assert int(reply.headers["openai-processing-ms"]) >= 0


@pytest.mark.parametrize("failure", [KeyError("x"), BackendError("broke")])
async def test_unexpected_failures_have_one(running, failure):
    running.backend.failure = failure
    reply = await running.chat()
    assert reply.status_code == 500
    assert reply.headers["x-request-id"].startswith("req_")
    assert reply.json()["error"]["type"] == "server_error"


async def test_requests_do_not_share_ids(tmp_path, settings, logs):
    backend = FakeBackend(hold=True)
    async with run_fake(tmp_path, settings, backend) as running:
        waiting = [
            asyncio.create_task(
                running.client.post(
                    "/v1/chat/completions", json=chat_body(), headers={"x-request-id": f"id{i}"}
                )
            )
            for i in range(8)
        ]
        await asyncio.sleep(0)
        backend.released.set()
        replies = await asyncio.gather(*waiting)
    assert [reply.headers["x-request-id"] for reply in replies] == [f"id{i}" for i in range(8)]
    assert {record.request_id for record in access(logs)} == {f"id{i}" for i in range(8)}
    assert current_request.get() is None


# the access log


async def test_one_line_for_each_request(running, logs):
    headers = {"x-request-id": "mine"}
    body = chat_body(palette=SHORT, n=2)
    reply = await running.client.post("/v1/chat/completions", json=body, headers=headers)
    usage = reply.json()["usage"]
    (line,) = [record for record in access(logs) if record.levelno == logging.INFO]
    assert line.request_id == "mine"
    spent = usage["completion_tokens"]
    served = spent - usage["completion_tokens_details"]["rejected_prediction_tokens"]
    assert re.fullmatch(
        r"POST /v1/chat/completions 200 \d+ ms model=fake palette=met candidates=4 "
        f"tokens={spent} served={served}",
        line.getMessage(),
    )
    assert 0 < served < spent


async def test_streams_and_bare_answers_have_theirs(running, logs):
    await running.chat(stream=True, palette=SHORT)
    await running.chat()
    await running.chat(palette=SHORT | {"report": "none"})
    lines = [line.getMessage() for line in access(logs) if line.levelno == logging.INFO]
    assert ["palette=met" in line for line in lines] == [True, False, True]
    assert "palette=none candidates=1" in lines[1]


async def test_what_was_promised_and_delivered_is_in_the_debug_log(running, logs):
    report = (await running.chat(palette=SHORT)).json()["palette"]
    (line,) = [line.getMessage() for line in access(logs) if "expected" in line.getMessage()]
    for name, level in report["expected"].items():
        assert f"{name} {level['level']:.4g} -> {report['realised'][name]:.4g}" in line


@pytest.mark.parametrize(
    ("failure", "code"),
    [(BackendError("broke"), "generation_failed"), (KeyError("x"), "internal_error")],
)
@pytest.mark.parametrize(("stream", "status"), [(False, 500), (True, 200)], ids=["plain", "stream"])
async def test_errors_are_in_the_line(tmp_path, settings, logs, failure, code, stream, status):
    backend = FakeBackend(hold=True)
    async with run_fake(tmp_path, settings, backend) as running:
        task = asyncio.create_task(running.chat(stream=stream))
        await until(lambda: backend.n_started == 1)
        backend.failure = failure
        backend.released.set()
        assert (await task).status_code == status
    (line,) = [line.getMessage() for line in access(logs)]
    assert re.search(rf"completions {status} \d+ ms error={code}", line)


async def test_an_unknown_model_is_no_word_of_the_line(running, logs):
    await running.chat(model="other")
    (line,) = [line.getMessage() for line in access(logs)]
    assert re.fullmatch(r"POST /v1/chat/completions 404 \d+ ms error=model_not_found", line)


async def test_probes_are_quiet(running, logs):
    for path in ("/health", "/ready", "/metrics"):
        await running.client.get(path)
    assert {line.levelno for line in access(logs)} == {logging.DEBUG}


async def test_a_path_is_one_word_of_the_line(running, logs):
    await running.client.get("/x%0aINFO forged%1b[31m" + "y" * 5000)
    (line,) = [line.getMessage() for line in access(logs)]
    assert "\n" not in line
    assert "\x1b" not in line
    assert "INFO forged" not in line
    assert len(line) < 300


# secrecy


def canaries():
    """Return bodies with the canary in every place a client can write."""
    user = {"role": "user", "content": CANARY}
    tool = {"type": "function", "function": {"name": CANARY, "description": CANARY}}
    yield chat_body(messages=[user])
    yield chat_body(messages=[user], palette=SHORT | {"report": "full"}, logprobs=True)
    yield chat_body(messages=[user], palette=SHORT | {"scope": "answer"}, stream=True)
    yield chat_body(messages=[user | {"name": CANARY}])
    yield chat_body(messages=[{"role": CANARY, "content": CANARY}])
    yield chat_body(messages=[{"role": "user", "content": [{"type": CANARY, "text": CANARY}]}])
    yield chat_body(messages=[{"role": "user", "content": f"{CANARY} " * 600}])
    yield chat_body(model=CANARY)
    yield chat_body(stop=[CANARY], user=CANARY, metadata={CANARY: CANARY})
    yield chat_body(tools=[tool], tool_choice=CANARY)
    yield chat_body(tools=[tool], messages=[user, {"role": "tool", "content": CANARY}])
    yield chat_body(response_format={"type": "json_schema", "json_schema": {"name": CANARY}})
    yield chat_body(**{CANARY: CANARY})
    yield chat_body(palette={"targets": {CANARY: "keep"}})
    yield chat_body(palette={"targets": {"words": CANARY}})
    yield chat_body(palette={"targets": {"words": {CANARY: 1}}})
    yield chat_body(palette=SHORT | {"floors": {CANARY: 1}, "profile": CANARY})


@pytest.mark.parametrize(
    "failure",
    [None, BackendError("broke"), KeyError(CANARY), ValueError(f"cannot render {CANARY}")],
    ids=["none", "backend", "key", "value"],
)
async def test_no_text_is_ever_logged(running, logs, failure):
    running.backend.failure = failure
    client = running.client
    replies = []
    for body in canaries():
        for path in ("chat/completions", "completions", "palette/solve", "palette/score"):
            answers = {"answers": [CANARY]} if path == "palette/score" else {}
            replies.append(await client.post(f"/v1/{path}?q={CANARY}", json=body | answers))
    replies += [
        await client.post("/v1/chat/completions", content=f'{{"{CANARY}'),
        await client.get("/v1/models", params={CANARY: CANARY}, headers={"cookie": CANARY}),
        await client.get("/v1/models", headers={"authorization": f"Bearer {CANARY}"}),
    ]
    assert {200, 400, 404} <= {reply.status_code for reply in replies}
    assert len(access(logs)) >= len(replies)
    ours = [record for record in logs.records if not record.name.startswith("http")]  # the client's
    told = "\n".join(logs.handler.format(record) for record in ours)
    assert CANARY not in told
    # Nor the answers: no two words of the fake backend's in a row.
    assert not re.search(rf"\b({'|'.join(WORDS)}) ({'|'.join(WORDS)})\b", told)


async def test_an_unexpected_failure_is_told_with_its_place_and_without_its_words(
    running, logs, monkeypatch
):
    async def render(messages, tools=None):
        try:
            raise OSError(CANARY)
        except OSError as error:
            raise RuntimeError(CANARY) from error

    monkeypatch.setattr(running.backend, "render", render)
    assert (await running.chat()).status_code == 500
    assert "builtins.RuntimeError" in logs.text
    assert "builtins.OSError" in logs.text
    assert logs.text.count("in render") == 2
    assert CANARY not in logs.text
