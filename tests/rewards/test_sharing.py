"""Scorers of one file that read one model differently share it."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from rewards import RewardModelError, ScoringError, load_rewards
from rewards.suite import RewardSuite
from tests.rewards.fakes import sample

CONFIG = """\
version: 1
scorers:
  first: {kind: sequence_classifier, model: m, input: {view: text}, output: {index: 0}}
  count: {kind: lexical, measure: words}
  second: {kind: sequence_classifier, model: ./m, input: {view: text}, output: {label: LABEL1}}
  several:
    kind: sequence_classifier
    model: ../here/m
    input: {view: text}
    outputs: {gap: {margin: [2, 1]}, last: {index: 2}}
values:
  a: {from: first, watch: several.last}
  b: {from: second}
  words: {from: count}
  c: {mix: {several.gap: 2, first: 1}}
"""
SAMPLES = [sample(text) for text in ("a b c", "d", "e f g h i j k l", "")]


@pytest.fixture
def write(tiny_model, tmp_path):
    folder = tmp_path / "here"
    shutil.copytree(tiny_model("bert", n_labels=3), folder / "m")

    def get(old="", new=""):
        assert old in CONFIG
        path = folder / "rewards.yaml"
        path.write_text(CONFIG.replace(old, new) if old else CONFIG)
        return path

    return get


def names(suite: RewardSuite) -> list[str]:
    return list(suite.health())


async def test_one_model_and_one_pass(write):
    async with load_rewards(write(), device="cpu") as suite:
        assert names(suite) == ["first+second+several", "count"]
        scores = await suite.score(SAMPLES, suite.columns)
        health = suite.health()["first+second+several"]
    assert health["texts"] == len(SAMPLES)
    alone = []
    for keep in ("first", "second", "several"):
        source = f"{keep}.gap" if keep == "several" else keep
        path = write()
        path.write_text(path.read_text().split("values:")[0] + f"values: {{v: {{from: {source}}}}}")
        async with load_rewards(path, device="cpu") as suite:
            assert names(suite) == [keep]
            alone.append((await suite.score(SAMPLES))[:, 0])
    np.testing.assert_allclose(scores[:, 0], alone[0], rtol=1e-5)
    np.testing.assert_allclose(scores[:, 1], alone[1], rtol=1e-5)
    np.testing.assert_allclose(scores[:, 3], 2 * alone[2] + alone[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model: ./m, input: {view: text}", "model: ./m, input: {view: text}, max_length: 30"),
        ("model: ./m, input: {view: text}", "model: ./m, input: {view: pair}"),
        ("model: ./m, input: {view: text}", "model: ./m, input: {view: text}, dtype: bfloat16"),
        ("model: ./m, input: {view: text}", "model: ./m, input: {view: text}, revision: abc"),
    ],
)
def test_what_differs_is_not_shared(old, new, write):
    assert names(load_rewards(write(old, new))) == ["first+several", "second", "count"]


async def test_what_feeds_nothing_is_not_looked_at(write):
    path = write("output: {label: LABEL1}", "output: {label: nonsense}")
    with pytest.raises(RewardModelError, match=r"'first\+second\+several'.*no label 'nonsense'"):
        await load_rewards(path, device="cpu").start()
    path.write_text(path.read_text().replace("  b: {from: second}\n", ""))
    async with load_rewards(path, device="cpu") as suite:
        assert names(suite) == ["first+several", "count"]


async def test_a_failure_names_all_of_them(write, monkeypatch):
    async with load_rewards(write(), device="cpu") as suite:
        scorer = suite._scorers["first+second+several"]
        monkeypatch.setattr(scorer, "forward", lambda batch: np.full((len(batch), 4), np.nan))
        with pytest.raises(ScoringError, match=r"'first\+second\+several' \(feeds a, b, c"):
            await suite.score(SAMPLES)
        found = await suite.attempt(SAMPLES, {"a", "b", "c"})
        assert set(found.failures) == {"a", "b", "c"}
        assert found.rewards[:, 2].tolist() == [3, 1, 8, 0]
