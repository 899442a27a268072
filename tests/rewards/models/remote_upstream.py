"""A server that scores, in the words of each api, and does what a test tells it to."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from rewards import Sample

SECRET = "the-secret-answer"

# What an api is sent, and how its answer is read. The good answers below are the answer's length.
ENTRIES = {
    "vllm_classify": "input: {view: text}, output: {index: 1}",
    "vllm_score": "input: {view: pair}",
    "tei_predict": "input: {view: pair}, output: {label: good}",
    "openrlhf": "input: {view: text, text: '{answer}'}",
    "webhook": "output: {index: 1}",
}


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


@contextmanager
def starting(kind=Upstream):
    """Give a function that starts the upstream of an api; all are ended with the context."""
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


def samples(*answers):
    dialogue = ({"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"})
    return [Sample(dialogue, answer) for answer in answers]


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
