from __future__ import annotations

import math

import numpy as np
import pytest

from rewards import Sample, ScoringError, load_rewards

CONFIG = """\
version: 1
scorers:
  mean: {kind: sampler_logprob}
  sum: {kind: sampler_logprob, reduce: sum}
values:
  fluency: {from: mean}
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
        np.testing.assert_array_equal(scores, [[-2.0, -4.0], [0.0, 0.0]])


@pytest.mark.parametrize(
    ("logprobs", "problem"),
    [(None, "use a backend that reports them"), ((-1.0, -math.inf), "not finite")],
)
async def test_without_usable_logprobs(logprobs, problem, path):
    async with load_rewards(path) as suite:
        with pytest.raises(ScoringError, match=rf"'mean' \(feeds fluency\).*{problem}"):
            await suite.score([Sample((), "ab", logprobs)])
        assert suite.health()["mean"]["state"] == "ok", "the caller's mistake, not the scorer's"
