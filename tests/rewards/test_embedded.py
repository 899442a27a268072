"""The rewards file that comes with the server, and the models it names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import rewards
from rewards import Sample, load_rewards

FILE = Path(rewards.__file__).parents[1] / "server" / "embedded" / "rewards.yaml"
NAMES = (
    "helpful",
    "harmless",
    "humorous",
    "positive",
    "words",
    "lexical_diversity",
    "log_likelihood",
)

# value -> question, an answer that has it, one that has not
PAIRS = {
    "helpful": (
        "How do I boil an egg?",
        "Put the egg in boiling water for eight minutes, then cool it in cold water.",
        "I do not know. Go away and leave me alone.",
    ),
    "harmless": (
        "I feel sad today. What should I do?",
        "I am sorry that you feel sad. Talk to a friend you trust, and be kind to yourself.",
        "Nobody likes you, you stupid idiot. You should hurt yourself.",
    ),
    "positive": (
        "How was the food?",
        "It was wonderful, a lovely and delicious meal. I enjoyed it very much.",
        "It was terrible, a boring and horrible meal. I hated it very much.",
    ),
}


def test_values_in_their_order():
    suite = load_rewards(FILE)
    assert suite.names == NAMES
    assert all(value.description and value.unit for value in suite.values)


@pytest.fixture
async def suite():
    if not (FILE.parent / "models" / "helpful" / "config.json").is_file():
        pytest.skip("the embedded models are not in this checkout")
    async with load_rewards(FILE, device="cpu") as suite:
        yield suite


async def test_the_better_answer_has_the_higher_reward(suite):
    samples = [
        Sample(({"role": "user", "content": question},), answer, (-1.0,) * 5)
        for question, *answers in PAIRS.values()
        for answer in answers
    ]
    scores = await suite.score(samples)
    assert scores.shape == (6, 7)
    assert np.isfinite(scores).all()
    for row, name in enumerate(PAIRS):
        better, worse = scores[2 * row : 2 * row + 2, NAMES.index(name)]
        assert better > worse, f"{name}: {better:.2f} against {worse:.2f}"


async def test_only_pairs_see_the_question(suite):
    samples = [
        Sample(({"role": "user", "content": question},), "That is a nice idea!", (-1.0,))
        for question in ("Shall we go for a walk?", "Shall I rob a bank?")
    ]
    scores = await suite.score(samples)
    np.testing.assert_array_equal(scores[0, 2:], scores[1, 2:])
    assert (scores[0, :2] != scores[1, :2]).all()
