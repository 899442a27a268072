"""The official Node client: its tests are JavaScript's own, in js/; here are the servers.

`npm ci --prefix tests/clients/js` installs it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from server import embedded
from tests.clients.servers import KEY, MODEL, QUESTION, ObedientBackend

HERE = Path(__file__).parent / "js"
pytestmark = pytest.mark.skipif(
    shutil.which("node") is None or not (HERE / "node_modules" / "openai").is_dir(),
    reason="node, or its openai package (npm ci --prefix tests/clients/js), is not installed",
)


@pytest.fixture
def busy(serve):
    """A server with a full queue."""
    served = serve(ObedientBackend(hold=True), max_running=1, max_queue=0)
    with (
        openai.OpenAI(base_url=served.base_url, api_key=KEY) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(client.chat.completions.create, model=MODEL, messages=QUESTION)
        served.until(lambda: served.backend.n_started == 1)
        yield served
        served.inside(served.backend.released.set)
        assert first.result(20).choices


def test_all(real_url, able, busy, serve):
    stopping = serve()
    stopping.inside(lambda: stopping.running.context.drain.begin(30))
    slow = serve(ObedientBackend(hold=True), request_timeout_s=0.2)
    done = subprocess.run(
        ["node", "--test", "--test-reporter=spec", "openai.test.mjs"],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={
            **os.environ, "KEY": KEY,
            "REAL_URL": real_url, "REAL_MODEL": embedded.CHAT_MODEL_NAME,
            "ABLE_URL": able.base_url, "ABLE_MODEL": MODEL,
            "BUSY_URL": busy.base_url, "STOPPING_URL": stopping.base_url,
            "SLOW_URL": slow.base_url,
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
