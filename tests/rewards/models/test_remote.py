"""Remote scorers against servers on real sockets, which answer well, badly, or not at all."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from rewards import RewardConfigError, RewardModelError, Sample, ScoringError, load_rewards
from rewards.checking import check_rewards
from rewards.models import endpoint

# What an api is sent, and how its answer is read. The good answers below are the answer's length.
ENTRIES = {
    "vllm_classify": "input: {view: text}, output: {index: 1}",
    "vllm_score": "input: {view: pair}",
    "tei_predict": "input: {view: pair}, output: {label: good}",
    "openrlhf": "input: {view: text, text: '{answer}'}",
    "webhook": "output: {index: 1}",
}
SECRET = "the-secret-answer"


def good(api, body):
    """Return the reply of an api; the score is the length of the answer, mostly out of order."""
    if api == "vllm_classify":
        texts = body.get("input") or [body["messages"][-1]["content"]]
        data = [{"index": i, "label": "x", "probs": [-1, len(t)]} for i, t in enumerate(texts)]
        return {"id": "1", "data": data[::-1]}
    if api == "vllm_score":
        data = [{"index": i, "score": len(t)} for i, t in enumerate(body["text_2"])]
        return {"object": "list", "data": data[::-1]}
    if api == "tei_predict":
        rows = [[{"label": "good", "score": len(t[-1])}] for t in body["inputs"]]
        return [
            [{"label": "bad", "score": 0.5}, *row][:: -1 + 2 * (i % 2)]
            for i, row in enumerate(rows)
        ]
    if api == "openrlhf":
        return {"rewards": [len(t) for t in body["query"]], "scores": [], "extra_logs": {}}
    return {"rewards": [[-1, len(one["answer"])] for one in body["samples"]]}


class Upstream(ThreadingHTTPServer):
    """Answers well unless the script holds a (status, headers, body) or a function for its turn."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, api):
        super().__init__(("127.0.0.1", 0), Handler)
        self.api = api
        self.script = []
        self.seen = []
        self.release = threading.Event()

    def good(self, body):
        return good(self.api, body)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/post"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.seen.append((self.path, dict(self.headers), body))
        step = server.script.pop(0) if server.script else None
        if callable(step):
            step = step(self, body)
            if step is None:
                self.close_connection = True
                return
        status, headers, reply = step or (200, {}, server.good(body))
        content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def serve():
    """Return a function that starts the upstream of an api."""
    with starting() as start:
        yield start


@contextmanager
def starting(kind=Upstream):
    started = []

    def start(api):
        server = kind(api)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        started.append((server, thread))
        return server

    yield start
    for server, thread in started:
        server.release.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def load(tmp_path):
    """Return a function that loads a file with one remote and one lexical scorer."""

    def make(api, url, extra="", entry=None):
        path = tmp_path / "rewards.yaml"
        fields = [f"kind: remote, api: {api}, url: '{url}'", entry or ENTRIES[api], extra]
        path.write_text(
            f"version: 1\nscorers:\n  far: {{{', '.join(filter(None, fields))}}}\n"
            "  near: {kind: lexical, measure: words}\n"
            "values: {liked: {from: far}, words: {from: near}}\n"
        )
        return load_rewards(path)

    return make


def samples(*answers):
    dialogue = ({"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"})
    return [Sample(dialogue, answer) for answer in answers]


@pytest.mark.parametrize("api", ENTRIES)
async def test_scores_come_back_in_order(api, serve, load):
    upstream = serve(api)
    answers = ["x" * n for n in (5, 1, 9, 5, 3, 7, 2)]
    async with load(api, upstream.url, "max_batch: 2") as suite:
        n_probes = len(upstream.seen)
        scores = await suite.score(samples(*answers))
        health = suite.health()["far"]
    np.testing.assert_array_equal(scores, [[len(answer), 1] for answer in answers])
    assert len(upstream.seen) - n_probes == 3  # 6 distinct inputs, 2 at a time
    assert (health["state"], health["texts"]) == ("ok", 7)
    assert {path for path, _, _ in upstream.seen} == {"/post"}
    assert all("Authorization" not in headers for _, headers, _ in upstream.seen)


@pytest.mark.parametrize(
    ("api", "entry", "sent"),
    [
        (
            "vllm_classify",
            "input: {view: text, text: 'Q {prompt} A {answer}'}, output: {index: 1}, model: rm",
            {"use_activation": False, "model": "rm", "input": ["Q hello A yes"]},
        ),
        (
            "vllm_classify",
            "input: {view: chat, system: drop}, output: {margin: [1, 0]}, truncate: true",
            {
                "use_activation": False,
                "truncate_prompt_tokens": -1,
                "add_generation_prompt": False,
                "messages": [
                    {"role": "user", "content": "hello"},
                    {"role": "assistant", "content": "yes"},
                ],
            },
        ),
        (
            "vllm_score",
            "input: {view: pair}",
            {"use_activation": False, "text_1": ["hello"], "text_2": ["yes"]},
        ),
        (
            "tei_predict",
            "input: {view: text}, output: {label: good}",
            {"inputs": [["yes"]], "raw_scores": True, "truncate": False},
        ),
        (
            "tei_predict",
            "input: {view: pair}, output: {margin: [good, bad]}, truncate: true, model: noted",
            {"inputs": [["hello", "yes"]], "raw_scores": True, "truncate": True},
        ),
        ("openrlhf", "input: {view: text}", {"query": ["yes"]}),
        (
            "openrlhf",
            "input: {view: pair, a: 'Q {prompt} ', b: 'A {answer}'}",
            {"query": ["Q hello A yes"], "prompts": ["Q hello "]},
        ),
        (
            "webhook",
            "input: {view: chat, system: drop}, output: {index: 1}",
            {"samples": [{"messages": [{"role": "user", "content": "hello"}], "answer": "yes"}]},
        ),
    ],
)
async def test_what_is_sent(api, entry, sent, serve, load):
    upstream = serve(api)
    async with load(api, upstream.url, entry=entry) as suite:
        await suite.score(samples("yes"))
    assert upstream.seen[-1][2] == sent


@pytest.mark.parametrize("reply", [[3, 4.5], [[3], [4.5]], {"rewards": [3, 4.5]}])
async def test_replies_of_a_webhook(reply, serve, load):
    upstream = serve("webhook")
    upstream.script = [(200, {}, reply)] * 2
    async with load("webhook", upstream.url, entry="output: {sign: -1}") as suite:
        scores = await suite.score(samples("one", "two"), ["liked"])
    np.testing.assert_array_equal(scores, [[-3.0], [-4.5]])


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("{margin: [1, 0]}", 3.0),
        ("{margin: [0, 1]}", -3.0),
        ("{index: 1, sign: -1}", -2.0),
        ("{index: 1, activation: softmax}", 1 / (1 + np.exp(-3.0))),
        ("{margin: [1, 0], activation: sigmoid}", 1 / (1 + np.exp(-3.0))),
        ("{margin: [1, 0], activation: log_sigmoid}", -np.log1p(np.exp(-3.0))),
        ("{index: 1, activation: log_odds}", 3.0),
    ],
)
async def test_how_numbers_are_read(output, expected, serve, load):
    upstream = serve("webhook")
    async with load("webhook", upstream.url, entry=f"output: {output}") as suite:
        scores = await suite.score(samples("ab"), ["liked"])
    np.testing.assert_allclose(scores, [[expected]], rtol=1e-12)


async def test_numbers_for_labels(serve, load):
    upstream = serve("tei_predict")
    entry = "input: {view: pair}, output: {expect: {good: 2, bad: -1}}"
    async with load("tei_predict", upstream.url, entry=entry) as suite:
        scores = await suite.score(samples("ab"), ["liked"])
    good_share = 1 / (1 + np.exp(0.5 - 2))
    np.testing.assert_allclose(scores, [[2 * good_share - (1 - good_share)]], rtol=1e-12)
    with pytest.raises(RewardModelError, match="a number for each label; it gives the labels"):
        await load(
            "tei_predict", upstream.url,
            entry="input: {view: pair}, output: {expect: {good: 2, best: 1}}",
        ).start()  # fmt: skip


async def test_one_request_feeds_several_values(serve, tmp_path):
    upstream = serve("webhook")
    path = tmp_path / "rewards.yaml"
    path.write_text(
        "version: 1\n"
        f"scorers: {{rm: {{kind: remote, api: webhook, url: '{upstream.url}',\n"
        "  outputs: {long: {index: 1}, gap: {margin: [0, 1]}}}}\n"
        "values: {long: {from: rm.long}, gap: {from: rm.gap}}\n"
    )
    async with load_rewards(path) as suite:
        n_trials = len(upstream.seen)
        scores = await suite.score(samples("ab", "abcd"))
    np.testing.assert_array_equal(scores, [[2, -3], [4, -5]])
    assert len(upstream.seen) == n_trials + 1


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


TEI_UNEQUAL = [[{"label": "good", "score": 1}], [{"label": "bad", "score": 1}]]


@pytest.mark.parametrize(
    ("api", "reply", "problem"),
    [
        ("vllm_classify", {"data": [{"index": 0, "probs": [0, 1]}]}, "of 1 samples for 2"),
        ("vllm_classify", {"data": [{"index": 1, "probs": [0, 1]}] * 2}, "indices"),
        ("vllm_classify", {"data": [{"index": i, "probs": [1]} for i in (0, 1)]}, "1 numbers per"),
        ("vllm_classify", {"data": [{"index": i, "probs": [0, np.nan]} for i in (0, 1)]}, "nan"),
        ("vllm_classify", {"data": [{"index": i, "score": 1} for i in (0, 1)]}, "not that"),
        ("vllm_score", {"data": [{"index": 0, "score": 1}]}, "of 1 samples for 2"),
        ("vllm_score", b'{"data": [{"index": 0, "score": NaN}, {"index": 1, "score": 1}]}', "nan"),
        ("vllm_score", {"data": [{"index": i, "score": None} for i in (0, 1)]}, "not that"),
        ("tei_predict", [[{"label": "good", "score": 1}]], "of 1 samples for 2"),
        ("tei_predict", TEI_UNEQUAL, "same labels"),
        ("tei_predict", [[{"label": "bad", "score": 1}]] * 2, "it gives the labels bad"),
        ("tei_predict", [[], []], "no numbers"),
        ("tei_predict", [[{"label": "good", "score": -np.inf}]] * 2, "gave -inf"),
        ("openrlhf", {"rewards": [1, 2, 3]}, "of 3 samples for 2"),
        ("openrlhf", b'{"rewards": [1, NaN]}', "gave nan"),
        ("openrlhf", {"rewards": [[1, 2], [3, 4]]}, "2 numbers per sample and none is chosen"),
        ("openrlhf", {"scores": [1, 2]}, "not that of openrlhf"),
        ("webhook", {"rewards": [[1, 2], [3]]}, "not equally many"),
        ("webhook", [[1, 2]], "of 1 samples for 2"),
        ("webhook", b"[[1, 2], [1, 1e999]]", "gave inf"),
        ("webhook", [["1", "2"], ["3", "4"]], "not that of webhook"),
        ("webhook", [[True, False], [True, False]], "not that of webhook"),
        ("webhook", b"[" * 5000, "not JSON"),
    ],
)  # fmt: skip
async def test_wrong_replies(api, reply, problem, serve, load):
    upstream = serve(api)
    async with load(api, upstream.url) as suite:
        upstream.script = [(200, {}, reply)]
        with pytest.raises(ScoringError, match=rf"'far' \(feeds liked\).*127.0.0.1.*{problem}"):
            await suite.score(samples("one", "other"))


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


def change(suite, **fields):
    """Change where a remote that runs posts to, and how long it waits.

    So a timeout can be short where it is to be met, and what works has a busy machine's time.
    """
    for name, value in fields.items():
        setattr(suite._scorers["far"]._endpoint, name, value)


def unused_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def trickle(handler, _):
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    while not handler.server.release.wait(0.02):
        handler.wfile.write(b" ")


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


async def test_the_fingerprint(serve, load):
    upstream, other = serve("webhook"), serve("webhook")
    prints = []
    for url, extra in (
        (upstream.url, ""),
        (upstream.url, "timeout_s: 5, retries: 1, max_batch: 3, max_concurrent: 2"),
        (upstream.url, "model: b"),
        (upstream.url, "input: {view: chat, system: drop}"),
        (other.url, ""),
    ):
        async with load("webhook", url, extra) as suite:
            prints.append(suite.fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


@pytest.mark.parametrize(
    ("api", "url", "entry", "problem"),
    [
        ("webhook", "ftp://h/x", None, "must be http"),
        ("webhook", "http:///x", None, "must be http"),
        ("webhook", "http://h:99999/x", None, "must be http"),
        ("webhook", "http://me:pw@h/x", None, "see token_file"),
        ("webhook", "http://me@h/x", None, "see token_file"),
        ("webhook", "http://h:80/", None, "lacks its path"),
        ("vllm_score", "http://h/x", "input: {view: text}", "needs an input with the view pair"),
        ("vllm_classify", "http://h/x", "output: {index: 0}", "view text or chat"),
        ("tei_predict", "http://h/x", "input: {view: text}, output: {index: 0}", "label or margin"),
        ("webhook", "http://h/x", "output: {label: good}", "index or margin"),
        ("webhook", "http://h/x", "output: {margin: [a, b]}", "takes two positions"),
        ("webhook", "http://h/x", "output: {margin: [0, -1]}", "count from 0"),
        ("webhook", "http://h/x", "truncate: true", "leave truncate out"),
        ("vllm_score", "http://h/x", "input: {view: pair}, output: {index: 0}", "gives one number"),
        ("webhook", "http://h/x", "outputs: {a: {index: 0}, b: {label: x}}", "index or margin"),
        ("webhook", "http://h/x", "output: {attribute: score}", "cannot be read by attribute"),
        ("webhook", "http://h/x", "output: {expect: {a: 1, b: 2}}", "cannot be read by expect"),
        ("webhook", "http://h/x", "input: {view: chat, question: a}", "models in this process"),
    ],
)  # fmt: skip
def test_wrong_entries(api, url, entry, problem, load):
    with pytest.raises(RewardConfigError, match=rf"yaml:3: .*{problem}"):
        load(api, url, entry=entry)


@pytest.mark.parametrize(("low", "high", "warns"), [(0.0, 1.0, True), (-3.0, 4.0, False)])
def test_numbers_that_look_squeezed(low, high, warns, serve, tmp_path):
    upstream = serve("webhook")

    def reply(_, body):
        numbers = np.linspace(low, high, len(body["samples"])).tolist()
        return 200, {}, {"rewards": numbers}

    upstream.script = [reply] * 100
    path = tmp_path / "rewards.yaml"
    path.write_text(
        "version: 1\n"
        f"scorers: {{rm: {{kind: remote, api: webhook, url: '{upstream.url}'}}}}\n"
        "values: {good: {from: rm}}\n"
    )
    report = check_rewards(path)
    assert report.is_sound
    (scorer,) = report.scorers
    assert [("sigmoid or softmax" in warning) for warning in scorer.warnings] == [True] * warns


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
