"""What is found of a rewards file: sizes, licences, speed, and what would keep a server away."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading

import numpy as np
import pytest
from huggingface_hub import constants

from rewards import Judgement, RewardConfigError, checking
from rewards.base import Scorer
from rewards.checking import check_rewards
from rewards.judging import ChatModel
from rewards.licences import NO_CARD, NOT_STATED, licence_of

CONFIG = """\
version: 1
scorers:
  tone:
    kind: sequence_classifier
    model: m
    input: {view: text}
    output: {index: 0}
  broken: {kind: sequence_classifier, model: ./gone, input: {view: text}}
  count: {kind: lexical, measure: words}
  own: {kind: sampler_logprob}
  idle: {kind: lexical, measure: characters}
  seen: {kind: lexical, measure: sentences}
values:
  tone: {from: tone, watch: seen}
  lost: {from: broken, check: [{prompt: q, better: a, worse: b}]}
  words: {from: count, check: [{prompt: q, better: a b, worse: a}]}
  short: {mix: {count: -1}, check: [{prompt: q, better: a b, worse: a}]}
  own: {from: own, check: [{prompt: q, better: a b, worse: a}]}
"""


@pytest.fixture
def file(tiny_model, tmp_path):
    shutil.copytree(tiny_model("bert", n_labels=2), tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n# A model\n")
    path = tmp_path / "rewards.yaml"
    path.write_text(CONFIG)
    return path


def test_one_failure_hides_no_other(file):
    told = []
    report = check_rewards(file, device="cpu", tell=told.append)
    assert told == ["tone", "broken", "count", "own", "idle", "seen"]
    scorers = {one.name: one for one in report.scorers}
    tone = scorers["tone"]
    assert tone.problem is None
    assert tone.passed == ("weights", "vocabulary", "padding", "finite")
    assert (tone.licence, tone.max_length) == ("mit", 64)
    assert tone.model == str(file.parent / "m")
    assert 10_000 < tone.n_parameters < 100_000
    assert tone.n_bytes == 4 * tone.n_parameters
    assert tone.texts_per_s > 0
    assert tone.ms_per_1k_tokens > 0
    assert "no such folder" in scorers["broken"].problem
    assert scorers["count"].ms_per_1k_tokens is None
    assert (scorers["seen"].values, scorers["seen"].warnings) == (("tone",), ())
    assert scorers["idle"].warnings == ("it feeds no value, so a server does not load it",)
    values = {one.name: one for one in report.values}
    assert values["tone"].problem is None
    assert values["tone"].n_pairs == 0
    assert (values["lost"].problem, values["lost"].is_tested) == (None, False)
    assert (values["words"].problem, values["words"].is_tested) == (None, True)
    assert "sign turned round" in values["short"].problem
    assert "leave check out" in values["own"].problem
    assert not report.is_sound
    assert json.loads(json.dumps(report.as_json()))["sound"] is False


def test_a_sound_file(file):
    text = CONFIG.replace("  lost:", "#").replace("  short:", "#").replace("  own: {from", "#")
    file.write_text(text)
    report = check_rewards(file, device="cpu")
    # What is broken feeds nothing, so a server does not load it.
    assert report.is_sound


def test_what_asks_the_chat_model_is_left_to_the_server(file, monkeypatch):
    class Asking(Scorer):
        def identity(self, output):
            return {}

        def load(self, device):
            raise AssertionError("there is no chat model here")

    monkeypatch.setattr(checking, "build_scorer", lambda name, *_: Asking(name, []))
    report = check_rewards(file, device="cpu")
    assert report.is_sound
    assert all("asks the chat model" in one.warnings[0] for one in report.scorers)
    assert not any(value.is_tested for value in report.values)


JUDGED = """\
version: 1
scorers:
  judge: {kind: judge, questions: {kind: "Is it kind?", long: "Is it long?"}}
values:
  kind: {from: judge.kind, check: [{prompt: q, better: a b c, worse: a}]}
  long: {from: judge.long}
"""


class FakeChat:
    """Says yes the likelier the longer an answer is; and neither yes nor no with what is left."""

    fingerprint = "chat"

    def __init__(self, mass):
        self.mass = mass
        self.threads = set()

    def check_words(self, words):
        if self.mass is None:
            raise ValueError("Yes and No begin with the same token")

    async def ask(self, sample, questions, words):
        self.threads.add(threading.current_thread())
        share = 1 / (1 + np.exp(-len(sample.answer) / 1e3))
        return Judgement(np.log([[share * one, (1 - share) * one] for one in self.mass]), 5)


@pytest.fixture
def check_judged(tmp_path):
    """Return a function that checks JUDGED with a chat model on a loop of another thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def check(mass, text=JUDGED):
        path = tmp_path / "rewards.yaml"
        path.write_text(text)
        judge = FakeChat(mass)
        report = check_rewards(path, device="cpu", chat=ChatModel(judge, loop))
        assert judge.threads <= {thread}
        return report

    yield check
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_a_chat_model_is_asked_where_there_is_one(check_judged):
    report = check_judged([0.9, 0.6])
    (scorer,) = report.scorers
    assert (scorer.problem, scorer.warnings) == (None, ())
    assert scorer.passed == ("words", "finite")
    assert scorer.texts_per_s > 0
    assert report.is_sound
    assert [value.is_tested for value in report.values] == [True, False]
    wrong = check_judged(
        [0.9, 0.6], JUDGED.replace("better: a b c, worse: a", "better: a, worse: a b")
    )
    assert "sign turned round" in wrong.values[0].problem


@pytest.mark.parametrize(
    ("mass", "named"), [([0.4, 0.6], "kind 40.0 %"), ([0.6, 0.01], "long 1.0 %")]
)
def test_a_chat_model_that_says_neither_yes_nor_no_is_told(check_judged, mass, named):
    report = check_judged(mass)
    (told,) = report.scorers[0].warnings
    assert f"(probability: {named})" in told
    assert "yes_words" in told
    assert report.is_sound  # a server would start


def test_a_chat_model_that_cannot_judge_is_a_problem(check_judged):
    report = check_judged(None)
    assert "the same token" in report.scorers[0].problem
    assert not any(value.is_tested for value in report.values)
    assert not report.is_sound
    nan = check_judged([np.nan, np.nan], JUDGED.replace("better: a b c", "better: a b d"))
    assert nan.scorers[0].problem == "it gave scores that are not finite"


def test_a_wrong_file(file):
    file.write_text("version: 1")
    with pytest.raises(RewardConfigError):
        check_rewards(file)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", "llama3"),
        ("---\nlicense: [mit, cc-by-4.0]\n---\ntext", "mit, cc-by-4.0"),
        ("---\nlicense: [\n---\n", NOT_STATED),
        ("---\ntags: []\n---\n", NOT_STATED),
        ("license: mit", NOT_STATED),
        ("", NOT_STATED),
    ],
)
def test_licences(card, licence, tmp_path):
    (tmp_path / "README.md").write_text(card)
    assert licence_of(tmp_path) == licence


def test_licences_that_are_not_here(tmp_path):
    assert licence_of(tmp_path) == NO_CARD
    assert licence_of("nobody/has-this") == NO_CARD


def test_a_hub_that_is_away_is_asked_once(tmp_path, monkeypatch, caplog):
    path = tmp_path / "rewards.yaml"
    path.write_text(
        "version: 1\n"
        "scorers:\n"
        "  a: {kind: sequence_classifier, model: nobody/a, input: {view: text}}\n"
        "  b: {kind: sequence_classifier, model: nobody/b, input: {view: text}}\n"
        "values: {a: {from: a}, b: {from: b}}\n"
    )
    monkeypatch.setattr("rewards.hub._PATIENCE_S", 0.0)
    # Nobody listens at port 9.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("the hub was asked again"))
    report = check_rewards(path, device="cpu")
    (message,) = caplog.messages
    assert "http://127.0.0.1:9 cannot be reached" in message
    assert all("cannot be reached" in one.problem for one in report.scorers)
    assert all("HF_ENDPOINT" in one.problem for one in report.scorers)
    assert not constants.HF_HUB_OFFLINE
