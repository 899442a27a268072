"""The ``palette`` command run by tests: what it prints, and with which exit status."""

from __future__ import annotations

from typer.testing import CliRunner

from server.cli import app

DONE, FAILED, BAD_USAGE, INFEASIBLE = 0, 1, 2, 3


def palette(*arguments, stdin=None):
    """Run the command in this process; whatever it raises is a bug, not an exit code."""
    result = CliRunner().invoke(
        app, [str(part) for part in arguments], input=stdin, env={"COLUMNS": "300"}
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(result, code, *words):
    """Check that a mistake gets its exit code and one line on standard error that helps."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def one_line(result, code, *words):
    line = refused(result, code, *words)
    assert line.startswith("palette: ")
    assert line.count("\n") == 1
