"""Processes that follow live traffic as fast as they can, to be killed while they write.

Run as ``python -m tests.server.live.refreshing_process``. Each line on standard input is a job, as
`Refreshers.work` has it. A forked child writes the number of every version that is on the disk,
and ``watched N`` once the watch has made known what it found in N requests; the last line of a job
says how the child ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from server.calibration import load_calibration
from server.live import track as live
from server.live.intake import Arrival
from server.schemas import PaletteOptions
from solver import SolutionCache
from tests.server.calibrating_process import die_at

HALF_LIFE = 50


def follow(root_file, folder, seed, on_saved, most):
    """Take arrivals, make a version of every few, write each; return after so many of them."""
    live.SAVE_EVERY_S = live.NEW_SHARE = 0.0
    live.LEAST_NEW = 3
    root = load_calibration(root_file)
    path = folder / f"{root.id}.npz"
    one = live.Track(root, "on", HALF_LIFE, path, SolutionCache())
    rng = np.random.default_rng(seed)
    rewards = root.pilot.rewards
    on_saved(None)
    for number in range(3 * most):
        messages = ({"role": "user", "content": f"prompt {number}"},)
        plan = SimpleNamespace(
            prompt=SimpleNamespace(messages=messages, token_ids=()),
            request=SimpleNamespace(palette=PaletteOptions()),
        )
        width = int(rng.integers(8, 33))  # so that versions differ in form
        drawn = rng.permutation(rewards[rng.integers(len(rewards))])[:width]
        one.take(Arrival(plan, one.calibration, None, drawn), None)
        if number % 2:
            one.tell()
            told = int(one.monitor.state()["n_steps"])
            os.write(sys.stdout.fileno(), f"watched {told}\n".encode())
        if one.is_due:
            one.refresh()
            on_saved(one.calibration.version)


def acknowledging(job):
    """Return what tells of each version, and kills this process a while after some of them."""
    left = job["killed_after"]
    timer = threading.Timer(job["then_s"], os.kill, (os.getpid(), signal.SIGKILL))

    def tell(version):
        nonlocal left
        if version is not None:
            os.write(sys.stdout.fileno(), f"{version}\n".encode())
            left = None if left is None else left - 1
        elif job["die_at"] is not None:
            die_at(job["die_at"])
        if left == 0:
            timer.start()

    return tell


def main():
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            follow(
                Path(job["root"]), Path(job["folder"]), job["seed"], acknowledging(job), job["most"]
            )
            os._exit(0)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"ended {os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


class Refreshers:
    """Starts such processes, one after another."""

    def __init__(self, process):
        self._process = process
        self.watched = None

    def work(self, root, folder, seed, *, killed_after=None, then_s=0.0, die_at=None, most=1000):
        """Return the child's exit code, -9 when it was killed, and the versions it told of.

        `watched` is what its watch told of last, None when nothing.

        `killed_after` counts versions, `die_at` calls that make one durable, and `most` versions
        after which it ends by itself.
        """
        job = {"root": str(root), "folder": str(folder), "seed": seed, "most": most}
        job |= {"killed_after": killed_after, "then_s": then_s, "die_at": die_at}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        told, self.watched = [], None
        while not (line := self._process.stdout.readline()).startswith("ended"):
            if line.startswith("watched"):
                self.watched = int(line.split()[1])
            else:
                told.append(int(line))
        return int(line.split()[1]), told


@contextmanager
def refreshers():
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    try:
        yield Refreshers(process)
    finally:
        process.stdin.close()
        process.wait(timeout=60)
        process.stdout.close()


if __name__ == "__main__":
    main()
