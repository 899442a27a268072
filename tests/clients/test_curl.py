"""What curl shows: the wire as it is."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from server import embedded
from tests.clients.servers import FAR, KEY, MODEL, QUESTION, SHORT, ObedientBackend

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def command(base_url, body, *options, path="/chat/completions", key=KEY):
    return [
        "curl", "--silent", "--show-error", "--no-buffer", *options, f"{base_url}{path}",
        "-H", f"authorization: Bearer {key}", "-H", "content-type: application/json",
        "-d", body if isinstance(body, str) else json.dumps(body),
    ]  # fmt: skip


def curl(base_url, body, *options, **more):
    """Return the headers (last value of each) with `status` among them, and the body."""
    asked = command(base_url, body, "--include", *options, **more)
    done = subprocess.run(asked, capture_output=True, timeout=100, check=True)
    head, _, content = done.stdout.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return {**headers, "status": int(status.split()[1])}, content


def events(content):
    """Return comments and data of a stream, every event ended by an empty line."""
    *whole, rest = content.decode().split("\n\n")
    assert rest == ""
    assert all(event.startswith((":", "data: ")) and "\n" not in event for event in whole)
    comments = [event for event in whole if event.startswith(":")]
    return comments, [event[6:] for event in whole if event.startswith("data: ")]


def test_a_stream(real_url):
    palette = {"targets": {"helpful": {"gain": 0.2}}}
    body = {"model": embedded.CHAT_MODEL_NAME, "messages": QUESTION, "stream": True, "seed": 3}
    headers, content = curl(real_url, {**body, "palette": palette}, "--http1.1")
    assert headers["status"] == 200
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["x-request-id"].startswith("req_")
    assert headers["transfer-encoding"] == "chunked"
    comments, data = events(content)
    assert content.startswith(b": ")
    assert comments
    assert data[-1] == "[DONE]"
    chunks = [json.loads(each) for each in data[:-1]]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["palette"]["status"] == "met"
    assert not any("palette" in chunk for chunk in chunks[:-1])
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    _, whole = curl(real_url, {**body, "stream": False, "palette": palette})
    assert text == json.loads(whole)["choices"][0]["message"]["content"]


def test_comments_come_while_the_answer_is_not_there(serve):
    """Read as they come: nothing between here and the server holds them back."""
    served = serve(ObedientBackend(hold=True), keepalive_s=0.05)
    body = {"model": MODEL, "messages": QUESTION, "stream": True, "palette": SHORT}
    with subprocess.Popen(command(served.base_url, body), stdout=subprocess.PIPE) as asking:
        lines = [asking.stdout.readline() for _ in range(6)]
        assert lines == [b": choosing\n", b"\n", *[b": still choosing\n", b"\n"] * 2]
        served.inside(served.backend.released.set)
        _, data = events(asking.stdout.read())
    assert asking.returncode == 0
    assert data[-1] == "[DONE]"


def test_a_curl_that_is_stopped_takes_its_work_along(serve):
    served = serve(ObedientBackend(hold=True))
    body = {"model": MODEL, "messages": QUESTION, "stream": True, "palette": SHORT}
    with subprocess.Popen(command(served.base_url, body), stdout=subprocess.PIPE) as asking:
        assert asking.stdout.readline() == b": choosing\n"
        served.until(lambda: served.backend.n_started == 1)
        asking.terminate()
    served.until(lambda: served.backend.n_cancelled == 1)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize(
    ("fields", "key", "status", "code"),
    [
        ({"temperature": 9}, KEY, 400, "invalid_value"),
        ({}, "sk-wrong", 401, "invalid_api_key"),
        ({"model": "gpt-9"}, KEY, 404, "model_not_found"),
        ({"palette": FAR}, KEY, 422, "palette_infeasible"),
    ],
    ids=["400", "401", "404", "422"],
)
def test_errors(able, fields, key, status, code, stream):
    body = {"model": MODEL, "messages": QUESTION, "stream": stream, **fields}
    given = ["-H", "x-request-id: mine-1"]
    headers, content = curl(able.base_url, body, *given, key=key)
    assert headers["status"] == status
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"] == "mine-1"
    error = json.loads(content)["error"]
    assert set(error) - {"palette"} == {"message", "type", "param", "code"}
    assert error["code"] == code


def test_a_body_that_is_too_large(serve, tmp_path):
    """curl asks first, by `Expect: 100-continue`; the answer comes before the body."""
    served = serve(max_body_bytes=2_000)
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "x" * 2_000_000}]})
    path = tmp_path / "body.json"
    path.write_text(body)
    headers, content = curl(served.base_url, f"@{path}", "-H", "expect: 100-continue")
    assert headers["status"] == 413
    assert json.loads(content)["error"]["code"] == "body_too_large"


def test_no_json(able):
    headers, content = curl(able.base_url, "{")
    assert headers["status"] == 400
    assert json.loads(content)["error"]["code"] == "invalid_json"


def test_failing_by_exit_code(able):
    """`curl --fail-with-body`, as scripts use it."""
    asked = command(able.base_url, {"model": "gpt-9", "messages": QUESTION}, "--fail-with-body")
    done = subprocess.run(asked, capture_output=True, timeout=100, check=False)
    assert done.returncode == 22
    assert json.loads(done.stdout)["error"]["code"] == "model_not_found"
