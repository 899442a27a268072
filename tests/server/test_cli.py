"""The ``palette`` command: its help, and what stops each command before a model is loaded."""

from __future__ import annotations

import json

import pytest

from server.cli import app
from tests.server.commands import BAD_USAGE, DONE, FAILED, one_line, palette, refused

pytestmark = pytest.mark.usefixtures("_clean_environment")
SOLVER_COMMANDS = ("solve", "frontier", "spread", "negotiate", "interference")
COMMANDS = ("serve", "calibrate", "generate", "score", "evaluate", "bench", *SOLVER_COMMANDS)


# help


def test_help_lists_the_commands():
    told = palette("--help")
    assert told.exit_code == DONE
    assert all(f" {name} " in told.stdout for name in COMMANDS)


def test_every_command_is_tested_here():
    assert {command.callback.__name__ for command in app.registered_commands} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_has_an_example(name):
    told = palette(name, "--help")
    assert told.exit_code == DONE
    assert "Example" in told.stdout
    assert f"palette {name} " in told.stdout.split("Example")[1]


def test_no_command_shows_the_help():
    assert "Usage" in palette().output


@pytest.mark.parametrize("arguments", [["paint"], ["solve"], ["serve", "--prot", "1"], ["score"]])
def test_bad_usage(arguments):
    refused(palette(*arguments), BAD_USAGE)


# generate and calibrate, where they do not come as far as a model


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(f"Question {i}") + "\n" for i in range(20)))
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["--palette", "no JSON"]),
        ("[]", ["--palette"]),
        ('{"target": {}}', ["--palette", "target"]),
        ('{"targets": {}, "scope": "world"}', ["--palette", "scope"]),
        ("3", ["--palette"]),
    ],
)
def test_generate_bad_palette(tmp_path, prompts, text, words):
    told = palette("generate", prompts, "--out", tmp_path / "out.jsonl", "--palette", text)
    one_line(told, BAD_USAGE, *words)


@pytest.mark.parametrize("command", ["generate", "calibrate"])
@pytest.mark.parametrize("content", [None, "", "hello\n", "[]\n"])
def test_bad_prompts(tmp_path, rewards_file, command, content):
    path = tmp_path / "some.jsonl"
    if content is not None:
        path.write_text(content)
    out = tmp_path / "out"
    where = [path] if command == "generate" else ["--prompts", path]
    told = palette(command, *where, "--out", out, "--rewards", rewards_file)
    one_line(told, BAD_USAGE, str(path))
    assert not out.exists()


@pytest.mark.parametrize("command", ["generate", "calibrate"])
def test_missing_model(tmp_path, prompts, rewards_file, command):
    out, model = tmp_path / "out", tmp_path / "nowhere"
    where = [prompts] if command == "generate" else ["--prompts", prompts]
    told = palette(command, *where, "--out", out, "--rewards", rewards_file, "--model", model)
    one_line(told, FAILED, str(model))
    assert not out.exists()


@pytest.mark.parametrize("command", ["generate", "calibrate", "serve"])
@pytest.mark.parametrize(
    "options",
    [["--temperature", "3"], ["--top-p", "2"], ["--top-k", "-1"], ["--max-tokens", "0"]],
)
def test_sampling_out_of_bounds(tmp_path, prompts, command, options):
    where = {"generate": [prompts, "--out", tmp_path / "out"]}.get(command, [])
    refused(palette(command, *where, *options), BAD_USAGE, options[0])


def test_top_p_of_zero_is_refused_too(tmp_path, prompts):
    told = palette("generate", prompts, "--out", tmp_path / "out", "--top-p", "0")
    refused(told, BAD_USAGE, "top_p")


@pytest.mark.parametrize("command", COMMANDS[:2])
def test_unknown_variable(command, monkeypatch):
    monkeypatch.setenv("PALETTE_MODLE", "x")
    one_line(palette(command), BAD_USAGE, "PALETTE_MODLE")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "70000"], ["port"]),
        (["--candidates", "32", "--max-candidates", "16"], ["lower", "raise"]),
        (["--palette", "{"], ["--palette", "no JSON"]),
        (["--palette", '{"target": {}}'], ["default_palette", "target"]),
        (["--log-level", "loud"], ["log_level"]),
    ],
)
def test_serve_bad_settings(options, words):
    one_line(palette("serve", *options), BAD_USAGE, *words)
