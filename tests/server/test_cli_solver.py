"""The commands on a pilot file, and the prices that `palette solve` prints."""

from __future__ import annotations

import json

import numpy as np
import pytest

from solver import (
    Palette,
    Party,
    PilotSet,
    frontier,
    interference,
    negotiate,
    prices,
    solve,
    spread,
)
from tests.server.commands import BAD_USAGE, DONE, INFEASIBLE, one_line, palette
from tests.solver.problems import gaussian_pilot


@pytest.fixture
def pilot_file(tmp_path):
    path = tmp_path / "pilot.npz"
    gaussian_pilot(0).save(path)
    return path


def printed(*arguments, code=DONE):
    result = palette(*arguments)
    assert result.exit_code == code, result.output
    return result.stdout


def as_json(*arguments, code=DONE):
    return json.loads(printed(*arguments, "--json", code=code))


def without_time(result):
    """Solutions carry how long they took; all else must be equal."""
    if isinstance(result, dict):
        return {key: without_time(one) for key, one in result.items() if key != "solve_ms"}
    return [without_time(one) for one in result] if isinstance(result, list | tuple) else result


def same(found, wanted):
    assert without_time(found) == json.loads(json.dumps(without_time(wanted)))


def test_solve_prints_prices(pilot_file):
    targets = {"v0": {"gain": 0.4}, "v1": "keep"}
    options = ("--pilot", pilot_file, "--targets", json.dumps(targets), "--candidates", 8)
    found = as_json("solve", *options)["prices"]
    truth = prices(Palette(targets), PilotSet.load(pilot_file), 8)
    assert found["binding"] == list(truth.binding)
    np.testing.assert_allclose(found["multiplier_stderr"]["v0"], truth.multiplier_stderr[0])
    text = printed("solve", *options)
    assert f"{truth.multiplier_stderr[0]:.4g}" in text
    assert f"one more unit of v0 moves v1 {truth.level_slopes[1, 0]:+.3g}" in text


def test_ridge_and_floors(pilot_file):
    pilot = PilotSet.load(pilot_file)
    targets = {"v0": {"gain": 0.4}}
    options = ("--pilot", pilot_file, "--targets", json.dumps(targets), "--candidates", 8)
    soft = as_json("solve", *options, "--ridge", 0.5)
    truth = solve(Palette(targets), pilot, 8, ridge=0.5)
    assert soft["multipliers"]["v0"] == pytest.approx(truth.multipliers[0])
    floored = as_json("solve", *options, "--floors", '{"v1": 0.5}')
    truth = solve(Palette(targets, {"v1": 0.5}), pilot, 8)
    assert floored["refused"] == pytest.approx(truth.refused)
    assert truth.refused > 0
    one_line(palette("solve", *options, "--floors", '{"v9": 0.5}'), BAD_USAGE, "v9")
    one_line(palette("solve", *options, "--ridge", "-1"), BAD_USAGE, "ridge")


def test_no_prices_of_what_cannot_be_had(pilot_file):
    options = ("--pilot", pilot_file, "--targets", '{"v0": {"gain": 9}}')
    assert as_json("solve", *options, code=INFEASIBLE)["prices"] is None
    mended = as_json("solve", *options, "--on-infeasible", "repair")
    assert mended["prices"]["binding"] == ["v0"]


@pytest.mark.parametrize("max_kl", [None, 0.5])
def test_frontier(pilot_file, max_kl):
    budget = () if max_kl is None else ("--max-kl", max_kl)
    options = (
        "--pilot",
        pilot_file,
        "--values",
        "v0,v2",
        "--candidates",
        8,
        "--points",
        4,
        *budget,
    )
    truth = frontier(
        Palette({"v1": "keep"}), PilotSet.load(pilot_file), ("v0", "v2"), 8,
        n_points=4, max_kl=max_kl,
    )  # fmt: skip
    same(as_json("frontier", *options, "--targets", '{"v1": "keep"}'), truth.to_dict())
    text = printed("frontier", *options, "--targets", '{"v1": "keep"}')
    assert len(truth.points) == 4
    for point in truth.points:
        assert f"{point.limit['v0']:.4g}" in text
    assert ("unbounded" in text) == (max_kl is None)


def test_frontier_of_a_value_wanted_low(pilot_file):
    options = ("--pilot", pilot_file, "--values", "v0,v2", "--points", 3, "--less", "v2")
    points = as_json("frontier", *options)["points"]
    assert points[0]["limit"]["v2"] < points[-1]["limit"]["v2"]


def test_frontier_without_room_for_the_others(pilot_file):
    options = ("--pilot", pilot_file, "--values", "v0,v2", "--targets", '{"v1": {"gain": 9}}')
    assert as_json("frontier", *options, code=INFEASIBLE)["points"] == []
    assert "no choice among 16 candidates" in printed("frontier", *options, code=INFEASIBLE)


def test_spread(pilot_file):
    options = ("--pilot", pilot_file, "--palettes", 4, "--values", "v0,v2", "--max-kl", 0.4)
    truth = spread(PilotSet.load(pilot_file), 4, values=["v0", "v2"], max_kl=0.4)
    found = as_json("spread", *options)
    same(found["palettes"], [one.to_dict() for one in truth])
    text = printed("spread", *options)
    assert all(one.name in text for one in truth)


def test_the_limits_themselves(pilot_file):
    found = as_json("spread", "--pilot", pilot_file, "--palettes", 1, "--max-kl", "inf")
    assert found["palettes"][0]["solution"]["kl"] > 1.0


PARTIES = [
    {"name": "parents", "targets": {"v0": {"gain": 1.5}}, "weight": 2},
    {"name": "pupils", "targets": {"v2": {"gain": 2}, "v1": "keep"}, "floors": {"v1": -9}},
]


def test_negotiate(pilot_file, tmp_path):
    parties = tmp_path / "parties.json"
    parties.write_text(json.dumps(PARTIES))
    options = ("--pilot", pilot_file, "--parties", parties, "--candidates", 8)
    truth = negotiate(
        [
            Party(one["name"], Palette(one["targets"], one.get("floors", {})), one.get("weight", 1))
            for one in PARTIES
        ],
        PilotSet.load(pilot_file),
        8,
    )
    same(as_json("negotiate", *options), truth.to_dict())
    text = printed("negotiate", *options)
    for name in ("parents", "pupils"):
        assert f"{100 * truth.satisfaction[name]:.1f} %" in text
    assert truth.limits in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ("cannot be read", "parents")),
        ('{"name": "a"}', ("not a list",)),
        ('[{"name": "a"}]', ("party 0", "targets missing")),
        ('[{"name": "a", "targets": {}, "wish": 1}]', ("unknown key 'wish'",)),
        ('[{"name": "a", "targets": {"kind": "keep"}}]', ("kind",)),
        ("[]", ("part",)),
    ],
)
def test_parties_that_cannot_be_used(pilot_file, tmp_path, content, words):
    parties = tmp_path / "parties.json"
    parties.write_text(content)
    result = palette("negotiate", "--pilot", pilot_file, "--parties", parties)
    one_line(result, BAD_USAGE, *words)


def test_interference(pilot_file):
    truth = interference(PilotSet.load(pilot_file))
    same(as_json("interference", "--pilot", pilot_file), truth.to_dict())
    text = printed("interference", "--pilot", pilot_file)
    assert f"{truth.inflation[1]:.4g}" in text
    assert f"{truth.correlation[1, 0]:.4g}" in text
    assert "nearly collinear" in text


def test_collinear_values_are_told_in_words(tmp_path):
    pilot = gaussian_pilot(1)
    twice = np.concatenate([pilot.rewards, pilot.rewards[..., :1]], axis=-1)
    PilotSet(twice, ("a", "b", "c", "a2")).save(tmp_path / "twice.npz")
    text = printed("interference", "--pilot", tmp_path / "twice.npz")
    assert "a and a2 move together" in text


@pytest.mark.parametrize(
    ("command", "option", "words"),
    [
        ("frontier", ("--values", "v0"), ("values",)),
        ("frontier", ("--values", "v0,humor"), ("humor",)),
        ("frontier", ("--values", "v0,v1", "--candidates", "many"), ("--candidates",)),
        ("frontier", ("--values", "v0,v1", "--candidates", "99"), ("99",)),
        ("spread", ("--values", "v0,humor"), ("humor",)),
        ("spread", ("--max-kl", "-1"), ("max_kl",)),
    ],
)
def test_mistakes_are_told_in_one_line(pilot_file, command, option, words):
    one_line(palette(command, "--pilot", pilot_file, *option), BAD_USAGE, *words)
