from __future__ import annotations

import sys
import time

import pytest

from rewards import RewardModelError, Sample, load_rewards
from rewards.models.sentiment import MAX_CHARACTERS, VaderScorer


@pytest.fixture(scope="module")
def vader():
    pytest.importorskip("vaderSentiment", reason="needs the extra sentiment")
    scorer = VaderScorer("mood", ["mood"])
    scorer.load("cpu")
    return scorer


def score(vader, answer):
    return vader.score([Sample(({"role": "user", "content": "awful"},), answer)]).item()


@pytest.mark.parametrize(
    ("answer", "compound"),
    [
        # the examples of VADER's own README
        ("VADER is smart, handsome, and funny.", 0.8316),
        ("VADER is VERY SMART, handsome, and FUNNY!!!", 0.9342),
        ("VADER is not smart, handsome, nor funny.", -0.7424),
        ("The book was only kind of good.", 0.3832),
        ("Today SUX!", -0.5461),
        ("Make sure you :) or :D today!", 0.8633),
        ("😀", 0.3612),
        ("", 0),
        (" \n", 0),
        ("我爱你。", 0),
        ("Ünïcödé", 0),
    ],
)
def test_one_sentence_has_vaders_compound(vader, answer, compound):
    assert score(vader, answer) == pytest.approx(compound, abs=1e-9)


def test_several_have_their_mean(vader):
    parts = ["VADER is smart, handsome, and funny.", "Today SUX!", "The sky."]
    assert score(vader, " ".join(parts)) == pytest.approx((0.8316 - 0.5461 + 0) / 3)


def test_length_alone_moves_nothing_and_takes_bounded_time(vader):
    once = score(vader, "It is a good day.")
    assert 0 < once < 0.9
    start = time.perf_counter()
    assert score(vader, "It is a good day. " * 10_000) == pytest.approx(once)
    # one sentence without end, of what VADER takes longest for: cut, or it would take hours
    endless = score(vader, "good but " * 50_000)
    assert -1 <= endless <= 1
    assert time.perf_counter() - start < 60
    assert score(vader, "good " * MAX_CHARACTERS) > 0.9


def test_identity(vader):
    identity = vader.identity("score")
    assert identity["kind"] == "vader"
    assert identity["package"] == "3.3.2"
    assert len(identity["lexicon"]) == 64
    assert identity["version"] == VaderScorer.VERSION


def test_without_the_package_the_start_names_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    path = tmp_path / "rewards.yaml"
    path.write_text("version: 1\nscorers: {m: {kind: vader}}\nvalues: {mood: {from: m}}\n")
    suite = load_rewards(path)
    with pytest.raises(RewardModelError, match=r"feeds mood.*palette-server\[sentiment\]"), suite:
        pass


def test_from_a_file(vader, tmp_path):
    path = tmp_path / "rewards.yaml"
    path.write_text("version: 1\nscorers: {m: {kind: vader}}\nvalues: {mood: {from: m}}\n")
    with load_rewards(path) as suite:
        assert suite.score_sync([Sample((), "Today SUX!")]).tolist() == [[-0.5461]]
        assert suite.text_only_names == ("mood",)
