"""Calibrations of a server that runs: named by requests, changed meanwhile, told to clients."""

from __future__ import annotations

import itertools
import threading

import pytest

from server.app import running_app
from server.backends.base import SamplingSettings
from server.shelf import Shelf, UnknownCalibrationError
from solver import PaletteError
from tests.server.calibrations_made import PALETTE, SUPPORT, asked, hashed, keep, made, shelf_of
from tests.server.conftest import run_fake
from tests.server.fakes import FakeBackend, lexical_rewards

# by name


async def test_request_names_one(tmp_path, settings):
    named = made(2, name="support", temperature=0.7)
    keep(settings, made(1), named)
    async with run_fake(tmp_path, settings, is_calibrated=False) as running:
        told = (await running.chat(palette=PALETTE | {"calibration": "support"})).json()
        assert told["palette"]["calibration"]["id"] == named.id
        assert not told["palette"]["calibration"]["valid"]
        solved = await running.client.post(
            "/v1/palette/solve", json={"palette": PALETTE | {"calibration": "support"}}
        )
        assert solved.json()["calibration"] == named.id
        curve = {
            "values": ["words", "variety"],
            "palette": {"calibration": "support", "candidates": 4},
        }
        traced = await running.client.post("/v1/palette/frontier", json=curve)
        assert traced.json()["calibration"] == named.id
        for scope in ("traffic", "answer"):
            wrong = await running.chat(palette=PALETTE | {"calibration": "x", "scope": scope})
            error = wrong.json()["error"]
            assert (wrong.status_code, error["code"]) == (400, "unknown_calibration")
            assert error["param"] == "palette.calibration"
            assert named.id in error["message"]
        assert running.backend.n_started == 1


async def test_default_palette_that_names_an_unknown_one_stops_the_start(tmp_path, settings):
    keep(settings, made(1, name="support"))
    for name in ("support", "legal"):
        ours = settings.model_copy(update={"default_palette": PALETTE | {"calibration": name}})
        starting = running_app(ours, backend=FakeBackend(), rewards=lexical_rewards(tmp_path))
        if name == "support":
            async with starting:
                continue
        with pytest.raises(PaletteError, match="no calibration 'legal'"):
            async with starting:
                pass


# changes while it serves


def test_replace_is_seen_whole():
    old, other, newer = made(1), made(2, temperature=0.5), made(3)
    shelf = shelf_of(old, other)
    shelf.replace(old.id, newer)
    assert [one.calibration for one in shelf.held] == [newer, other]
    with pytest.raises(UnknownCalibrationError):
        shelf.replace(old.id, newer)


def test_readers_always_see_one_version():
    versions = [made(seed) for seed in range(6)]
    shelf = shelf_of(versions[0], made(9, temperature=0.2))
    ids, wrong, is_done = {one.id for one in versions}, [], threading.Event()

    def read():
        while not is_done.is_set():
            found = shelf.choose(SamplingSettings(), asked())
            if found.id not in ids or len(shelf.held) != 2:
                wrong.append(found.id)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for _ in range(300):
        for old, new in itertools.pairwise([*versions, versions[0]]):
            shelf.replace(old.id, new)
    is_done.set()
    for reader in readers:
        reader.join()
    assert wrong == []
    assert shelf.default is versions[0]


def test_writers_lose_no_change_of_each_other():
    shelf = Shelf()
    ones = [made(seed) for seed in range(60)]
    writers = [
        threading.Thread(target=lambda part=part: [shelf.add(one) for one in part])
        for part in (ones[:20], ones[20:40], ones[40:])
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert {one.calibration.id for one in shelf.held} == {one.id for one in ones}


def test_added_from_the_same_file_takes_its_place(tmp_path):
    shelf = Shelf()
    for seed, name in ((1, "a"), (2, "b"), (3, "a")):
        shelf.add(made(seed), tmp_path / name)
    assert [one.calibration.id for one in shelf.held] == [made(2).id, made(3).id]


# told to clients


async def test_route_lists_them(tmp_path, settings):
    keep(settings, made(1), made(2, name="support", systems={hashed(SUPPORT): 16}))
    async with run_fake(tmp_path, settings, is_calibrated=False) as running:
        listed = (await running.client.get("/v1/palette/calibrations")).json()
    assert [one["id"] for one in listed["calibrations"]] == [made(1).id, made(2).id]
    assert [one["default"] for one in listed["calibrations"]] == [True, False]
    second = listed["calibrations"][1]
    assert second["name"] == "support"
    assert second["systems"] == {hashed(SUPPORT): 16}
    assert (second["prompts"], second["candidates"], second["source"]) == (16, 8, "kept")
    assert str(tmp_path) not in str(listed)


async def test_route_without_any(tmp_path, settings):
    async with run_fake(tmp_path, settings, is_calibrated=False) as running:
        listed = (await running.client.get("/v1/palette/calibrations")).json()
    assert listed == {"calibrations": [], "damaged": []}
