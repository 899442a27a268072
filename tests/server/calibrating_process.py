"""Processes that calibrate the fake backend, to be killed: forked from one that has imported all.

Run as ``python -m tests.server.calibrating_process``. Each line on standard input is a job, as
`calibrate_in_child` has it; the answer is how the child ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

from rewards import Message
from server.backends.base import SamplingSettings
from server.calibrating import make_calibration
from server.journal import Journal
from tests.server.fakes import FakeBackend, lexical_rewards

N_PROMPTS, N_CANDIDATES = 40, 8
PROMPTS = [(Message(role="user", content=f"Question {i}"),) for i in range(N_PROMPTS)]


class Slow(FakeBackend):
    """Takes a while for each prompt, as models do."""

    async def generate(self, prompt, *arguments, **options):
        await asyncio.sleep(0.004)
        async for candidate in super().generate(prompt, *arguments, **options):
            yield candidate


async def make(state_dir, seed, backend=None):
    """Return the calibration of a seed; the work of both the processes and the reference."""
    backend = backend or Slow()
    await backend.start()
    with tempfile.TemporaryDirectory() as folder:
        rewards = lexical_rewards(Path(folder))
    async with rewards:
        made, _ = await make_calibration(
            backend, rewards, PROMPTS, state_dir=state_dir, n_candidates=N_CANDIDATES,
            sampling=SamplingSettings(), seed=seed, prompts_source="test", concurrency=3,
        )  # fmt: skip
    return made


def die_at(n_calls):
    """Kill this process at its n-th call of what changes names or makes bytes durable."""
    left = n_calls

    def lethal(call):
        def counted(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counted

    for name in ("fsync", "replace", "unlink", "mkdir", "ftruncate"):
        setattr(os, name, lethal(getattr(os, name)))


def die_after(n_prompts, seconds):
    """Kill this process some time after it has written its n-th prompt."""
    append, left = Journal.append, n_prompts
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))

    def counted(*arguments):
        nonlocal left
        append(*arguments)
        left -= 1
        if left == 0:
            timer.start()

    Journal.append = counted
    if n_prompts == 0:
        timer.start()


def main():
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            if job["die_at"] is not None:
                die_at(job["die_at"])
            if job["killed_after"] is not None:
                die_after(job["killed_after"], job["then_s"])
            asyncio.run(make(Path(job["state_dir"]), job["seed"]))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


class Nursery:
    """Starts such processes, one after another."""

    def __init__(self, process):
        self._process = process

    def calibrate_in_child(self, state_dir, seed, *, killed_after=None, then_s=0.0, die_at=None):
        """Return the child's exit code: 0, or -9 when it was killed before it was done.

        `killed_after` counts prompts; `die_at` calls that make it durable.
        """
        job = {"state_dir": str(state_dir), "seed": seed}
        job |= {"killed_after": killed_after, "then_s": then_s, "die_at": die_at}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@contextmanager
def nursery():
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    try:
        yield Nursery(process)
    finally:
        process.stdin.close()
        process.wait(timeout=60)
        process.stdout.close()


if __name__ == "__main__":
    main()
