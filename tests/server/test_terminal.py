"""Progress where standard error is no terminal: a line a minute, none in a short run; tables."""

from __future__ import annotations

import re
from itertools import accumulate, groupby, pairwise

import pytest
from rich.cells import cell_len
from rich.console import Console

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


# tables

COLUMNS = ("method", "improved", "expected", "λ of helpful", "self-BLEU", "漢字", "[b]")
ROWS = [
    ("base model", "0 % (0-39)", "-1.034 ± 0.218", "0.001", "0.123", "一二三", "[red]x[/]"),
    ("paper's λ", "100 % (61-100)", "+0.5", "12.5", "0.9", "", "y"),
]


@pytest.fixture
def shown(monkeypatch, capsys):
    def show(width, columns=COLUMNS, rows=ROWS, **options):
        console = Console(width=width, highlight=False, color_system=None)
        monkeypatch.setattr(terminal, "results", console)
        terminal.print_table(columns, rows, **options)
        return capsys.readouterr().out.splitlines()

    return show


def cells(line):
    return [cell for cell in re.split(r"\s{2,}", line.strip()) if cell]


@pytest.mark.parametrize("width", range(30, 140))
def test_a_table_is_never_cut(shown, width):
    lines = shown(width)
    assert max(map(cell_len, lines)) <= width
    pieces = [list(piece) for is_gap, piece in groupby(lines, lambda line: not line) if not is_gap]
    for piece in pieces:
        assert len(piece) == 3
        assert [cells(line)[0] for line in piece] == ["method", "base model", "paper's λ"]
    for at, wanted in enumerate((COLUMNS, *ROWS)):
        found = [cell for piece in pieces for cell in cells(piece[at])[1:]]
        assert found == [cell for cell in wanted[1:] if cell]
    # Each piece has all that fits: what would go in beside it does not.
    widths = [max(map(cell_len, column)) for column in zip(COLUMNS, *ROWS, strict=True)]
    ends = list(accumulate(len(cells(piece[0])) - 1 for piece in pieces))
    for start, end in pairwise([0, *ends[:-1]]):
        used = widths[0] + sum(2 + width for width in widths[start + 1 : end + 1])
        assert used + 2 + widths[end + 1] > width


def test_a_table_that_fits_is_in_one_piece(shown):
    lines = shown(200, title="Cost")
    assert len(lines) == 4
    width = max(map(cell_len, lines[1:]))
    assert len(shown(width)) == 3
    assert len(shown(width - 1)) == 7


def test_the_title_stands_once(shown):
    lines = shown(60, title="Cost, λ")
    assert lines[0].strip() == "Cost, λ"
    assert "".join(lines).count("Cost") == 1


@pytest.mark.parametrize("justify", ["left", "right"])
def test_columns_stand_left_or_right(shown, justify):
    head, first, second = shown(
        80, ("a", "wide heading"), [("x", "1"), ("y", "22")], justify=justify
    )
    assert head == "a  wide heading"
    wanted = ["x  1           ", "y  22          "]
    if justify == "right":
        wanted = ["x             1", "y            22"]
    assert [first, second] == wanted


def test_what_is_wider_than_the_terminal_is_folded(shown):
    long = "abcdefghij" * 6
    lines = shown(30, ("name", "value"), [(long, "12345"), ("b", long)])
    assert max(map(len, lines)) <= 30
    text = "".join(lines)
    for character in "abcdefghij":
        assert text.count(character) >= 12
    assert "…" not in text


def test_a_table_without_rows(shown):
    assert [cells(line) for line in shown(80, ("a", "b"), [])] == [["a", "b"]]
