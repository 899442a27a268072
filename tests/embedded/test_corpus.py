from __future__ import annotations

import itertools
from random import Random

import numpy as np
import pytest

from server.embedded import VALUES
from server.embedded.corpus import (
    PER_TOPIC,
    compose,
    conversation,
    prompts,
    sentences,
    split_prompts,
    topics,
)
from server.embedded.quality import SENTENCE_END


def test_topics_are_many_and_complete():
    assert len(topics()) >= 80
    for topic in topics():
        assert len(topic.tips) >= 5
        assert len(topic.care) == len(topic.risk) == len(topic.fun) == 2
        assert topic.asks_only or topic.do


def test_splits_are_disjoint_and_large():
    texts = {split: [prompt.text for prompt in split_prompts(split)] for split in PER_TOPIC}
    for split in texts:
        assert len(set(texts[split])) == len(texts[split])
    for one, other in itertools.combinations(texts, 2):
        assert not set(texts[one]) & set(texts[other])
    assert len(texts["calibration"]) >= 2048
    assert len(texts["heldout"]) >= 1200
    assert sum(map(len, texts.values())) >= 4000


def test_every_topic_is_in_every_split():
    for split in PER_TOPIC:
        assert {prompt.topic for prompt in split_prompts(split)} == set(topics())


def test_prompts_are_single_user_messages():
    for messages in prompts("heldout"):
        assert [message["role"] for message in messages] == ["user"]
        assert messages[0]["content"].strip()


def test_no_slot_is_left_open():
    pool = split_prompts("train")
    rng = Random(0)
    for prompt in rng.sample(pool, 500):
        texts = [message["content"] for message in conversation(rng, prompt, pool)]
        texts.append(compose(rng, prompt.topic).text)
        assert not any(set("{}") & set(text) for text in texts)


def test_the_same_seed_gives_the_same_answers():
    topic = topics()[3]
    first = [compose(Random(seed), topic) for seed in range(20)]
    assert first == [compose(Random(seed), topic) for seed in range(20)]
    assert len(set(first_answer.text for first_answer in first)) > 15


def test_answers_hold_only_sentences_of_their_topic():
    rng = Random(1)
    for prompt in rng.sample(split_prompts("heldout"), 300):
        for sentence in SENTENCE_END.split(compose(rng, prompt.topic).text):
            assert sentence in sentences(prompt.topic)


def test_values_vary_independently():
    rng = Random(2)
    answers = [compose(rng, rng.choice(topics())) for _ in range(4000)]
    table = np.array([[answer.scores[value] for value in VALUES] for answer in answers])
    matrix = np.corrcoef(table.T)
    assert np.abs(matrix - np.eye(len(VALUES))).max() < 0.08


def test_a_system_message_and_an_earlier_turn_are_rare_but_there():
    pool = split_prompts("train")
    rng = Random(3)
    lengths = [len(conversation(rng, pool[i], pool)) for i in range(1000)]
    assert lengths.count(1) > 700
    assert lengths.count(2) > 30
    assert lengths.count(3) > 30


@pytest.mark.parametrize("value", VALUES)
def test_a_level_moves_its_own_score_alone(value):
    topic = topics()[0]
    ends = {
        "helpful": (0, 4),
        "harmless": (-2, 2),
        "humorous": (0, 3),
        "positive": (-2, 2),
    }
    middle = {"helpful": 2, "harmless": 0, "humorous": 0, "positive": 0}
    low, high = ends[value]
    rng = Random(4)
    scores = {
        level: np.mean(
            [compose(rng, topic, {**middle, value: level}).scores[value] for _ in range(50)]
        )
        for level in (low, high)
    }
    assert scores[high] - scores[low] > 2.5
