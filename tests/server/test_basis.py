"""Questions about palettes are answered on the calibration that a chat under the same gets."""

from __future__ import annotations

import json

import pytest

from server.settings import load_settings
from solver import Palette, Party, frontier, interference, negotiate, solve, spread
from tests.server.conftest import run_fake
from tests.server.fakes import FakeBackend
from tests.server.test_adapters import Adapted
from tests.server.test_cli_solver import without_time
from tests.server.test_shelf import LEGAL, SUPPORT, asked, hashed, keep, made

PLAIN, WARM = made(1), made(2, temperature=0.7)
SUPPORTING = made(3, systems={hashed(SUPPORT): 16}, name="support")
NARROW, SHARP = made(4, top_p=0.9), made(5, top_k=20)
SHORT = made(6, max_tokens=16, longest_answer_tokens=16, truncated_share=0.5, name="short")
LOUD = made(7, model_fingerprint="1" * 64)
ALL = {one.id: one for one in (PLAIN, WARM, SUPPORTING, NARROW, SHARP, SHORT, LOUD)}

TARGETS, PAIR = {"words": {"gain": 0.2}}, ["words", "variety"]
PARTIES = [{"name": "a", "targets": TARGETS}, {"name": "b", "targets": {"variety": {"gain": 0.3}}}]

# what is said -> the calibration, and words of its warnings
TABLE = [
    ({}, PLAIN, []),
    ({"temperature": 1.0, "top_k": -1}, PLAIN, []),
    ({"temperature": 0.7}, WARM, []),
    ({"temperature": 0.8}, WARM, ["temperature=0.8"]),
    ({"top_p": 0.9}, NARROW, []),
    ({"top_k": 20}, SHARP, []),
    ({"max_tokens": 16}, SHORT, []),
    ({"system": SUPPORT}, SUPPORTING, []),
    ({"system": SUPPORT, "temperature": 0.9}, SUPPORTING, ["temperature=0.9"]),
    ({"system": LEGAL}, PLAIN, ["this system prompt"]),
    ({"calibration": "short"}, SHORT, ["max_tokens=512"]),
    ({"calibration": WARM.id}, WARM, ["temperature=1"]),
    ({"calibration": "support", "system": SUPPORT}, SUPPORTING, []),
    ({"model": "loud"}, LOUD, []),
    ({"model": "loud", "temperature": 0.7}, LOUD, ["temperature=0.7"]),
]
IDS = [",".join(said) or "nothing" for said, *_ in TABLE]


@pytest.fixture
async def running(tmp_path):
    settings = load_settings(state_dir=tmp_path / "state", calibrate_at_start=False)
    keep(settings, *ALL.values())
    async with run_fake(tmp_path, settings, Adapted(), is_calibrated=False) as found:
        yield found


async def chat(running, said):
    body = {key: value for key, value in said.items() if key not in ("system", "calibration")}
    palette = {"targets": TARGETS, "candidates": 4}
    palette |= {key: said[key] for key in ("calibration",) if key in said}
    body = {"model": "fake", "palette": palette} | body
    response = await running.chat(messages=asked(said.get("system")), **body)
    assert response.status_code == 200, response.text
    return response.json()["palette"]["calibration"]


async def get(running, route, said):
    response = await running.client.get(f"/v1/palette/{route}", params=said)
    assert response.status_code == 200, response.text
    return response.json()


async def post(running, route, said, **body):
    response = await running.client.post(f"/v1/palette/{route}", json=body | said)
    assert response.status_code == 200, response.text
    return response.json()


def in_palette(said, **palette):
    """Return what is said with the calibration's name where a palette has it."""
    rest = {key: value for key, value in said.items() if key != "calibration"}
    name = {key: said[key] for key in ("calibration",) if key in said}
    return rest | {"palette": palette | name}


def same(answer, wanted, truth):
    """Compare an answer with the solver's own on this calibration, and with its name."""
    answer = without_time(answer)
    assert answer.pop("calibration") == wanted.id
    answer.pop("calibration_warnings")
    assert answer == json.loads(json.dumps(without_time(truth)))


@pytest.mark.parametrize(("said", "wanted", "warned"), TABLE, ids=IDS)
async def test_every_route_answers_on_the_calibration_of_the_chat(running, said, wanted, warned):
    told = await chat(running, said)
    assert told["id"] == wanted.id
    assert all(words in one for words, one in zip(warned, told["warnings"], strict=True))

    values = await get(running, "values", said)
    assert [one["base"] for one in values["values"]] == pytest.approx(wanted.pilot.base)
    for named in (values, await get(running, "calibration", said)):
        calibration = named["calibration"]
        assert calibration["id"] == wanted.id
        assert (calibration["valid"], calibration["warnings"]) == (not warned, told["warnings"])

    pilot = wanted.pilot
    found = await post(running, "solve", in_palette(said, targets=TARGETS, candidates=4))
    assert found["calibration_warnings"] == told["warnings"]
    assert found["calibration"] == wanted.id
    assert found["expected"] == pytest.approx(
        solve(Palette(TARGETS), pilot, 4).to_dict()["expected"]
    )

    found = await post(running, "frontier", in_palette(said, candidates=4), values=PAIR, points=2)
    assert found["calibration_warnings"] == told["warnings"]
    same(found, wanted, frontier(Palette({}), pilot, PAIR, 4, n_points=2).to_dict())

    found = await post(running, "spread", said, palettes=2)
    assert found["calibration_warnings"] == told["warnings"]
    truth = spread(pilot, 2, 8, max_kl=1.0)
    same(found, wanted, {"palettes": [one.to_dict() for one in truth]})

    found = await post(running, "negotiate", said, parties=PARTIES)
    assert found["calibration_warnings"] == told["warnings"]
    parties = [Party(one["name"], Palette(one["targets"]), 1.0) for one in PARTIES]
    same(found, wanted, negotiate(parties, pilot, 8).to_dict())

    found = await get(running, "interference", said)
    assert found["calibration_warnings"] == told["warnings"]
    same(found, wanted, interference(pilot).to_dict())


async def test_what_live_traffic_shows_against_it_is_told(running):
    running.context.aligner.doubts = lambda calibration: [f"drift in {calibration.id}"]
    told = (await get(running, "values", {}))["calibration"]
    assert (told["valid"], told["warnings"]) == (False, [f"drift in {PLAIN.id}"])
    found = await post(running, "spread", {}, palettes=1)
    assert found["calibration_warnings"] == [f"drift in {PLAIN.id}"]


@pytest.mark.parametrize("route", ["values", "interference", "calibration", "spread", "negotiate"])
@pytest.mark.parametrize(
    ("said", "status", "code", "param"),
    [
        ({"temperature": 3}, 400, "invalid_value", "temperature"),
        ({"top_p": 0}, 400, "invalid_value", "top_p"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"top_k": -2}, 400, "invalid_value", "top_k"),
        ({"heat": 1}, 400, "unknown_parameter", "heat"),
        ({"model": "nobody"}, 404, "model_not_found", "model"),
        ({"calibration": "nothing"}, 400, "unknown_calibration", "palette.calibration"),
    ],
)
async def test_what_makes_no_sense_is_refused(running, route, said, status, code, param):
    if route in ("spread", "negotiate"):
        body = {"palettes": 1} if route == "spread" else {"parties": PARTIES}
        response = await running.client.post(f"/v1/palette/{route}", json=body | said)
    else:
        response = await running.client.get(f"/v1/palette/{route}", params=said)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (code, param)


async def test_a_system_prompt_is_in_no_log(running, caplog):
    with caplog.at_level("DEBUG"):
        await get(running, "values", {"system": "a secret of mine"})
        await post(running, "spread", {"system": "a secret of mine"}, palettes=1)
    ours = [one for one in caplog.records if not one.name.startswith("httpx")]  # the client's own
    assert ours
    assert not any("secret" in one.getMessage() for one in ours)


async def test_without_a_calibration(tmp_path):
    ours = load_settings(state_dir=tmp_path / "state", calibrate_at_start=False)
    async with run_fake(tmp_path, ours, FakeBackend(), is_calibrated=False) as running:
        assert (await get(running, "values", {"temperature": 0.7}))["calibration"] is None
        assert (await get(running, "calibration", {"temperature": 0.7}))["calibration"] is None
        response = await running.client.get("/v1/palette/interference")
        assert response.json()["error"]["code"] == "calibration_missing"
