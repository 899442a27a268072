"""``/v1/palette/...`` and the probes: what they say agrees with calibration, rewards and chat."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest

from rewards import Sample
from solver import Palette, PilotSet, min_candidates, solve
from tests.server.conftest import fake_calibration, run_fake
from tests.server.fakes import FakeBackend

VALUES = ["words", "variety", "log_likelihood"]
SHORT = {"targets": {"words": {"at_most": 8.0}}, "candidates": 16}
USER = [{"role": "user", "content": "Tell me more."}]


async def solved(running, **palette):
    return await running.client.post("/v1/palette/solve", json={"palette": palette})


# values


async def test_values_and_what_the_calibration_knows_of_them(running):
    body = (await running.client.get("/v1/palette/values")).json()
    pilot = fake_calibration().pilot
    assert [value["name"] for value in body["values"]] == VALUES
    assert [value["unit"] for value in body["values"]] == ["words", "ratio", "nats per token"]
    rewards = pilot.rewards.reshape(-1, 3)
    correlation = within_prompt_correlation(pilot.rewards)
    for i, value in enumerate(body["values"]):
        assert value["base"] == pytest.approx(rewards[:, i].mean())
        assert value["within_std"] == pytest.approx(
            np.sqrt(pilot.rewards[:, :, i].var(axis=1).mean())
        )
        assert value["quantiles"]["0.75"] == pytest.approx(
            np.quantile(pilot.rewards[:, :, i], 0.75, axis=1).mean()
        )
        levels = list(value["quantiles"].values())
        assert levels == sorted(levels)
        assert set(value["correlations"]) == {*VALUES} - {value["name"]}
        for j, other in enumerate(VALUES):
            if j != i:
                assert value["correlations"][other] == pytest.approx(correlation[i, j])


def within_prompt_correlation(rewards):
    centred = (rewards - rewards.mean(axis=1, keepdims=True)).reshape(-1, rewards.shape[2])
    return np.corrcoef(centred.T)


async def test_values_name_the_calibration(running):
    known = (await running.client.get("/v1/palette/values")).json()["calibration"]
    calibration = fake_calibration()
    assert known["id"] == calibration.id
    assert (known["prompts"], known["candidates"]) == (200, 32)
    assert known["temperature"] == 1.0
    assert known["model_fingerprint"] == running.backend.fingerprint
    assert known["rewards_fingerprint"] == running.context.aligner.rewards.fingerprint


async def test_values_without_calibration(tmp_path, settings):
    async with run_fake(tmp_path, settings, is_calibrated=False) as running:
        body = (await running.client.get("/v1/palette/values")).json()
    assert body["calibration"] is None
    assert [set(value) for value in body["values"]] == [{"name", "description", "unit"}] * 3


# solve


async def test_solve_gives_what_the_solver_gives(running):
    body = (await solved(running, **SHORT)).json()
    pilot = fake_calibration().pilot
    palette = Palette(SHORT["targets"])
    expected = solve(palette, pilot, 16).to_dict()
    assert body["status"] == "optimal"
    for name in ("values", "targets", "candidates", "certificate", "fraction", "base"):
        assert body[name] == expected[name]
    assert body["multipliers"] == pytest.approx(expected["multipliers"], rel=1e-6)
    assert body["expected"] == pytest.approx(expected["expected"], rel=1e-6)
    assert body["min_candidates"] == min_candidates(palette, pilot)
    assert body["calibration"] == fake_calibration().id
    assert body["kkt_residual"] <= 1e-8
    assert body["repaired"] is None


async def test_solve_has_every_field_of_the_command_line(running):
    assert {
        "status", "values", "targets", "multipliers", "expected", "stderr", "base", "ess", "kl",
        "candidates", "min_candidates", "certificate", "repaired", "kkt_residual", "solve_ms",
    } <= set((await solved(running, **SHORT)).json())  # fmt: skip


@pytest.mark.parametrize(
    "palette",
    [
        SHORT,
        {"targets": {"words": {"quantile": 0.6}, "variety": "keep"}, "candidates": 8},
        {"targets": {"words": {"between": [12, 13]}}, "candidates": "auto"},
        {"targets": {"words": {"at_least": 18.5}}, "candidates": 4, "on_infeasible": "repair"},
        {"targets": {"words": {"at_least": 30}}, "candidates": 4, "on_infeasible": "best_effort"},
        {"targets": {"words": {"at_least": 16}}, "max_kl": 0.1},
        {"targets": {"variety": {"multiplier": 2.0}}},
    ],
    ids=["at_most", "quantile", "auto", "repair", "best_effort", "max_kl", "multiplier"],
)
async def test_solve_promises_what_chat_promises(running, palette):
    alone = (await solved(running, **palette)).json()
    report = (await running.chat(palette=palette, seed=1)).json()["palette"]
    assert alone["multipliers"] == pytest.approx(report["multipliers"])
    assert alone["targets"] == report["targets"]
    levels = {name: level["level"] for name, level in report["expected"].items()}
    assert alone["expected"] == pytest.approx(levels)
    assert alone["candidates"] == report["candidates"]
    assert alone["repaired"] == report["repair"]
    assert (
        alone["limited_by"] == report["limited_by"] == ("max_kl" if "max_kl" in palette else None)
    )
    if alone["repaired"] is None:
        # A palette that its budget keeps from being met is not called met.
        told = "best_effort" if "max_kl" in palette else "met"
        assert (alone["status"], report["status"]) == ("optimal", told)
    else:
        assert (
            alone["status"]
            == report["status"]
            == palette["on_infeasible"].replace("repair", "repaired")
        )


async def test_solve_of_a_repaired_palette_tells_how_many_would_do(running):
    asked = {"targets": {"words": {"at_least": 18.5}}, "candidates": 4}
    error = (await solved(running, **asked)).json()["error"]
    body = (await solved(running, **asked, on_infeasible="repair")).json()
    assert body["repaired"]["asked"]["targets"] == asked["targets"]
    assert body["expected"]["words"] == pytest.approx(body["targets"]["words"], abs=1e-4)
    assert body["targets"]["words"] < 18.5
    assert error["palette"]["min_candidates"] > 4


async def test_solve_infeasible(running):
    reply = await solved(running, targets={"words": {"at_least": 30}}, candidates=4)
    error = reply.json()["error"]
    assert reply.status_code == 422
    assert (error["code"], error["param"]) == ("palette_infeasible", "palette.targets")
    assert error["palette"]["certificate"]["asked"] > error["palette"]["certificate"]["limit"]
    assert error["palette"]["min_candidates"] is None


async def test_solve_counts_the_fewest_candidates(running):
    targets = {"words": {"at_least": 17}}
    fewest = (await solved(running, targets=targets, candidates=32)).json()["min_candidates"]
    assert (await solved(running, targets=targets, candidates=fewest)).status_code == 200
    assert (await solved(running, targets=targets, candidates=fewest - 1)).status_code == 422


async def test_solve_generates_nothing(running):
    await solved(running, **SHORT)
    assert running.backend.n_started == 0


async def test_solve_refuses_scope_answer(running):
    reply = await solved(running, **SHORT, scope="answer")
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "palette.scope"


async def test_solve_without_calibration(tmp_path, settings):
    async with run_fake(tmp_path, settings, is_calibrated=False) as running:
        reply = await solved(running, **SHORT)
    assert reply.status_code == 422
    assert reply.json()["error"]["code"] == "calibration_missing"


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_required_parameter", "palette"),
        ({"palette": None}, "invalid_value", "palette"),
        ({"palette": {"targets": {"wrods": "keep"}}}, "unknown_value", "palette.targets.wrods"),
        ({"palette": {"candidates": 64}}, "invalid_palette", "palette.candidates"),
        ({"palette": {"max_kl": 0}}, "invalid_value", "palette.max_kl"),
        ({"palette": {"repair": {"method": "luck"}}}, "invalid_value", "palette.repair.method"),
        ({"palette": {}, "user": "me"}, "unknown_parameter", "user"),
        (
            {"palette": {"targets": {"words": {"at_least": 30}}, "on_infeasible": "repair",
                         "repair": {"method": "greedy", "priorities": ["wrods"]}}},
            "unknown_value", "palette.repair.priorities",
        ),
    ],
)  # fmt: skip
async def test_solve_bad_input(running, body, code, param):
    reply = await running.client.post("/v1/palette/solve", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (400, code, param)


# score


async def test_score_is_the_rewards(running):
    answers = ["one two three", "one one one one", ""]
    reply = await running.client.post(
        "/v1/palette/score", json={"messages": USER, "answers": answers}
    )
    rows = [[row[name] for name in ("words", "variety")] for row in reply.json()["rewards"]]
    samples = [Sample(messages=tuple(USER), answer=answer) for answer in answers]
    suite = running.context.aligner.rewards
    np.testing.assert_array_equal(rows, await suite.score(samples, ("words", "variety")))
    assert rows == [[3, 1], [4, 0.25], [0, 0]]


async def test_score_names_what_foreign_texts_do_not_have(running):
    body = {"messages": USER, "answers": ["a"]}
    reply = (await running.client.post("/v1/palette/score", json=body)).json()
    assert reply["skipped"] == ["log_likelihood"]
    assert set(reply["rewards"][0]) == {"words", "variety"}


async def test_score_takes_content_parts(running):
    parts = [{"type": "text", "text": "Tell "}, {"type": "text", "text": "me."}]
    body = {
        "messages": [{"role": "developer", "content": "Be brief."}, USER[0] | {"content": parts}],
        "answers": ["a b"],
    }
    reply = await running.client.post("/v1/palette/score", json=body)
    assert reply.json()["rewards"][0]["words"] == 2


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": USER}, "answers"),
        ({"messages": USER, "answers": []}, "answers"),
        ({"messages": USER, "answers": ["a"] * 1025}, "answers"),
        ({"messages": USER, "answers": "a"}, "answers"),
        ({"messages": USER, "answers": [1]}, "answers[0]"),
        ({"messages": [], "answers": ["a"]}, "messages"),
        ({"messages": [{"role": "user"}], "answers": ["a"]}, "messages[0].content"),
        ({"messages": USER, "answers": ["a"], "values": ["words"]}, "values"),
    ],
)
async def test_score_bad_input(running, body, param):
    reply = await running.client.post("/v1/palette/score", json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


# probes and pages


async def test_health(running):
    reply = await running.client.get("/health")
    assert (reply.status_code, reply.json()) == (200, {"status": "ok"})


async def test_ready(running):
    reply = await running.client.get("/ready")
    body = reply.json()
    assert reply.status_code == 200
    assert body["status"] == "ready"
    assert set(body["rewards"]) == {"words", "variety", "fluency"}
    assert body["calibration"]["id"] == fake_calibration().id
    assert body["calibration"]["background"]["state"] == "none"
    assert (body["running"], body["waiting"]) == (0, 0)


async def test_not_ready_says_who_is_not(running):
    running.backend.is_up = False
    reply = await running.client.get("/ready")
    assert reply.status_code == 503
    assert reply.json()["status"] == "not ready"
    assert reply.json()["backend"]["state"] == "stopped"
    assert (await running.client.get("/health")).status_code == 200


async def test_not_ready_with_a_failing_reward(running, monkeypatch):
    health = {
        "words": {"state": "failing", "persists": True},
        "variety": {"state": "ok", "persists": False},
    }
    monkeypatch.setattr(running.context.aligner.rewards, "health", lambda: health)
    reply = await running.client.get("/ready")
    assert reply.status_code == 503
    assert reply.json()["rewards"] == health


async def test_version(running):
    body = (await running.client.get("/version")).json()
    assert body["version"] == version("palette-server")
    assert body["model"] == "fake"
    assert body["model_fingerprint"] == running.backend.fingerprint
    assert body["rewards_fingerprint"] == running.context.aligner.rewards.fingerprint
    assert {"fastapi", "numpy", "scipy"} <= set(body)


async def test_docs_load(running):
    reply = await running.client.get("/docs")
    assert reply.status_code == 200
    assert "openapi.json" in reply.text


async def test_openapi_describes_the_routes_and_the_palette(running):
    schema = (await running.client.get("/openapi.json")).json()
    paths = set(schema["paths"])
    assert {
        "/v1/chat/completions", "/v1/models", "/v1/palette/values", "/v1/palette/solve",
        "/v1/palette/score", "/health", "/ready", "/version",
    } <= paths  # fmt: skip
    options = schema["components"]["schemas"]["PaletteOptions"]["properties"]
    assert {"targets", "candidates", "scope", "on_infeasible", "floors", "report"} <= set(options)


async def test_models(running):
    listed = (await running.client.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["fake"]
    one = (await running.client.get("/v1/models/fake")).json()
    assert one == listed["data"][0]
    assert one["max_model_len"] == FakeBackend().max_context


async def test_a_calibration_with_few_candidates_sets_the_default(tmp_path, settings):
    async with run_fake(tmp_path, settings, is_calibrated=False) as running:
        whole = fake_calibration()
        few = PilotSet(whole.pilot.rewards[:, :8], whole.pilot.values)
        running.context.aligner.calibration = replace(whole, pilot=few)
        targets = {"targets": {"words": "keep"}}
        body = (await running.chat(palette=targets)).json()
        assert body["palette"]["candidates"] == 8 < settings.candidates
        body = (await running.chat(palette={**targets, "candidates": 4})).json()
        assert body["palette"]["candidates"] == 4
        reply = await running.chat(palette={**targets, "candidates": 16})
        assert reply.status_code == 400
        assert "8" in reply.json()["error"]["message"]
        ask = {"values": ["words", "variety"], "palette": {}, "points": 3}
        curve = (await running.client.post("/v1/palette/frontier", json=ask)).json()
        assert curve["candidates"] == 8
