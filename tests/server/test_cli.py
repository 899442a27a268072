"""The ``palette`` command: what it prints, what it answers to a mistake, and its exit codes."""

from __future__ import annotations

import io
import json
import math
import os

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from server.cli import app
from server.settings import PREFIX
from tests.server.conftest import fake_calibration
from tests.server.fakes import LEXICAL_REWARDS

DONE, FAILED, BAD_USAGE, INFEASIBLE = 0, 1, 2, 3
SOLVER_COMMANDS = ("solve", "frontier", "spread", "negotiate", "interference")
COMMANDS = ("serve", "calibrate", "generate", "score", "evaluate", "bench", *SOLVER_COMMANDS)
FIELDS = {
    "status", "values", "targets", "multipliers", "expected", "stderr", "base", "ess", "kl",
    "candidates", "min_candidates", "certificate", "repaired", "kkt_residual", "solve_ms",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PALETTE_STATE_DIR", str(tmp_path / "state"))


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


# solve


@pytest.fixture
def lines(tmp_path):
    """Return a JSONL pilot of 60 prompts x 12 answers and its rewards."""
    rewards = np.random.default_rng(0).normal(size=(60, 12, 2)) * [1, 5] + [0, 40]
    path = tmp_path / "pilot.jsonl"
    with path.open("w") as file:
        for i, prompt in enumerate(rewards):
            columns = {"kind": prompt[:, 0].tolist(), "words": prompt[:, 1].tolist()}
            file.write(json.dumps({"prompt": f"p{i}", "rewards": columns}) + "\n")
    return path


@pytest.fixture
def flat(tmp_path):
    rewards = np.random.default_rng(1).normal(size=(400, 2))
    path = tmp_path / "flat.json"
    path.write_text(json.dumps([{"kind": k, "funny": f, "text": "x"} for k, f in rewards.tolist()]))
    return path


def solve(pilot, targets, *options):
    return palette("solve", "--pilot", pilot, "--targets", json.dumps(targets), *options)


def solved(pilot, targets, *options):
    result = solve(pilot, targets, *options, "--json")
    assert result.exit_code == DONE, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)


def test_solve_jsonl(lines):
    found = solved(lines, {"kind": {"gain": 0.5}, "words": "keep"}, "--candidates", 8)
    assert set(found) >= FIELDS
    assert found["status"] == "optimal"
    assert found["values"] == ["kind", "words"]
    for name in ("multipliers", "expected", "stderr", "base"):
        assert set(found[name]) == {"kind", "words"}
    assert found["expected"]["kind"] == pytest.approx(found["targets"]["kind"], abs=1e-6)
    assert found["expected"]["words"] >= found["base"]["words"] - 1e-6
    assert found["candidates"] == 8
    assert 1 <= found["min_candidates"] <= 8
    assert found["certificate"] is None
    assert found["repaired"] is None
    assert found["kkt_residual"] <= 1e-8
    assert 1 < found["ess"] <= 8
    assert found["kl"] > 0
    assert found["solve_ms"] > 0
    assert not found["pooled"]


def test_solve_prints_one_json_object(lines):
    assert solve(lines, {"kind": "keep"}, "--candidates", 8, "--json").stdout.count("\n") == 1


def test_solve_for_people(lines):
    told = solve(lines, {"kind": {"gain": 0.5}}, "--candidates", 8)
    assert told.exit_code == DONE
    for word in ("kind", "words", "multiplier", "expected", "optimal", "ESS", "smallest N"):
        assert word in told.stdout


def test_solve_flat_list_is_pooled(flat):
    found = solved(flat, {"kind": {"at_least": 0.4}, "funny": "keep"})
    assert set(found) >= FIELDS
    assert found["pooled"] is True
    assert found["values"] == ["kind", "funny"]
    assert found["expected"]["kind"] == pytest.approx(0.4, abs=1e-6)


def test_solve_calibration(tmp_path):
    path = tmp_path / "calibration.npz"
    fake_calibration().save(path)
    found = solved(path, {"words": {"at_most": 8}})
    assert found["targets"] == {"words": 8.0}
    assert found["multipliers"]["words"] < 0
    assert found["candidates"] == 16


def test_solve_gives_the_logit(tmp_path):
    """Half of the answers have 1, half 0: to get 0.8 of them, N → ∞, takes log 4."""
    path = tmp_path / "coin.jsonl"
    path.write_text(json.dumps({"prompt": "p", "rewards": {"head": [0.0, 1.0] * 4}}) + "\n")
    found = solved(path, {"head": {"at_least": 0.8}}, "--candidates", "inf")
    assert found["multipliers"]["head"] == pytest.approx(math.log(4))
    assert found["candidates"] == "inf"


def test_solve_auto_takes_what_it_needs(lines):
    targets = {"kind": {"gain": 1.0}}
    found = solved(lines, targets, "--candidates", "auto")
    assert found["status"] == "optimal"
    assert found["min_candidates"] <= found["candidates"] <= 2 * found["min_candidates"]
    fewer = solve(lines, targets, "--candidates", found["min_candidates"] - 1)
    assert fewer.exit_code == INFEASIBLE


def test_solve_is_reproducible_and_seeds_differ(lines):
    options = ("--candidates", 4, "--groups", 100, "--seed")
    found = [solved(lines, {"kind": {"gain": 0.4}}, *options, seed) for seed in (1, 1, 2)]
    assert found[0]["multipliers"] == found[1]["multipliers"] != found[2]["multipliers"]


def test_solve_max_kl(lines):
    found = solved(lines, {"kind": {"gain": 1.0}}, "--candidates", 8, "--max-kl", 0.1)
    assert found["kl"] <= 0.1 + 1e-6
    assert found["limited_by"] == "max_kl"


def test_solve_infeasible(lines):
    told = solve(lines, {"kind": {"at_least": 9}}, "--candidates", 8, "--json")
    assert told.exit_code == INFEASIBLE
    found = json.loads(told.stdout)
    assert set(found) >= FIELDS
    assert found["status"] == "infeasible"
    assert found["certificate"]["asked"] > found["certificate"]["limit"]
    assert found["min_candidates"] is None


def test_solve_infeasible_for_people(lines):
    told = solve(lines, {"kind": {"at_least": 9}}, "--candidates", 8)
    assert told.exit_code == INFEASIBLE
    assert "infeasible" in told.stdout
    assert "no choice among 8 candidates" in told.stdout


@pytest.mark.parametrize("candidates", ["auto", "inf"])
def test_solve_infeasible_at_any_number(lines, candidates):
    told = solve(lines, {"kind": {"at_least": 9}}, "--candidates", candidates, "--json")
    assert told.exit_code == INFEASIBLE
    assert json.loads(told.stdout)["status"] == "infeasible"


@pytest.mark.parametrize("method", ["interpolate", "greedy", "nearest"])
def test_solve_repairs(lines, method):
    found = solved(
        lines, {"kind": {"at_least": 9}, "words": "keep"}, "--candidates", 8,
        "--on-infeasible", "repair", "--method", method,
    )  # fmt: skip
    assert found["status"] == "repaired"
    assert set(found) >= FIELDS
    assert found["repaired"]["method"] == method
    assert found["targets"]["kind"] < 9
    assert found["expected"]["kind"] == pytest.approx(found["targets"]["kind"], abs=1e-4)
    assert found["certificate"]


def test_solve_best_effort(lines):
    options = ("--candidates", 8, "--on-infeasible", "best_effort")
    found = solved(lines, {"kind": {"at_least": 9}}, *options)
    assert found["status"] == "best_effort"
    assert found["repaired"]["method"] == "nearest"


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ({"kidn": "keep"}, ["kidn", "kind, words"]),
        ({"kind": {"quantile": 2}}, ["targets.kind.quantile"]),
        ({"kind": 3}, ["targets.kind"]),
        ([], ["targets"]),
        (3, ["targets"]),
        (None, ["targets"]),
        ({"kind": {"at_least": float("nan")}}, ["targets.kind.at_least"]),
    ],
)
def test_solve_bad_targets(lines, targets, words):
    one_line(solve(lines, targets, "--candidates", 8), BAD_USAGE, *words)


@pytest.mark.parametrize("text", ["", "{", "kind=3", "{'kind': 'keep'}"])
def test_solve_targets_that_are_no_json(lines, text):
    told = palette("solve", "--pilot", lines, "--targets", text)
    one_line(told, BAD_USAGE, "--targets", "quote it for the shell")


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "", "²", "13", "1e3", "99999999999999"])
def test_solve_bad_candidates(lines, text):
    told = solve(lines, {"kind": "keep"}, f"--candidates={text}")
    one_line(told, BAD_USAGE, "candidates")


@pytest.mark.parametrize(
    "options",
    [["--max-kl", "0"], ["--max-kl", "nan"], ["--groups", "0"], ["--seed", "-1"],
     ["--on-infeasible", "cry"], ["--method", "luck"]],
)  # fmt: skip
def test_solve_bad_options(lines, options):
    refused(solve(lines, {"kind": "keep"}, "--candidates", 8, *options), BAD_USAGE, options[0][2:5])


@pytest.mark.parametrize(
    "content",
    [b"", b"hello\n", b"{\n", b"[]", b'{"prompt": "a"}\n', b"PK\x03\x04cut", b"\xff\xfe\x00",
     b'{"prompt": "a", "rewards": {"kind": [1, 2]}}\n{"prompt": "b", "rewards": {"kind": [1]}}\n'],
)  # fmt: skip
def test_solve_bad_pilot(tmp_path, content):
    path = tmp_path / "pilot"
    path.write_bytes(content)
    one_line(solve(path, {"kind": "keep"}), BAD_USAGE, str(path))


@pytest.mark.parametrize("name", ["none.jsonl", "."])
def test_solve_missing_pilot(tmp_path, name):
    one_line(solve(tmp_path / name, {"kind": "keep"}), BAD_USAGE, str(tmp_path / name))


# score


@pytest.fixture
def rewards_file(tmp_path):
    path = tmp_path / "rewards.yaml"
    path.write_text(LEXICAL_REWARDS)
    return path


ANSWERS = (
    '{"prompt": "Hi", "answer": "one two three"}\n\n'
    '{"messages": [{"role": "user", "content": "Hi"}], "answer": "one one"}\n'
)
SCORES = [{"words": 3.0, "variety": 1.0}, {"words": 2.0, "variety": 0.5}]


def test_score_file_to_stdout(tmp_path, rewards_file):
    path = tmp_path / "answers.jsonl"
    path.write_text(ANSWERS)
    told = palette("score", path, "--rewards", rewards_file)
    assert told.exit_code == DONE
    assert [json.loads(line)["rewards"] for line in told.stdout.splitlines()] == SCORES


def test_score_stdin_to_file(tmp_path, rewards_file):
    out = tmp_path / "scores.jsonl"
    told = palette("score", "-", "--rewards", rewards_file, "--out", out, stdin=ANSWERS)
    assert told.exit_code == DONE
    assert told.stdout == ""
    assert [json.loads(line)["rewards"] for line in out.read_text().splitlines()] == SCORES


def test_score_of_nothing_is_nothing(rewards_file):
    told = palette("score", "-", "--rewards", rewards_file, stdin="")
    assert (told.exit_code, told.stdout) == (DONE, "")


@pytest.mark.parametrize(
    "line",
    ["hello", "[]", '{"prompt": "Hi"}', '{"answer": "a"}', '{"prompt": "Hi", "answer": 3}',
     '{"messages": [], "answer": "a"}', "null", "[" * 100_000],
)  # fmt: skip
def test_score_bad_line(tmp_path, rewards_file, line):
    path = tmp_path / "answers.jsonl"
    path.write_text(ANSWERS + line + "\n")
    out = tmp_path / "scores.jsonl"
    told = palette("score", path, "--rewards", rewards_file, "--out", out)
    one_line(told, BAD_USAGE, f"{path}, line 4: ", '"answer": "..."')
    assert not out.exists()


def test_score_missing_file(tmp_path, rewards_file):
    path = tmp_path / "none.jsonl"
    one_line(palette("score", path, "--rewards", rewards_file), BAD_USAGE, str(path))


def test_score_output_that_cannot_be_written(tmp_path, rewards_file):
    out = tmp_path / "none" / "scores.jsonl"
    told = palette("score", "-", "--rewards", rewards_file, "--out", out, stdin=ANSWERS)
    one_line(told, FAILED, str(out))


@pytest.mark.parametrize("content", ["", "[", "version: 1\nscorers: {}\nvalues: {}\n", "x: 1\n"])
def test_score_bad_rewards(tmp_path, content):
    path = tmp_path / "values.yaml"
    path.write_text(content)
    refused(palette("score", "-", "--rewards", path, stdin=ANSWERS), FAILED, str(path))


def test_score_missing_reward_model(tmp_path):
    path = tmp_path / "values.yaml"
    content = yaml.safe_load(LEXICAL_REWARDS)
    model = str(tmp_path / "nowhere")
    view = {"view": "text", "text": "{answer}"}
    content["scorers"]["kind"] = {"kind": "sequence_classifier", "model": model, "input": view}
    content["values"]["kind"] = {"from": "kind"}
    path.write_text(yaml.safe_dump(content))
    one_line(palette("score", "-", "--rewards", path, stdin=ANSWERS), FAILED, model)


def test_score_reads_stdin_as_utf8(rewards_file, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    told = palette("score", "-", "--rewards", rewards_file, stdin='{"prompt": "é", "answer": "où"}')
    assert json.loads(told.stdout)["rewards"]["words"] == 1


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
