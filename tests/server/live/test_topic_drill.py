"""What the drill on new topics measures with: its topics, its live groups, and its errors."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest

from server import embedded
from server.calibration import load_calibration
from solver import PilotSet
from tests.benchmarks.following import N_CANDIDATES, Following
from tests.benchmarks.topics import (
    TOPIC_PALETTES,
    Run,
    errors,
    halves,
    live_groups,
    topics_of,
)


@functools.cache
def shipped():
    return load_calibration(embedded.CALIBRATION)


def test_the_topics_of_prompts_are_known_or_refused():
    whole = shipped().pilot
    pilot = PilotSet(whole.rewards[:2000], whole.values)
    topic = topics_of("calibration", 0, pilot)
    assert len(topic) == pilot.n_prompts
    with pytest.raises(ValueError, match="--pool-prompts"):
        topics_of("calibration", 1, pilot)
    with pytest.raises(ValueError, match="has no 2000 prompts"):
        topics_of("heldout", 0, pilot)


@pytest.mark.parametrize("split", ["by chance", "helpful", "words"])
def test_halves_share_no_topic_and_differ_as_they_say(split):
    pilot = shipped().pilot
    topic = topics_of("calibration", 0, pilot)
    known, new = halves(split, [(pilot, topic), (pilot, topic)])
    assert sorted([*known, *new]) == sorted(set(topic.tolist()))
    assert abs(len(known) - len(new)) <= 1
    if split != "by chance":
        means = pilot.prompt_means[:, pilot.values.index(split)]
        level = {one: means[topic == one].mean() for one in set(topic.tolist())}
        assert max(level[one] for one in known) < min(level[one] for one in new)


def test_no_live_candidate_comes_twice_nor_a_prompt_before_the_others():
    n_prompts, n_each = 5, 3 * N_CANDIDATES + 2
    numbered = np.arange(n_prompts * n_each).reshape(n_prompts, n_each)
    rewards = np.stack([numbered, numbered], axis=-1)
    groups = np.array(list(live_groups(rewards, np.random.default_rng(0))))
    assert groups.shape == (n_prompts * 3, N_CANDIDATES, 2)
    assert (groups[..., 0] == groups[..., 1]).all()
    assert len(set(groups[..., 0].ravel().tolist())) == groups[..., 0].size
    prompts = groups[..., 0] // n_each
    assert (prompts == prompts[:, :1]).all()
    assert [sorted(turn) for turn in prompts[:, 0].reshape(3, n_prompts)] == [[0, 1, 2, 3, 4]] * 3


def test_errors_are_what_is_served_beyond_the_promise(tmp_path):
    """None on the prompts it was solved on, but for how they are cut into groups; and all of it
    when every answer is moved.
    """
    root, pilot = shipped(), shipped().pilot
    one = Following(root, 1000, "frozen", tmp_path, TOPIC_PALETTES)
    error, half = errors(one, pilot.rewards)
    assert error.shape == (len(TOPIC_PALETTES), pilot.n_values)
    np.testing.assert_allclose(error / pilot.scale, 0.0, atol=0.005)
    np.testing.assert_array_less(0.005, half / pilot.scale)
    np.testing.assert_array_less(half / pilot.scale, 0.05)
    moved, same = errors(one, pilot.rewards + 0.3 * pilot.scale)
    np.testing.assert_allclose((moved - error) / pilot.scale, 0.3, atol=1e-9)
    np.testing.assert_allclose(same, half)


def test_intervals_hold_between_two_halves_of_the_prompts(tmp_path):
    """Of 95 %; 40 halvings with 4 x 7 levels each, that depend on each other: 90 to 99 %."""
    root, pilot = shipped(), shipped().pilot
    inside = []
    for seed in range(40):
        order = np.random.default_rng(seed).permutation(pilot.n_prompts)
        own = PilotSet(pilot.rewards[order[:300]], pilot.values)
        one = Following(_with(root, own), 1000, "frozen", tmp_path, TOPIC_PALETTES)
        error, half = errors(one, pilot.rewards[order[300:600]])
        inside.append(np.abs(error) <= half)
    assert 0.90 <= np.mean(inside) <= 0.99


def _with(root, pilot):
    return replace(root, pilot=pilot)


def test_a_run_says_when_it_was_alarmed_and_when_it_was_true_again():
    """All answers are moved by a standard deviation; a half-life of 50 forgets that in 800."""
    pilot = shipped().pilot
    root = _with(shipped(), PilotSet(pilot.rewards[:300], pilot.values))
    live = pilot.rewards[300:1300] + pilot.scale
    found = {mode: Run(root, live, live, mode, 50, 800, 0) for mode in ("frozen", "on")}
    for run in found.values():
        assert 0 < run.alarm < 100
        assert run.checks == list(range(0, 801, 50))
        assert run.errors.shape == (17, 2, len(TOPIC_PALETTES), pilot.n_values)
    words = pilot.values.index("words")
    assert found["frozen"].is_alarmed
    assert found["frozen"].back(3, words) is None
    assert found["on"].back(3, words) >= 50
    few = Run(root, live[:20], live, "frozen", 50, 800, 0)
    assert few.n_requests == 40
