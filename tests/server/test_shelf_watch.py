"""Calibrations that come and go while the server serves."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from server.backends.base import SamplingSettings
from server.calibration import CalibrationError, folder_of
from server.live.track import Track
from server.settings import load_settings
from server.shelf import Shelf
from solver import PilotSet
from tests.server.calibrations_made import PALETTE, asked, found, load, made
from tests.server.conftest import chat_body, fake_calibration, run_fake
from tests.server.test_adapters import Adapted
from tests.server.waiting import until

A, B = made(1), made(2, temperature=0.7)


@pytest.fixture
def folder(tmp_path):
    kept = folder_of(tmp_path / "state")
    A.save(kept / "a.npz")
    return kept


@pytest.fixture
def settings(tmp_path):
    return load_settings(state_dir=tmp_path / "state", calibrate_at_start=False)


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr("server.shelf_watch._EVERY_S", 0.01)


def torn(path, calibration=B):
    """Write the first half of a calibration, as a copy that is being made."""
    calibration.save(path.with_suffix(".whole"))
    content = path.with_suffix(".whole").read_bytes()
    path.with_suffix(".whole").unlink()
    path.write_bytes(content[: len(content) // 2])


# one shelf


def test_nothing_new(tmp_path, folder):
    shelf = load(tmp_path)
    held = shelf.held
    assert not shelf.reread()
    assert shelf.held is held


def test_one_that_is_added(tmp_path, folder):
    shelf = load(tmp_path)
    B.save(folder / "b.npz")
    assert shelf.reread()
    assert found(shelf) == {(A.id, "kept"), (B.id, "kept")}
    assert shelf.choose(SamplingSettings(temperature=0.7), asked()).id == B.id
    assert not shelf.reread()


def test_one_in_a_folder_that_was_not_there(tmp_path):
    shelf = load(tmp_path)
    assert not shelf.reread()
    A.save(folder_of(tmp_path / "state") / "a.npz")
    assert shelf.reread()
    assert shelf.default.id == A.id


def test_one_that_is_deleted(tmp_path, folder, caplog):
    B.save(folder / "b.npz")
    shelf = load(tmp_path)
    (folder / "b.npz").unlink()
    assert shelf.reread()
    assert found(shelf) == {(A.id, "kept")}
    (folder / "a.npz").unlink()
    assert "no calibration left" not in caplog.text
    assert shelf.reread()
    assert shelf.held == ()
    assert shelf.default is None
    assert "there is no calibration left" in caplog.text


def test_one_in_the_place_of_another(tmp_path, folder):
    B.save(folder / "b.npz")
    shelf = load(tmp_path)
    made(3).save(folder / "a.npz")
    assert shelf.reread()
    assert [one.calibration.id for one in shelf.held] == [made(3).id, B.id]


def test_the_same_one_written_again_keeps_the_version_that_is_served(tmp_path, folder):
    shelf = load(tmp_path)
    newer = replace(shelf.default, version=3, root=shelf.default)
    shelf.replace(A.id, newer)
    A.save(folder / "a.npz")
    assert shelf.reread()
    assert shelf.default is newer
    shelf.add(A, folder / "a.npz")
    assert shelf.default is newer


def test_the_same_one_under_another_name_can_be_asked_for_by_it(tmp_path, folder):
    shelf = load(tmp_path)
    named = made(1, name="support")
    assert named.id == A.id
    named.save(folder / "a.npz")
    assert shelf.reread()
    assert shelf.choose(SamplingSettings(), asked(), "support").id == A.id
    assert len(shelf.held) == 1


def test_one_that_is_renamed_stays(tmp_path, folder):
    shelf = load(tmp_path)
    (folder / "a.npz").rename(folder / "b.npz")
    assert shelf.reread()
    assert [(one.calibration.id, one.path.name) for one in shelf.held] == [(A.id, "b.npz")]


def test_a_torn_one_changes_nothing_until_it_is_whole(tmp_path, folder, caplog):
    shelf = load(tmp_path)
    for name in ("a.npz", "new.npz"):
        torn(folder / name)
        assert shelf.reread()
        assert found(shelf) == {(A.id, "kept")}
        assert shelf.damaged[-1].path.name == name
    assert caplog.text.count("what it held before is served with") == 1
    assert caplog.text.count("it is passed over") == 1
    torn(folder / "a.npz", made(3))  # more of it, and not all: told once
    assert shelf.reread()
    assert caplog.text.count("what it held before is served with") == 1
    B.save(folder / "a.npz")
    made(3).save(folder / "new.npz")
    assert shelf.reread()
    assert found(shelf) == {(B.id, "kept"), (made(3).id, "kept")}
    assert shelf.damaged == ()


def test_a_torn_one_that_is_deleted_is_told_no_more(tmp_path, folder):
    shelf = load(tmp_path)
    torn(folder / "new.npz")
    shelf.reread()
    (folder / "new.npz").unlink()
    shelf.reread()
    assert shelf.damaged == ()
    assert found(shelf) == {(A.id, "kept")}


@pytest.mark.parametrize(
    "other", [{"model_fingerprint": "0" * 64}, {"rewards_fingerprint": "0" * 64}]
)
def test_one_that_does_not_fit_is_no_replacement(tmp_path, folder, caplog, other):
    shelf = load(tmp_path)
    made(3, **other).save(folder / "new.npz")
    assert shelf.reread()
    assert not caplog.records  # the folder is for all models
    made(4, **other).save(folder / "a.npz")
    assert shelf.reread()
    assert found(shelf) == {(A.id, "kept")}
    assert "a.npz is now of another model or other rewards" in caplog.text


def test_one_that_cannot_be_aligned_is_no_replacement(tmp_path, folder, caplog):
    def align(calibration):
        if calibration.id == B.id:
            raise CalibrationError("it has no length")
        return calibration

    shelf = load(tmp_path, align=align)
    B.save(folder / "a.npz")
    assert shelf.reread()
    assert found(shelf) == {(A.id, "kept")}
    assert "it has no length; what it held before is served with" in caplog.text


def test_what_the_operator_named_is_followed_and_not_let_go(tmp_path, folder, caplog):
    path = tmp_path / "named.npz"
    made(3).save(path)
    shelf = load(tmp_path, path)
    made(4, model_fingerprint="0" * 64).save(path)  # it may be of another model
    assert shelf.reread()
    assert found(shelf) == {(A.id, "kept"), (made(4).id, "named")}
    for spoil, told in (
        (lambda: made(5, values=("words",)).save(path), "is about the values words;"),
        (lambda: torn(path), "cut short"),
        (path.unlink, "named.npz is deleted"),
    ):
        spoil()
        assert shelf.reread()
        assert found(shelf) == {(A.id, "kept"), (made(4).id, "named")}
        assert told in caplog.text
    made(6).save(path)
    assert shelf.reread()
    assert found(shelf) == {(A.id, "kept"), (made(6).id, "named")}


@pytest.mark.parametrize("way", ["itself", "link"])
def test_what_the_operator_named_is_not_there_twice(tmp_path, folder, way):
    path = folder / "a.npz"
    if way == "link":
        path = tmp_path / "link.npz"
        path.symlink_to(folder / "a.npz")
    shelf = load(tmp_path, path)
    assert found(shelf) == {(A.id, "named")}
    made(3).save(folder / "a.npz")
    assert shelf.reread()
    assert found(shelf) == {(made(3).id, "named")}


def test_a_folder_that_cannot_be_read_changes_nothing(tmp_path, folder, caplog):
    shelf = load(tmp_path)
    folder.rename(tmp_path / "away")
    for _ in range(2):
        assert not shelf.reread()
    assert found(shelf) == {(A.id, "kept")}
    assert caplog.text.count("served with as they were read") == 1
    (tmp_path / "away").rename(folder)
    assert not shelf.reread()
    B.save(folder / "b.npz")
    assert shelf.reread()
    assert len(shelf.held) == 2


def test_what_fails_is_taken_in_later(tmp_path, folder):
    shelf = load(tmp_path)
    B.save(folder / "b.npz")
    with pytest.raises(ZeroDivisionError):
        shelf.reread(lambda calibration: 1 // 0)
    assert found(shelf) == {(A.id, "kept")}
    assert shelf.reread()
    assert found(shelf) == {(A.id, "kept"), (B.id, "kept")}


def test_readers_see_a_change_whole(tmp_path, folder):
    """One comes, one goes, one is replaced: there is nothing in between to be seen."""
    B.save(folder / "b.npz")
    shelf, states = load(tmp_path), []

    class Seen(Shelf):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            states.append({one.calibration.id for one in self.held})

    shelf.__class__ = Seen
    (folder / "a.npz").unlink()
    made(3).save(folder / "b.npz")
    made(4).save(folder / "c.npz")
    assert shelf.reread()
    assert states[-1] == {made(3).id, made(4).id}
    assert {A.id, B.id} not in states[states.index(states[-1]) :]
    assert all(state in ({A.id, B.id}, states[-1]) for state in states)


# the server


async def listed(running, **query):
    told = (await running.client.get("/v1/palette/calibrations", params=query)).json()
    return [one["id"] for one in told["calibrations"]], told["damaged"]


async def comes(running, ids, damaged=(), **query):
    """Return once the server lists these calibrations and these damaged files."""
    async with asyncio.timeout(20):
        while await listed(running, **query) != ([*ids], [*damaged]):  # noqa: ASYNC110  # as `until`
            await asyncio.sleep(0.005)


async def test_the_server_sees_what_comes_and_goes(tmp_path, settings, folder, soon):
    async with run_fake(tmp_path, settings, is_calibrated=False) as running:
        assert await listed(running) == ([A.id], [])
        B.save(folder / "b.npz")
        await comes(running, [A.id, B.id])
        report = (await running.chat(palette=PALETTE, temperature=0.7)).json()["palette"]
        assert report["calibration"]["id"] == B.id
        assert report["calibration"]["valid"]
        told = (await running.client.get("/v1/palette/calibrations")).json()["calibrations"]
        assert [one["file"] for one in told] == ["a.npz", "b.npz"]
        torn(folder / "a.npz")
        await comes(running, [A.id, B.id], ["a.npz"])
        assert (await running.chat(palette=PALETTE)).json()["palette"]["calibration"]["id"] == A.id
        os.unlink(folder / "a.npz")
        await comes(running, [B.id])
        told = (await running.client.get("/v1/palette/calibration")).json()
        assert told["calibration"]["id"] == B.id
        os.unlink(folder / "b.npz")
        await comes(running, [])
        refused = await running.chat(palette=PALETTE)
        assert refused.json()["error"]["code"] == "calibration_missing"


async def test_requests_under_way_keep_what_they_began_with(tmp_path, settings, folder, soon):
    async with run_fake(tmp_path, settings, is_calibrated=False) as running:
        running.backend.released.clear()
        body = chat_body(palette=PALETTE, seed=1)
        held = asyncio.create_task(running.client.post("/v1/chat/completions", json=body))
        await until(lambda: running.backend.n_started == 1)
        os.unlink(folder / "a.npz")
        B.save(folder / "b.npz")
        await comes(running, [B.id])
        running.backend.released.set()
        answer = (await held).json()
        assert answer["palette"]["calibration"]["id"] == A.id
        # It is counted for nobody: what is deleted has no live state any more.
        await running.context.follower.settled()
        assert set(running.context.follower.tracks()) == {B.id}
        replay = {"id": answer["id"], "palette": PALETTE}
        replayed = await running.client.post("/v1/palette/replay", json=replay)
        assert replayed.json()["calibration"]["id"] == A.id


async def test_an_adapter_has_those_of_its_own(tmp_path, settings, folder, soon):
    async with run_fake(tmp_path, settings, Adapted(), is_calibrated=False) as running:
        made(5, model_fingerprint="1" * 64).save(folder / "loud.npz")
        await comes(running, [made(5).id], model="loud")
        assert await listed(running) == ([A.id], [])
        assert await listed(running, model="team/shy") == ([], [])


async def test_live_state_comes_and_goes_with_its_calibration(tmp_path, settings, soon, folder):
    """Deleted and imported again, a calibration is served in the version it had."""
    os.unlink(folder / "a.npz")
    root = fake_calibration()
    root.save(folder / "root.npz")
    async with run_fake(tmp_path, settings, is_calibrated=False) as running:
        follower = running.context.follower
        track = follower.track(root)
        for seed in range(30):
            track._reservoir.add(np.random.default_rng(seed).normal(size=(16, 3)))
        track._is_saved = False
        track.refresh()
        follower._swap(track)
        assert running.context.aligner.calibration.version == 1
        shutil.copy(folder / "root.npz", tmp_path / "aside.npz")
        os.unlink(folder / "root.npz")
        await comes(running, [])
        await until(lambda: not follower.tracks())
        shutil.copy(tmp_path / "aside.npz", folder / "back.npz")
        # Whatever the first reader of a copy saw of it, it is whole in the end.
        await comes(running, [root.id])
        assert running.context.aligner.calibration.version == 1
        named = replace(root, info=root.info.model_copy(update={"name": "support"}))
        named.save(folder / "back.npz")
        await until(lambda: running.context.aligner.calibration.info.name == "support")
        assert running.context.aligner.calibration.version == 1
        assert running.context.aligner.calibration.root.info.name == "support"
        palette = {"targets": {"words": "keep"}, "calibration": "support"}
        report = (await running.chat(palette=palette)).json()["palette"]
        assert report["calibration"]["version"] == 1


async def test_the_watch_survives_what_fails(tmp_path, settings, folder, soon, monkeypatch, caplog):
    tried = []

    def fail(*arguments):
        tried.append(arguments)
        raise RuntimeError("nothing works")

    async with run_fake(tmp_path, settings, is_calibrated=False) as running:
        with monkeypatch.context() as broken:
            broken.setattr(Track, "describe", fail)
            B.save(folder / "b.npz")
            await until(lambda: len(tried) > 3)
            assert await listed(running) == ([A.id], [])
        await comes(running, [A.id, B.id])
    assert caplog.text.count("could not be looked at") == 1


async def test_with_refresh_off_too(tmp_path, settings, folder, soon, caplog):
    off = settings.model_copy(update={"refresh": "off"})
    with caplog.at_level(logging.INFO):
        async with run_fake(tmp_path, off, is_calibrated=False) as running:
            B.save(folder / "b.npz")
            await comes(running, [A.id, B.id])
    assert f"calibration {B.id} is served with: {folder / 'b.npz'}" in caplog.text


def test_values_of_another_suite_are_no_replacement(tmp_path, folder):
    shelf = load(tmp_path)
    rewards = np.zeros((16, 8, 1)) + np.arange(8)[:, None]
    replace(A, pilot=PilotSet(rewards, ("words",))).save(folder / "a.npz")
    assert shelf.reread()
    assert found(shelf) == {(A.id, "kept")}
