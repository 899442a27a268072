"""``palette score``: answers in, rewards out, a line each."""

from __future__ import annotations

import io
import json

import pytest
import yaml

from tests.server.commands import BAD_USAGE, DONE, FAILED, one_line, palette, refused
from tests.server.fakes import LEXICAL_REWARDS

pytestmark = pytest.mark.usefixtures("_clean_environment")

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
