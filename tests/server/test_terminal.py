"""Progress where standard error is no terminal: a line a minute, and none in a short run."""

from __future__ import annotations

import pytest

from server import terminal


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def test_a_line_a_minute_with_the_time_left(clock, capsys):
    with terminal.progress_bar("calibrating") as report:
        report(100, 400)  # done before: no part of this run's pace
        for done in range(101, 401):
            clock[0] += 2.0
            report(done, 400)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"calibrating: {100 + 30 * minute} of 400, about {10 - minute} min left"
        for minute in range(1, 11)
    ]


def test_short_runs_say_nothing(clock, capsys):
    with terminal.progress_bar("calibrating") as report:
        for done in range(1, 30):
            clock[0] += 2.0
            report(done, 30)
    assert capsys.readouterr().err == ""


def test_nothing_done_in_a_minute_is_no_pace(clock, capsys):
    with terminal.progress_bar("calibrating") as report:
        report(100, 400)
        clock[0] += 70
        report(100, 400)
    assert capsys.readouterr().err == ""
