"""A real server in a process of its own, for benchmarks and for tests of the official clients."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import httpx


@contextmanager
def running_server(options: Sequence[str] = (), **environment: str) -> Iterator[str]:
    """Start ``palette serve`` on a free loopback port; give its address once it is ready.

    Its state is a folder of its own unless the environment names one: never that of the user.
    """
    with tempfile.TemporaryDirectory() as state, _serving(options, state, environment) as url:
        yield url


@contextmanager
def _serving(options: Sequence[str], state: str, environment: Mapping[str, str]) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "server", "serve", "--port", str(port)]
    server = subprocess.Popen(
        [*command, "--log-level", "warning", *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PALETTE_STATE_DIR": state, **environment},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                httpx.get(f"{url}/ready").raise_for_status()
                break
            except httpx.TransportError:
                if server.poll() is not None:
                    raise RuntimeError(server.stderr.read()) from None
                time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.communicate()
