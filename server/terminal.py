"""What people see in a terminal: progress on standard error, tables on standard output."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from server.calibrator import Progress as Report

errors = Console(stderr=True, highlight=False)
results = Console(highlight=False)

LINE_EVERY_S = 60.0


@contextmanager
def progress_bar(label: str) -> Iterator[Report]:
    """Give a function to report (done, total) to: a bar on a terminal, else a line a minute."""
    if not sys.stderr.isatty():
        yield _Lines(label)
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),  # so that all of it fits in 80 columns
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=errors,
    )
    # Not started before the first report, so that a server that never calibrates shows no bar.
    task = bar.add_task(label, total=None, visible=False)

    def report(done: int, total: int) -> None:
        if not bar.live.is_started:
            bar.start()
        bar.update(task, completed=done, total=total, visible=True)
        if done >= total:
            bar.stop()

    try:
        yield report
    finally:
        if bar.live.is_started:
            bar.stop()


class _Lines:
    """Progress for logs: a line a minute, with the time left at the pace so far."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._start: tuple[float, int] | None = None
        self._told = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._start is None:  # what was done before is not of this run's pace
            self._start, self._told = (now, done), now
        began, before = self._start
        if now - self._told < LINE_EVERY_S or done == before:
            return
        self._told = now
        left = (total - done) * (now - began) / (done - before)
        errors.print(
            f"{self._label}: {done} of {total}, about {math.ceil(left / 60)} min left",
            markup=False,
            soft_wrap=True,
        )
