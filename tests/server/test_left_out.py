"""A reward that is down: what an answer can do without, and what it cannot."""

from __future__ import annotations

import pytest

from rewards import RewardQueueFullError, ScoringError

WORDS = {"words": {"gain": 0.3}}


@pytest.fixture
async def broken(running, monkeypatch):
    """Return the running server; its variety fails, for every other candidate at first."""
    suite = running.context.aligner.rewards
    scorer = suite._scorers["variety"]
    running.fails = lambda samples: True

    def score(samples):
        if running.fails(samples):
            raise ScoringError("variety", ("variety",), "out of order")
        return type(scorer).score(scorer, samples)

    monkeypatch.setattr(scorer, "score", score, raising=False)
    return running


def picked(body):
    return [choice["message"]["content"] for choice in body["choices"]]


@pytest.mark.parametrize("scope", ["traffic", "answer"])
async def test_a_value_nobody_asked_for_is_reported_missing(broken, scope):
    palette = {"targets": WORDS, "scope": scope, "report": "full", "on_infeasible": "best_effort"}
    reply = await broken.chat(palette=palette, seed=4)
    assert reply.status_code == 200, reply.text
    report = reply.json()["palette"]
    assert list(report["left_out"]) == ["variety"]
    assert "scorer 'variety' (feeds variety): out of order" in report["left_out"]["variety"]
    assert set(report["realised"]) == {"words", "log_likelihood"}
    assert ("variety" in report["expected"]) == (scope == "traffic")
    assert all("variety" not in one["rewards"] for one in report["candidates_detail"])
    assert set(report["targets"]) == {"words"}
    broken.fails = lambda samples: False
    whole = (await broken.chat(palette=palette, seed=4)).json()
    assert picked(whole) == picked(reply.json()), "the choice is the same without it"
    assert whole["palette"]["left_out"] is None
    assert whole["palette"]["multipliers"]["words"] == report["multipliers"]["words"]


async def test_a_value_that_fails_for_one_candidate_is_left_out_for_all(broken):
    calls = iter(range(1000))
    broken.fails = lambda samples: next(calls) == 3
    reply = await broken.chat(palette={"targets": WORDS, "report": "full"}, seed=4)
    report = reply.json()["palette"]
    assert list(report["left_out"]) == ["variety"]
    assert "variety" not in report["realised"]


@pytest.mark.parametrize(
    "palette",
    [
        {"targets": {**WORDS, "variety": "keep"}},
        {"targets": {**WORDS, "variety": {"keep": True, "optional": False}}},
        {"targets": WORDS, "floors": {"variety": 0.1}},
        {"targets": {"variety": {"gain": 0.1, "optional": True}}, "floors": {"variety": 0.1}},
    ],
)
async def test_a_value_that_is_needed_fails_the_request(broken, palette):
    reply = await broken.chat(palette=palette)
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "scoring_failed"


@pytest.mark.parametrize("scope", ["traffic", "answer"])
async def test_an_optional_target_is_left_out_of_the_promise(broken, scope):
    palette = {"scope": scope, "on_infeasible": "best_effort"}
    both = {**WORDS, "variety": {"gain": 0.2, "optional": True}}
    reply = await broken.chat(palette={**palette, "targets": both}, seed=4)
    assert reply.status_code == 200, reply.text
    report = reply.json()["palette"]
    assert list(report["left_out"]) == ["variety"]
    assert set(report["targets"]) == {"words"}
    assert report["multipliers"]["variety"] == 0
    alone = (await broken.chat(palette={**palette, "targets": WORDS}, seed=4)).json()
    assert picked(alone) == picked(reply.json()), "as if it had not been asked for"
    broken.fails = lambda samples: False
    whole = (await broken.chat(palette={**palette, "targets": both}, seed=4)).json()["palette"]
    assert set(whole["targets"]) == {"words", "variety"}
    assert whole["multipliers"]["variety"] != 0


async def test_only_optional_targets_and_all_of_them_lost(broken):
    palette = {"targets": {"variety": {"gain": 0.2, "optional": True}}}
    report = (await broken.chat(palette=palette)).json()["palette"]
    assert report["targets"] == {}
    assert set(report["multipliers"].values()) == {0}
    assert report["kl"] == pytest.approx(0, abs=1e-12)


async def test_the_best_of_what_is_left_keeps_its_candidates(broken):
    palette = {
        "targets": {**WORDS, "variety": {"gain": 0.2, "optional": True}},
        "candidates": "auto",
    }
    report = (await broken.chat(palette=palette)).json()["palette"]
    broken.fails = lambda samples: False
    whole = (await broken.chat(palette=palette)).json()["palette"]
    assert report["candidates"] == whole["candidates"]


async def test_a_full_reward_queue_is_429(running, monkeypatch):
    async def attempt(samples, may_fail, names=None, *, more):
        raise RewardQueueFullError("texts wait already; try again later", 5)

    monkeypatch.setattr(running.context.aligner.rewards, "attempt", attempt)
    reply = await running.chat(palette={"targets": WORDS})
    assert reply.status_code == 429
    assert reply.json()["error"]["code"] == "reward_queue_full"
    assert reply.headers["retry-after"] == "5"


async def test_ready_is_red_while_a_failure_persists_and_green_again_without_traffic(
    running, monkeypatch
):
    health = running.context.aligner.rewards._runner._health["variety"]
    health.failed("one bad text")
    reply = await running.client.get("/ready")
    assert reply.status_code == 200
    assert reply.json()["rewards"]["variety"]["state"] == "failing"
    health.persists = True
    assert (await running.client.get("/ready")).status_code == 503
    health.counted(1)
    assert (await running.client.get("/ready")).status_code == 200
