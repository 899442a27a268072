"""Runs vLLM's server until whoever started it is gone: ``python -m rewards.models.vllm_server``.

The starter holds the other end of standard input. A process that is killed cannot end its
children, but its pipes close.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

# How long an engine has to end in order; then its whole process group is killed.
GRACE_S = 10.0


def _end_with_starter() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with_starter, daemon=True).start()
    # The starter's Ctrl-C is not for us: it ends us when it has answered what is in flight.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.argv[0] = "vllm"
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
