"""What people see in a terminal: progress on standard error, tables on standard output."""

from __future__ import annotations

import sys
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


@contextmanager
def progress_bar(label: str) -> Iterator[Report]:
    """Give a function to report (done, total) to; a bar shows only on a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
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
