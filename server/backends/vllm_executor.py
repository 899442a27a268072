"""Runs inside the engine's own process: it ends with the server and says why it failed.

Imported by vLLM's processes (and, for its names, when an engine is started); nothing else may.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

from typing_extensions import override
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from server.backends.vllm_process import REASON_FILE

# How long an engine without a server has to end in order.
_GRACE_S = 2.0


class _ReasonFile(logging.Handler):
    """Keeps the first exception that the engine logs, without its traceback.

    vLLM tells the server's process no more than "see root cause above".
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.ERROR)
        self._path = path

    @override
    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        # Gone when the server has ended: nobody is left to read it.
        if error is None or not self._path.exists() or self._path.stat().st_size:
            return
        lines = str(error).strip().splitlines() or [""]
        self._path.write_text(f"{type(error).__name__}: {lines[0]}"[:1000], encoding="utf-8")


def end_with_server(reason_file: Path | None) -> None:
    """End this process, and then its workers, when the one that started it is gone.

    A server that is killed cannot tell anyone; its pipe to this process closes all the same.
    """
    server = multiprocessing.parent_process()
    if server is None:
        return

    def wait() -> None:
        server.join()
        if reason_file is not None:
            reason_file.unlink(missing_ok=True)
        # Politely first: an engine that ends in order gives its shared memory back.
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_S)
        for worker in multiprocessing.active_children():
            worker.kill()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="palette-end-with-server", daemon=True).start()


def _prepare() -> None:
    path = os.environ.get(REASON_FILE)
    reason_file = Path(path) if path else None
    end_with_server(reason_file)
    # Registered first, so run last: all is torn down by then, and Python would spend seconds on
    # looking through a heap of libraries for garbage.
    atexit.register(os._exit, 0)
    # Ctrl-C in a terminal reaches every process of it: the server ends the engine when it has
    # answered what is in flight.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if reason_file is not None:
        logging.getLogger("vllm").addHandler(_ReasonFile(reason_file))


class OneProcessExecutor(UniProcExecutor):  # type: ignore[misc]  # vLLM's types are not read
    """vLLM's executor of one device, in the engine's process."""

    @override
    def _init_executor(self) -> None:
        _prepare()
        super()._init_executor()


class ManyProcessExecutor(MultiprocExecutor):  # type: ignore[misc]  # vLLM's types are not read
    """vLLM's executor of several devices, one process each."""

    @override
    def _init_executor(self) -> None:
        _prepare()
        super()._init_executor()
