from __future__ import annotations

import asyncio
import json
import math

import numpy as np
import pytest

from tests.server.conftest import run_fake
from tests.server.fakes import FakeBackend

SHORT = {"targets": {"words": {"at_most": 8.0}}, "candidates": 16}


async def test_plain_answer_is_openais_and_nothing_more(running):
    body = (await running.chat()).json()
    assert body["object"] == "chat.completion"
    assert "palette" not in body
    assert len(body["choices"]) == 1
    assert body["usage"]["completion_tokens_details"]["rejected_prediction_tokens"] == 0


async def test_palette_report(running):
    body = (await running.chat(palette=SHORT, seed=1)).json()
    report = body["palette"]
    assert report["status"] == "met"
    assert report["targets"] == {"words": 8.0}
    assert report["multipliers"]["words"] < 0
    assert report["expected"]["words"]["level"] == pytest.approx(8.0, abs=1e-5)
    assert report["expected"]["words"]["stderr"] > 0
    assert report["realised"]["words"] == len(body["choices"][0]["message"]["content"].split())
    assert report["candidates"] == 16
    assert 1 <= report["ess"] <= 16
    assert report["calibration"]["valid"]
    assert report["calibration"]["prompts"] == 200
    assert set(report["timing_ms"]) == {"queue", "solve", "generate", "score", "total"}
    usage = body["usage"]
    served = report["realised"]["words"] + 1
    details = usage["completion_tokens_details"]
    assert usage["completion_tokens"] - details["rejected_prediction_tokens"] == served
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


async def test_what_was_asked_is_what_is_served(running):
    """Mean of answers drawn by the route, seeds fixed; a right server fails 1 % of seeds."""
    palette = {"targets": {"words": {"at_most": 8.0}, "variety": "keep"}, "candidates": 8}
    answers = [(await running.chat(palette=palette, seed=seed)).json() for seed in range(400)]
    expected = answers[0]["palette"]["expected"]
    base = running.context.aligner.calibration.pilot.base
    for value, level in (("words", 8.0), ("variety", base[1])):
        drawn = np.array([one["palette"]["realised"][value] for one in answers])
        stderr = math.hypot(drawn.std(ddof=1) / math.sqrt(len(drawn)), expected[value]["stderr"])
        # `keep` may be had for nothing, then more is served than was asked.
        wanted = expected[value]["level"] if value == "variety" else level
        assert abs(drawn.mean() - wanted) < 2.58 * stderr


async def test_full_report_explains_the_choice(running):
    body = (await running.chat(palette=SHORT | {"report": "full"}, seed=3)).json()
    detail = body["palette"]["candidates_detail"]
    assert [one["index"] for one in detail] == list(range(16))
    assert sum(one["weight"] for one in detail) == pytest.approx(1)
    chosen = [one for one in detail if one["chosen"]]
    assert [one["text"] for one in chosen] == [body["choices"][0]["message"]["content"]]
    words = np.array([one["rewards"]["words"] for one in detail])
    weights = np.array([one["weight"] for one in detail])
    logits = body["palette"]["multipliers"]["words"] * words
    np.testing.assert_allclose(weights, np.exp(logits) / np.exp(logits).sum(), rtol=1e-9)


async def test_report_none_leaves_the_report_out(running):
    assert "palette" not in (await running.chat(palette=SHORT | {"report": "none"})).json()


async def test_same_seed_same_answer_and_other_seeds_differ(running):
    texts = [
        (await running.chat(palette=SHORT, seed=seed)).json()["choices"][0]["message"]["content"]
        for seed in (7, 7, 8, 9, 10)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 2


async def test_n_choices_are_distinct_candidates(running):
    body = (await running.chat(palette=SHORT | {"report": "full"}, n=3, seed=5)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert sum(one["chosen"] for one in body["palette"]["candidates_detail"]) == 3


async def test_more_choices_than_candidates_is_refused(running):
    reply = await running.chat(palette=SHORT | {"candidates": 2}, n=3)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "palette.candidates"


async def test_logprobs(running):
    body = (await running.chat(logprobs=True, top_logprobs=2, seed=1)).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == body["choices"][0]["message"]["content"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)


async def test_stream(running):
    whole = (await running.chat(palette=SHORT, seed=1)).json()
    reply = await running.chat(
        palette=SHORT, seed=1, stream=True, stream_options={"include_usage": True}
    )
    assert reply.headers["content-type"].startswith("text/event-stream")
    lines = reply.text.split("\n\n")
    assert lines[0].startswith(":")
    assert lines[-2] == "data: [DONE]"
    events = [json.loads(line[6:]) for line in lines[:-2] if line.startswith("data: ")]
    text = "".join(
        choice["delta"].get("content", "") for one in events for choice in one["choices"]
    )
    assert text == whole["choices"][0]["message"]["content"]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    assert events[-1]["palette"]["expected"] == whole["palette"]["expected"]
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert all("palette" not in one for one in events[:-1])


async def test_stream_without_usage_carries_the_palette_on_the_last_chunk(running):
    reply = await running.chat(palette=SHORT, stream=True)
    events = [json.loads(line[6:]) for line in reply.text.split("\n\n")[1:-2]]
    assert "palette" in events[-1]
    assert "usage" not in events[-1]
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


async def test_stream_keeps_alive_and_tells_late_errors(tmp_path, settings):
    backend = FakeBackend(hold=True)
    quick = settings.model_copy(update={"keepalive_s": 0.01})
    async with run_fake(tmp_path, quick, backend) as running:
        backend.failure = None
        task = asyncio.create_task(running.chat(palette=SHORT, stream=True))
        await asyncio.sleep(1)  # a hundred comments: the status is on its way
        running.context.aligner.backend.failure = RuntimeError("secret detail")
        backend.released.set()
        reply = await task
    assert reply.status_code == 200
    assert reply.text.count(": still choosing") >= 2
    error = json.loads(reply.text.strip().split("data: ")[-1])["error"]
    assert "secret" not in error["message"]


async def test_infeasible_palette_before_the_stream_begins(running):
    reply = await running.chat(palette={"targets": {"words": {"at_least": 30}}}, stream=True)
    assert reply.status_code == 422
    assert running.backend.n_started == 0


async def test_infeasible_palette_says_why_and_what_would_do(running):
    palette = {"targets": {"words": {"at_least": 18.5}}, "candidates": 4}
    error = (await running.chat(palette=palette)).json()["error"]
    assert error["code"] == "palette_infeasible"
    assert "words" in error["message"]
    found = error["palette"]
    assert found["certificate"]["asked"] > found["certificate"]["limit"]
    assert found["min_candidates"] > 4
    enough = palette | {"candidates": found["min_candidates"]}
    assert (await running.chat(palette=enough)).status_code == 200
    nearest = {**found["nearest"], "candidates": 4}
    assert (await running.chat(palette=nearest)).status_code == 200


@pytest.mark.parametrize("method", ["interpolate", "nearest", "greedy"])
async def test_repair(running, method):
    palette = {
        "targets": {"words": {"at_least": 18.5}, "variety": "keep"},
        "candidates": 4,
        "on_infeasible": "repair",
        "repair": {"method": method},
    }
    report = (await running.chat(palette=palette)).json()["palette"]
    assert report["status"] == "repaired"
    assert report["repair"]["method"] == method
    assert report["targets"]["words"] < 18.5
    assert report["expected"]["words"]["level"] == pytest.approx(
        report["targets"]["words"], abs=1e-4
    )


async def test_best_effort(running):
    palette = {
        "targets": {"words": {"at_least": 30}}, "candidates": 4, "on_infeasible": "best_effort",
    }  # fmt: skip
    report = (await running.chat(palette=palette)).json()["palette"]
    assert report["status"] == "best_effort"


async def test_auto_takes_the_smallest_n_that_does(running):
    palette = {"targets": {"words": {"at_least": 17}}, "candidates": "auto"}
    report = (await running.chat(palette=palette)).json()["palette"]
    assert report["status"] == "met"
    fewer = {"targets": palette["targets"], "candidates": report["candidates"] // 2}
    assert (await running.chat(palette=fewer)).status_code == 422


async def test_scope_answer_is_met_on_the_prompts_own_candidates(running):
    palette = {
        "targets": {"words": {"at_least": 12}, "variety": "keep"},
        "scope": "answer",
        "report": "full",
    }
    report = (await running.chat(palette=palette, seed=2)).json()["palette"]
    detail = report["candidates_detail"]
    words = sum(one["weight"] * one["rewards"]["words"] for one in detail)
    assert words >= 12 - 1e-6
    assert report["expected"]["words"]["level"] == pytest.approx(words)


async def test_scope_answer_infeasible(running):
    palette = {"targets": {"words": {"at_least": 100}}, "scope": "answer"}
    reply = await running.chat(palette=palette)
    assert reply.status_code == 422
    assert reply.json()["error"]["palette"]["min_candidates"] is None


async def test_max_kl_bounds_the_expected_kl(running):
    palette = {"targets": {"words": {"at_least": 16}}, "max_kl": 0.1}
    solved = (await running.client.post("/v1/palette/solve", json={"palette": palette})).json()
    assert solved["kl"] <= 0.1 + 1e-6
    assert solved["expected"]["words"] < 16
    for _ in range(2):  # solved, then from the cache
        report = (await running.chat(palette=palette)).json()["palette"]
        assert report["status"] == "best_effort"
        assert report["limited_by"] == "max_kl"
    ample = (await running.chat(palette=palette | {"max_kl": 5.0})).json()["palette"]
    assert (ample["status"], ample["limited_by"]) == ("met", None)


@pytest.mark.parametrize("on_infeasible", ["repair", "best_effort"])
async def test_repair_keeps_the_budget(running, on_infeasible):
    palette = {"targets": {"words": {"at_least": 30}}, "on_infeasible": on_infeasible}
    free = (await running.client.post("/v1/palette/solve", json={"palette": palette})).json()
    kept = palette | {"max_kl": 0.1}
    solved = (await running.client.post("/v1/palette/solve", json={"palette": kept})).json()
    assert free["kl"] > 0.5
    assert solved["kl"] <= 0.1 + 1e-6


async def test_repair_offers_nothing_where_floors_refuse_everything(running):
    palette = {"targets": {"words": "keep"}, "floors": {"words": 50}, "on_infeasible": "repair"}
    reply = await running.chat(palette=palette)
    assert reply.status_code == 422
    assert "floors" in reply.json()["error"]["message"]


async def test_floors(running):
    palette = {"targets": {}, "floors": {"words": 15}, "report": "full"}
    body = (await running.chat(palette=palette, seed=4)).json()
    detail = body["palette"]["candidates_detail"]
    assert all(one["weight"] == 0 for one in detail if one["rewards"]["words"] < 15)
    assert body["palette"]["realised"]["words"] >= 15


async def test_floor_that_no_candidate_clears(running):
    palette = {"floors": {"words": 20}, "candidates": 2, "report": "full"}
    body = (await running.chat(palette=palette, seed=0)).json()
    longest = max(one["rewards"]["words"] for one in body["palette"]["candidates_detail"])
    assert longest < 20
    assert body["choices"][0]["finish_reason"] == "content_filter"
    assert body["choices"][0]["message"]["content"] is None
    assert body["choices"][0]["message"]["refusal"]
    best = (await running.chat(palette=palette | {"on_floor": "best"}, seed=0)).json()
    assert best["palette"]["realised"]["words"] == longest


async def test_floor_that_no_answer_ever_clears_is_infeasible(running):
    reply = await running.chat(palette={"floors": {"words": 50}})
    assert reply.status_code == 422
    assert "floor" in reply.json()["error"]["message"]


async def test_sampling_that_is_not_covered_is_said(running):
    report = (await running.chat(palette=SHORT, temperature=0.5, stop="x")).json()["palette"]
    assert not report["calibration"]["valid"]
    told = " ".join(report["calibration"]["warnings"])
    assert "temperature" in told
    assert "stop" in told


async def test_temperature_zero_does_not_pretend(running):
    report = (await running.chat(palette=SHORT, temperature=0)).json()["palette"]
    assert report["candidates"] == 1
    assert any("no effect" in warning for warning in report["calibration"]["warnings"])


async def test_default_palette(tmp_path, settings):
    ours = settings.model_copy(update={"default_palette": SHORT})
    async with run_fake(tmp_path, ours) as running:
        assert (await running.chat()).json()["palette"]["targets"] == {"words": 8.0}
        assert "palette" not in (await running.chat(palette=None)).json()


async def test_without_calibration(tmp_path, settings):
    async with run_fake(tmp_path, settings, is_calibrated=False) as running:
        reply = await running.chat(palette=SHORT)
        assert reply.status_code == 422
        assert reply.json()["error"]["code"] == "calibration_missing"
        given = {"targets": {"words": {"multiplier": -1.0}}}
        report = (await running.chat(palette=given)).json()["palette"]
        assert report["multipliers"]["words"] == -1.0
        assert not report["calibration"]["valid"]
        answer = await running.chat(palette=SHORT | {"scope": "answer"})
        assert answer.json()["palette"]["expected"]["words"]["level"] <= 8 + 1e-6
