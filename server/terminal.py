"""What people see in a terminal: progress on standard error, tables on standard output."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from server.calibrator import Progress as Report

errors = Console(stderr=True, highlight=False)
results = Console(highlight=False)

LINE_EVERY_S = 60.0
# Spaces between the columns of a table.
_GAP = 2


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str | None = None,
    justify: Literal["left", "right"] = "right",
) -> None:
    """Print a table; one that is wider than the terminal in pieces, each with the first column.

    Parameters
    ----------
    columns : sequence of str
        Headings.
    rows : sequence of sequence of str
        A cell for each heading.
    title : str, optional
    justify : {"left", "right"}
        Of all columns but the first.
    """
    widths = [
        max(cell_len(cell) for cell in cells)
        for cells in zip(columns, *rows, strict=True)  # column by column
    ]
    for number, piece in enumerate(_pieces(widths, results.width)):
        table = Table(box=None, pad_edge=False, title=None if number else title)
        table.title_justify, table.title_style = "left", "italic"
        if number:
            results.print()
        for at in piece:
            # Folded only where it is wider than the terminal itself.
            table.add_column(
                Text(columns[at]), justify=justify if at else "left", overflow="fold",
                min_width=min(widths[at], (results.width - _GAP) // 2),
            )  # fmt: skip
        for row in rows:
            table.add_row(*(Text(row[at]) for at in piece))
        results.print(table)


def _pieces(widths: Sequence[int], limit: int) -> list[list[int]]:
    """Return which columns stand beside each other: the first with as many others as fit."""
    pieces = [[0]]
    used = widths[0]
    for at, width in enumerate(widths[1:], start=1):
        if used + _GAP + width > limit and len(pieces[-1]) > 1:
            pieces.append([0])
            used = widths[0]
        pieces[-1].append(at)
        used += _GAP + width
    return pieces


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
