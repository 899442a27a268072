"""Values from the outputs of scorers: several of one pass, sums, and what is only watched."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from rewards import RewardConfigError, RewardError, load_rewards
from tests.rewards.fakes import sample

CONFIG = """\
version: 1
scorers:
  several:
    kind: sequence_classifier
    model: m
    input: {view: text}
    outputs:
      first: {index: 0}
      gap: {margin: [2, 1]}
  one:
    kind: sequence_classifier
    model: m
    input: {view: text}
    output: {index: 0}
  count: {kind: lexical, measure: words}
values:
  a: {from: several.first, watch: count}
  b: {from: several.gap}
  both: {mix: {several.first: 2, count: -0.5}}
  alone: {from: one}
"""
SAMPLES = [sample(text) for text in ("a b c", "d", "e f g h i j k l", "")]


@pytest.fixture
def write(tiny_model, tmp_path):
    shutil.copytree(tiny_model("bert", n_labels=3), tmp_path / "m")

    def get(old="", new=""):
        assert old in CONFIG
        path = tmp_path / "rewards.yaml"
        path.write_text(CONFIG.replace(old, new) if old else CONFIG)
        return path

    return get


async def test_several_outputs_of_one_pass(write):
    async with load_rewards(write(), device="cpu") as suite:
        assert suite.names == ("a", "b", "both", "alone")
        assert suite.columns == ("a", "b", "both", "alone", "a.watch")
        assert suite.watches == {"a": "a.watch"}
        scores = await suite.score(SAMPLES, suite.columns)
        again = await suite.score(SAMPLES, suite.columns)  # from the cache
        only = await suite.score(SAMPLES)
        health = suite.health()
    words = scores[:, 4]
    assert words.tolist() == [3, 1, 8, 0]
    np.testing.assert_allclose(scores[:, 2], 2 * scores[:, 0] - 0.5 * words, rtol=1e-12)
    np.testing.assert_allclose(scores[:, 0], scores[:, 3], rtol=1e-5)
    assert np.ptp(scores[:, 1] - scores[:, 0]) > 0.01
    np.testing.assert_array_equal(again, scores)
    np.testing.assert_array_equal(only, scores[:, :4])
    # Four columns come from one model, of which two scorers speak: it reads each text once.
    assert health["several+one"]["texts"] == len(SAMPLES)


async def test_only_what_is_asked_for_runs(write):
    async with load_rewards(write(), device="cpu") as suite:
        scores = await suite.score(SAMPLES, ["a.watch"])
        assert scores.shape == (4, 1)
        assert suite.health()["several+one"]["texts"] == 0
        with pytest.raises(RewardError, match=r"unknown value 'a\.watc'; did you mean 'a\.watch'"):
            await suite.score(SAMPLES, ["a.watc"])


async def test_transforms_are_told_and_not_done(write):
    path = write("from: several.gap}", "from: several.gap, transform: {length_control: true}}")
    async with load_rewards(path, device="cpu") as suite:
        assert list(suite.transforms) == ["b"]
        assert suite.names == ("a", "b", "both", "alone")
        assert suite.columns == (*suite.names, "a.watch", ".words")
        scores = await suite.score(SAMPLES, suite.columns)
        fingerprint = suite.fingerprint
    assert scores[:, 5].tolist() == [3, 1, 8, 0]
    async with load_rewards(write(), device="cpu") as suite:
        # What is measured is the same, so a calibration of the one fits the other.
        assert suite.fingerprint == fingerprint
        np.testing.assert_array_equal(await suite.score(SAMPLES), scores[:, :4])


async def test_fingerprints_are_of_outputs(write):
    async def fingerprint(old="", new=""):
        async with load_rewards(write(old, new), device="cpu") as suite:
            return suite.fingerprint

    first = await fingerprint()
    # The same numbers by another road, and a watch that nobody optimises.
    assert await fingerprint("alone: {from: one}", "alone: {from: several.first}") == first
    assert await fingerprint(", watch: count", "") == first
    assert await fingerprint("several.first: 2", "several.first: 3") != first
    assert await fingerprint("{margin: [2, 1]}", "{margin: [1, 2]}") != first


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("from: several.gap", "from: several.gat", r"several has no output 'gat'; did you mean"),
        (
            "from: several.gap",
            "from: several",
            r"several has several outputs: write several\.first",
        ),
        (
            "from: several.gap",
            "from: severel.gap",
            r"no scorer 'severel\.gap'; did you mean 'several'",
        ),
        ("from: several.gap", "from: count, transform: {clipp: 3}", r"transform\.clipp: .*'clip'"),
        ("from: several.gap", "from: count, transform: {clip: -3}", r"transform\.clip: .*greater"),
        (
            "from: several.gap",
            "from: count, transform: {centre: true, clip: 3}",
            "centre cannot be",
        ),
        ("from: several.gap", "mix: {}", "section is empty"),
        ("from: several.gap", "mix: {count: 0}", "the weight of count is 0"),
        ("from: several.gap", "mix: {count: .inf}", "the weight of count is inf"),
        ("from: several.gap", "mix: {count: 1}, from: count", "either from or mix"),
        ("from: several.gap", "unit: logit", "either from or mix"),
        (
            "watch: count",
            "watch: cont",
            r"values\.a\.watch: no scorer 'cont'; did you mean 'count'",
        ),
        ("watch: count", "watch: several.first", "is what is optimised; watch another scorer"),
        (
            "output: {index: 0}",
            "output: {index: 0}\n    outputs: {x: {index: 1}}",
            "exclude each other",
        ),
    ],
)
def test_bad_sources(old, new, problem, write):
    with pytest.raises(RewardConfigError, match=problem):
        load_rewards(write(old, new), device="cpu")
