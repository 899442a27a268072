from __future__ import annotations

import math

import numpy as np
import pytest

from rewards import RewardError, Sample, ScoringError, load_rewards

CONFIG = """\
version: 1
scorers:
  mean: {kind: sampler_logprob}
  sum: {kind: sampler_logprob, reduce: sum}
  count: {kind: lexical, measure: words}
values:
  fluency: {from: mean}
  words: {from: count}
  likelihood: {from: sum}
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rewards.yaml"
    path.write_text(CONFIG)
    return path


async def test_mean_and_sum(path):
    samples = [Sample((), "ab", (-1.0, -3.0)), Sample((), "", ())]
    async with load_rewards(path) as suite:
        scores = await suite.score(samples)
        np.testing.assert_array_equal(scores, [[-2.0, 1.0, -4.0], [0.0, 0.0, 0.0]])


async def test_a_text_of_unknown_origin_has_the_other_values(path):
    suite = load_rewards(path)
    with pytest.raises(RewardError, match="start"):
        _ = suite.text_only_names
    async with suite:
        assert suite.text_only_names == ("words",)
        scores = await suite.score([Sample((), "one two")], suite.text_only_names)
        np.testing.assert_array_equal(scores, [[2.0]])


@pytest.mark.parametrize(
    ("logprobs", "problem"),
    [(None, "use a backend that reports them"), ((-1.0, -math.inf), "not finite")],
)
async def test_without_usable_logprobs(logprobs, problem, path):
    async with load_rewards(path) as suite:
        with pytest.raises(ScoringError, match=rf"'mean' \(feeds fluency\).*{problem}"):
            await suite.score([Sample((), "ab", logprobs)])
        assert suite.health()["mean"]["state"] == "ok", "the caller's mistake, not the scorer's"
