"""Remote scorers against servers that fail, hang, are slow, are not there, or come back."""

from __future__ import annotations

import asyncio
import threading
import time
from email.utils import formatdate

import numpy as np
import pytest

from rewards import RewardModelError, ScoringError
from rewards.models import endpoint
from tests.rewards.models.remote_upstream import (
    ENTRIES,
    SECRET,
    change,
    good,
    samples,
    trickle,
    unused_port,
)


async def test_requests_overlap_up_to_the_bound(serve, load):
    upstream = serve("webhook")
    inside, most, lock = 0, 0, threading.Lock()
    together = threading.Barrier(3, timeout=10)

    def count(_, body):
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        together.wait()  # broken unless three are here at once
        with lock:
            inside -= 1
        return 200, {}, good("webhook", body)

    async with load("webhook", upstream.url, "max_batch: 1, max_concurrent: 3") as suite:
        upstream.script = [count] * 9
        scores = await suite.score(samples(*("x" * n for n in range(1, 10))), ["liked"])
    np.testing.assert_array_equal(scores[:, 0], range(1, 10))
    assert most == 3


async def test_a_token_is_sent_and_never_told(serve, load, tmp_path):
    upstream = serve("webhook")
    (tmp_path / "token").write_text("tok-123\n")
    async with load("webhook", upstream.url, "token_file: token") as suite:
        assert upstream.seen[-1][1]["Authorization"] == "Bearer tok-123"
        upstream.script = [(401, {}, b"tok-123")]
        with pytest.raises(ScoringError, match="answered 401; set token_file") as caught:
            await suite.score(samples("x"))
    assert "tok-123" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"two tokens", b"line\nline", "tökén".encode()])
async def test_an_unusable_token_file(content, load, tmp_path):
    if content is not None:
        (tmp_path / "token").write_bytes(content)
    with pytest.raises(RewardModelError, match="token_file"):
        await load("webhook", "http://127.0.0.1:9/x", "token_file: token").start()


@pytest.mark.parametrize("api", ENTRIES)
@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_passing_fault_is_tried_again(api, status, serve, load):
    upstream = serve(api)
    async with load(api, upstream.url) as suite:
        upstream.seen.clear()
        upstream.script = [(status, {"Retry-After": "0"}, b"busy")] * 2
        scores = await suite.score(samples("four"))
    np.testing.assert_array_equal(scores, [[4, 1]])
    assert len(upstream.seen) == 3


async def test_a_broken_connection_is_tried_again(serve, load):
    upstream = serve("webhook")
    async with load("webhook", upstream.url) as suite:
        upstream.script = [lambda *_: None]
        scores = await suite.score(samples("four"), ["liked"])
    np.testing.assert_array_equal(scores, [[4]])


async def test_pauses(serve, load, monkeypatch):
    upstream = serve("webhook")
    pauses = []
    monkeypatch.setattr(endpoint, "_pause", pauses.append)
    async with load("webhook", upstream.url, "retries: 4, timeout_s: 60") as suite:
        then = formatdate(time.time() + 20, usegmt=True)
        waits = [{"Retry-After": "7"}, {"Retry-After": then}, {"Retry-After": "soon"}, {}]
        upstream.script = [(503, headers, b"") for headers in waits]
        await suite.score(samples("x"))
        assert pauses[0] == 7.0
        assert 15 < pauses[1] <= 20
        assert 0.2 <= pauses[2] <= 0.6
        assert 0.4 <= pauses[3] <= 1.2
        upstream.script = [(429, {"Retry-After": "61"}, b"")]
        with pytest.raises(ScoringError, match=r"429, and another try in 61 s .*timeout_s"):
            await suite.score(samples("x"))
        assert len(pauses) == 4
        upstream.script = [(500, {}, b"")] * 5
        with pytest.raises(ScoringError, match=r"500 \(tries: 5\)"):
            await suite.score(samples("x"))
        assert len(pauses) == 8  # none behind the last try


@pytest.mark.parametrize("api", ENTRIES)
@pytest.mark.parametrize(
    "fault", ["html", "redirect", "missing", "too long", "broken", "slow", "down"]
)
async def test_one_remote_fails_and_the_others_still_score(api, fault, serve, load, monkeypatch):
    monkeypatch.setattr(endpoint, "_pause", lambda _: None)
    upstream = serve(api)
    echo = f"<html>{SECRET}</html>".encode()
    script, problem = {
        "html": ([(200, {}, echo)], "not JSON"),
        "redirect": ([(307, {"Location": "/stolen"}, echo)], "it redirects"),
        "too long": ([(400, {}, echo)], "answered 400; .*set truncate"),
        "missing": ([(404, {}, echo)], "answered 404; correct the path"),
        "broken": ([(500, {}, echo)] * 3, r"answered 500 \(tries: 3\)"),
        "slow": ([lambda handler, _: handler.server.release.wait(20) and None], "within 1 s"),
        "down": ([], r"cannot be reached .*\(tries: 3\)"),
    }[fault]
    async with load(api, upstream.url, "timeout_s: 60") as suite:
        upstream.seen.clear()
        upstream.script = list(script)
        changes = {
            "down": {"url": f"http://127.0.0.1:{unused_port()}/post"},
            "slow": {"timeout_s": 1},
        }
        change(suite, **changes.get(fault, {}))
        with pytest.raises(ScoringError, match=problem) as caught:
            await suite.score(samples(f"{SECRET} it is"))
        assert caught.value.scorer == "far"
        assert caught.value.values == ("liked",)
        assert "127.0.0.1" in str(caught.value)
        assert SECRET not in str(caught.value)
        assert caught.value.__cause__ is None
        assert problem.split()[0].strip("\\(") in suite.health()["far"]["last_error"]
        np.testing.assert_array_equal(await suite.score(samples("a b"), ["words"]), [[2]])
        assert len(upstream.seen) == (0 if fault == "down" else len(script))
        if fault != "down":  # and the remote is back
            change(suite, timeout_s=60)
            np.testing.assert_array_equal(await suite.score(samples("a b")), [[3, 2]])


@pytest.mark.parametrize(
    "fault", [trickle, lambda handler, _: handler.server.release.wait(20) and None]
)
async def test_what_hangs_is_left_behind(fault, serve, load, monkeypatch):
    upstream = serve("webhook")
    monkeypatch.setattr(upstream, "handle_error", lambda *_: None)  # it notices that we left
    async with load("webhook", upstream.url, "timeout_s: 60, max_concurrent: 1") as suite:
        upstream.script = [fault]
        change(suite, timeout_s=0.5)
        with pytest.raises(ScoringError, match=r"within 0\.5 s"):
            await suite.score(samples("x"))
        change(suite, timeout_s=60)
        # The one thread is free again, though the server has not let go.
        np.testing.assert_array_equal(await suite.score(samples("four"), ["liked"]), [[4]])
        assert not upstream.release.is_set()


async def test_the_wait_is_bounded_whatever_hangs(serve, load, monkeypatch):
    upstream = serve("webhook")
    async with load("webhook", upstream.url, "timeout_s: 60") as suite:
        change(suite, timeout_s=0.1)
        # Looking up a name has no timeout of its own.
        monkeypatch.setattr(endpoint.Endpoint, "_send", lambda *_: upstream.release.wait(5))
        with pytest.raises(ScoringError, match=r"within 0\.1 s"):
            await suite.score(samples("x"))
        assert not upstream.release.is_set()
        upstream.release.set()


async def test_a_reply_is_bounded(serve, load, monkeypatch):
    monkeypatch.setattr(endpoint, "_MAX_REPLY_BYTES", 1000)
    upstream = serve("webhook")
    async with load("webhook", upstream.url) as suite:
        upstream.script = [(200, {}, b" " * 1001)]
        with pytest.raises(ScoringError, match="longer than 1000 bytes"):
            await suite.score(samples("x"))


@pytest.mark.parametrize("reply", [b"[[1, 1], [1, NaN]]", b"no", b"[[1, 1]]"])
async def test_a_wrong_remote_does_not_start(reply, serve, load):
    upstream = serve("webhook")
    upstream.script = [(200, {}, reply)]
    with pytest.raises(RewardModelError, match=r"'far'.*webhook at 127.*trial request failed"):
        await load("webhook", upstream.url).start()


async def test_an_absent_remote_does_not_start(load):
    url = f"http://127.0.0.1:{unused_port()}/post"
    with pytest.raises(RewardModelError, match="cannot be reached"):
        await load("webhook", url, "retries: 0").start()


async def test_a_remote_is_seen_to_be_down_and_to_be_back(serve, load, monkeypatch):
    """Nobody asks for its value in between."""
    monkeypatch.setattr("rewards.trials.FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr("rewards.trials.LONGEST_PAUSE_S", 0.001)
    monkeypatch.setattr(endpoint, "_pause", lambda _: None)
    upstream = serve("webhook")

    def held(handler, body):
        assert handler.server.release.wait(20)
        return 200, {}, good("webhook", body)

    async def until(condition):
        async with asyncio.timeout(20):
            while not condition(suite.health()["far"]):  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    async with load("webhook", upstream.url) as suite:
        upstream.script = [*[(500, {}, {})] * 6, held]  # a request, a trial, a trial that waits
        with pytest.raises(ScoringError, match="answered 500"):
            await suite.score(samples("one"))
        await until(lambda health: health["persists"])
        assert suite.health()["far"]["state"] == "failing"
        upstream.release.set()
        await until(lambda health: health["state"] == "ok" and not health["persists"])
        np.testing.assert_array_equal(await suite.score(samples("a b")), [[3, 2]])
