"""Frontier, spread, negotiate and interference over HTTP: the solver's own results, and errors."""

from __future__ import annotations

import json

import pytest

from solver import Palette, Party, frontier, interference, negotiate, prices, spread
from tests.server.conftest import fake_calibration, run_fake
from tests.server.test_cli_solver import without_time

PAIR = ["variety", "log_likelihood"]
ROUTES = {
    "frontier": {"values": PAIR},
    "spread": {"palettes": 2},
    "negotiate": {"parties": [{"name": "a", "targets": {"words": {"gain": 0.2}}}]},
}


async def post(running, route, **body):
    return await running.client.post(f"/v1/palette/{route}", json=body)


def same(response, wanted):
    assert response.status_code == 200, response.text
    body = without_time(response.json())
    assert body.pop("calibration") == fake_calibration().id
    assert body.pop("calibration_warnings") == []
    assert body == json.loads(json.dumps(without_time(wanted)))


async def test_frontier(running):
    palette = {"targets": {"words": {"at_most": 11}}, "candidates": 8, "max_kl": 0.5}
    response = await post(running, "frontier", values=PAIR, palette=palette, points=3)
    pilot = fake_calibration().pilot
    truth = frontier(Palette(palette["targets"]), pilot, PAIR, 8, n_points=3, max_kl=0.5)
    same(response, truth.to_dict())
    assert response.json()["solve_ms"] > 0


async def test_a_frontier_point_can_be_served(running):
    palette = {"candidates": 8, "max_kl": 0.5}
    curve = (await post(running, "frontier", values=PAIR, palette=palette, points=3)).json()
    point = curve["points"][1]
    solved = await post(running, "solve", palette={**point["palette"], "candidates": 8})
    assert solved.status_code == 200, solved.text
    assert solved.json()["expected"] == pytest.approx(point["solution"]["expected"], abs=1e-6)


async def test_frontier_of_a_value_wanted_low(running):
    pair, senses = ["words", "log_likelihood"], {"words": "less"}
    response = await post(running, "frontier", values=pair, senses=senses, points=3)
    truth = frontier(Palette({}), fake_calibration().pilot, pair, 16, n_points=3, senses=senses)
    same(response, truth.to_dict())
    points = response.json()["points"]
    assert points[-1]["limit"]["words"] < points[0]["limit"]["words"]


async def test_frontier_of_a_palette_out_of_reach(running):
    palette = {"targets": {"words": {"gain": 9}}}
    response = await post(running, "frontier", values=PAIR, palette=palette)
    assert response.status_code == 422
    error = response.json()["error"]
    assert error["code"] == "palette_infeasible"
    assert "no choice among 16 candidates" in error["message"]
    assert error["palette"]["certificate"]["asked"] > error["palette"]["certificate"]["limit"]


async def test_spread(running):
    response = await post(running, "spread", palettes=3, candidates=8, max_kl=0.4)
    truth = spread(fake_calibration().pilot, 3, 8, max_kl=0.4)
    same(response, {"palettes": [one.to_dict() for one in truth]})
    chat = await running.chat(palette={**truth[0].to_dict()["palette"], "candidates": 8}, seed=1)
    assert chat.json()["palette"]["status"] == "met"


async def test_negotiate(running):
    parties = [
        {"name": "brief", "targets": {"words": {"gain": -1.5}}, "weight": 2},
        {"name": "long", "targets": {"words": {"gain": 1}, "variety": "keep"}},
    ]
    parties[0]["targets"]["words"] = {"at_most": 6}
    response = await post(running, "negotiate", parties=parties, candidates=8)
    truth = negotiate(
        [Party(p["name"], Palette(p["targets"]), p.get("weight", 1)) for p in parties],
        fake_calibration().pilot,
        8,
    )
    same(response, truth.to_dict())


async def test_interference(running):
    response = await running.client.get("/v1/palette/interference")
    same(response, interference(fake_calibration().pilot).to_dict())


async def test_solve_has_prices(running):
    targets = {"variety": {"gain": 0.3}}
    response = await post(running, "solve", palette={"targets": targets, "candidates": 8})
    found = response.json()["prices"]
    truth = prices(Palette(targets), fake_calibration().pilot, 8).to_dict()
    del truth["solution"]
    assert found == json.loads(json.dumps(truth))


@pytest.mark.parametrize("route", ROUTES)
async def test_without_a_calibration(tmp_path, settings, route):
    async with run_fake(tmp_path, settings, is_calibrated=False) as running:
        response = await post(running, route, **ROUTES[route])
        assert response.status_code == 422
        assert response.json()["error"]["code"] == "calibration_missing"


@pytest.mark.parametrize(
    ("route", "change", "param"),
    [
        ("frontier", {"values": ["words"]}, "values[1]"),
        ("frontier", {"values": ["words", "humour"]}, "palette.values"),
        ("frontier", {"values": ["words", "words"]}, "palette.values"),
        ("frontier", {"points": 1}, "points"),
        ("frontier", {"palette": {"candidates": 65}}, "palette.candidates"),
        ("frontier", {"palette": {"candidates": "auto"}}, "palette.candidates"),
        ("frontier", {"palette": {"scope": "answer"}}, "palette.candidates"),
        ("frontier", {"senses": {"words": "less"}}, "palette.senses"),
        ("spread", {"values": ["humour"]}, "palette.values"),
        ("spread", {"candidates": 0}, "candidates"),
        ("spread", {"palettes": 0}, "palettes"),
        ("negotiate", {"parties": []}, "parties"),
        ("negotiate", {"candidates": 40}, "palette.candidates"),
    ],
)
async def test_bad_requests_name_the_field(running, route, change, param):
    response = await post(running, route, **(ROUTES[route] | change))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


async def test_a_wrong_party_is_named(running):
    parties = [
        {"name": "a", "targets": {"words": "keep"}},
        {"name": "b", "targets": {"humour": "keep"}},
    ]
    error = (await post(running, "negotiate", parties=parties)).json()["error"]
    assert error["code"] == "unknown_value"
    assert "humour" in error["message"]
    assert "parties[1]" in error["param"]
