"""``palette rewards check``: what it prints and its exit codes."""

from __future__ import annotations

import json

import pytest

from server.embedded import CHAT_MODEL
from tests.server.commands import palette

SOUND = """\
version: 1
scorers:
  count: {kind: lexical, measure: words}
  other: {kind: lexical, measure: characters}
values:
  words: {from: count, check: [{prompt: q, better: a b, worse: a}]}
  characters: {from: other}
"""


def check(*arguments):
    return palette("rewards", "check", *arguments)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rewards.yaml"
    path.write_text(SOUND)
    return path


def test_a_sound_file(file):
    told = check(file)
    assert told.exit_code == 0, told.output
    assert "count lexical" in told.stdout
    assert "words tells better from worse (1 pairs)" in told.stdout
    assert "the sign of characters is not tested" in told.stdout


def test_values_of_a_scorer_that_fails(file):
    broken = "{kind: sequence_classifier, model: ./gone, input: {view: text}}"
    file.write_text(SOUND.replace("{kind: lexical, measure: words}", broken))
    told = check(file, "--device", "cpu")
    assert told.exit_code == 1
    assert "failed: scorer 'count' (feeds words)" in told.stdout
    assert "words is not tested" in told.stdout


def test_json_is_one_object(file):
    told = check(file, "--json")
    assert told.exit_code == 0
    found = json.loads(told.stdout)
    assert found["sound"] is True
    assert [one["name"] for one in found["scorers"]] == ["count", "other"]
    assert found["scorers"][0]["texts_per_s"] > 0


def test_judged_values_are_tested_where_a_chat_model_is_named(file):
    file.write_text(
        "version: 1\n"
        'scorers: {judge: {kind: judge, question: "Is the reply kind?"}}\n'
        "values: {kind: {from: judge}}\n"
    )
    told = check(file)
    assert told.exit_code == 0
    assert "name that by --model to test it" in told.stdout
    told = check(file, "--model", CHAT_MODEL, "--device", "cpu")
    assert told.exit_code == 0, told.output
    assert "passed: words, finite" in told.stdout
    # It was never taught to answer such questions.
    assert "seldom replies with one of the yes_words" in told.stdout
    told = check(file, "--model", file.parent / "gone")
    assert told.exit_code == 1
    assert "does not exist" in told.stderr


def test_a_chat_model_that_nobody_asks_is_not_loaded(file):
    assert check(file, "--model", file.parent / "gone").exit_code == 0


def test_a_value_that_is_the_wrong_way_round(file):
    file.write_text(SOUND.replace("from: count", "mix: {count: -1}"))
    told = check(file)
    assert told.exit_code == 1
    assert "words failed: pair 1: the better answer has -2" in told.stdout
    assert check(file, "--json").exit_code == 1


def test_a_wrong_file(file):
    file.write_text(SOUND.replace("measure: words", "measure: wrds"))
    told = check(file)
    assert told.exit_code == 2
    assert told.stdout == ""
    assert "rewards.yaml:3: scorers.count.measure" in told.stderr
    assert check(file.parent / "none.yaml").exit_code == 2


def test_a_device_that_is_not_there(file):
    file.write_text(
        SOUND.replace("{kind: lexical, measure: characters}", "{kind: sequence_classifier, "
                      "model: ./m, input: {view: text}}")
    )  # fmt: skip
    told = check(file, "--device", "cuda:77")
    assert told.exit_code == 1
    assert "cuda:77" in told.stderr


def test_help():
    told = palette("rewards", "check", "--help")
    assert told.exit_code == 0
    assert "palette rewards check " in told.stdout
    assert "rewards" in palette("--help").stdout
