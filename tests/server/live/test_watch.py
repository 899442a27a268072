"""The watch over promises goes on after a restart as if there had been none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from server.live.monitor import Monitor
from server.live.track import Track
from server.live.watch_file import FORMAT, WatchError, load_watch, save_watch
from server.settings import load_settings
from solver import PilotSet, SolutionCache
from solver.pilot_files import read_npz
from tests.server.conftest import fake_calibration, run_fake
from tests.server.live.test_follower import Shifting, ask, state
from tests.server.live.test_track import arrival, track

ROOT = "a" * 64


def watching(n_requests=0, shift=0.0):
    """Return a watch over the fake calibration that has seen some requests."""
    monitor = Monitor(fake_calibration().pilot.values)
    for number in range(n_requests):
        one = arrival(number, shift)
        monitor.take(one.calibration, None, one.rewards)
    return monitor


def same(one, other):
    mine, theirs = one.state(), other.state()
    assert set(mine) == set(theirs)
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], strict=True)


# the file


def test_all_of_it_comes_back(tmp_path):
    monitor, path = watching(60, 3.0), tmp_path / "new" / "w.npz"
    assert monitor.alarmed
    save_watch(path, ROOT, monitor)
    back = watching()
    load_watch(path, ROOT, back)
    same(monitor, back)
    assert back.alarmed
    monitor.publish()
    assert back.watched == monitor.watched
    assert back.warnings


def test_it_holds_numbers_and_names_only(tmp_path):
    save_watch(tmp_path / "w.npz", ROOT, watching(3))
    arrays = read_npz(tmp_path / "w.npz")
    words = {name: array.tolist() for name, array in arrays.items() if array.dtype.kind not in "if"}
    values = [*fake_calibration().pilot.values]
    assert words == {"format": FORMAT, "root": ROOT, "values": values}
    assert (tmp_path / "w.npz").stat().st_size < 20_000


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "pilot", "array", "root", "values"])
def test_what_is_no_watch_over_this_is_refused_and_changes_nothing(tmp_path, damage):
    path, root = tmp_path / "w.npz", ROOT
    save_watch(path, ROOT, watching(60, 3.0))
    content = bytearray(path.read_bytes())
    back = watching(40)
    if damage == "pilot":
        fake_calibration().pilot.save(path)
    elif damage == "array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif damage == "root":
        root = "b" * 64
    elif damage == "values":
        back = Monitor(("words", "variety", "ease"))
    else:
        at = content.find(b"evidence.npy") + 200
        content[at] ^= 255
        path.write_bytes(
            {"cut": bytes(content[: len(content) // 2]), "flipped": bytes(content), "empty": b""}[
                damage
            ]
        )
    before = back.state()
    with pytest.raises(WatchError, match=r"w\.npz"):
        load_watch(path, root, back)
    for name, array in back.state().items():
        np.testing.assert_array_equal(array, before[name])
    assert not back.alarmed


# the live state of a calibration


def test_restarts_change_nothing(tmp_path):
    """Quiet requests, then a shift: found at the same request, with the same evidence."""
    whole = track(tmp_path / "whole", 1000, "frozen")
    parts = track(tmp_path / "parts", 1000, "frozen")
    alarms = []
    for number in range(160):
        one = arrival(number, 1.0 * (number >= 100))
        for live in (whole, parts):
            live.take(one, None)
            live.tell()
        alarms.append((whole.monitor.alarmed, parts.monitor.alarmed))
        if number % 7 == 0:
            parts = track(tmp_path / "parts", 1000, "frozen")
        mine, theirs = whole.monitor.state(), parts.monitor.state()
        assert (mine.pop("found") > 0).all()
        del theirs["found"]  # the two began at different times
        for name, array in mine.items():
            np.testing.assert_array_equal(array, theirs[name], strict=True)
    assert (alarms[99], alarms[-1]) == ((False, False), (True, True))
    assert all(one == other for one, other in alarms)
    assert parts.monitor.warnings


def test_with_refresh_on_it_goes_on_through_versions_too(tmp_path):
    one = track(tmp_path, 1000)
    for number in range(20):
        one.take(arrival(number), None)
    one.refresh()
    one.take(arrival(20), None)
    one.tell()
    one.save()
    back = track(tmp_path, 1000)
    assert back.calibration.version == 2
    same(one.monitor, back.monitor)


def test_a_drift_that_stood_is_told_at_once_and_since_when(tmp_path, caplog):
    one = track(tmp_path, 1000, "frozen")
    for number in range(60):
        one.take(arrival(number, 3.0), None)
    one.tell()
    found = [w.since for w in one.monitor.watched if w.direction]
    caplog.clear()
    back = track(tmp_path, 1000, "frozen")
    assert back.monitor.alarmed
    assert back.monitor.warnings == one.monitor.warnings
    assert [w.since for w in back.monitor.watched if w.direction] == found
    assert sum(r.getMessage().startswith("drift: ") for r in caplog.records) == len(found)


def test_nothing_is_told_before_it_is_written(tmp_path, monkeypatch, caplog):
    told = []

    def write(path, root, monitor):
        told.append((monitor.alarmed, bool(monitor.warnings), "drift: " in caplog.text))
        save_watch(path, root, monitor)

    monkeypatch.setattr("server.live.track.save_watch", write)
    one = track(tmp_path, 1000, "frozen")
    for number in range(60):
        one.take(arrival(number, 3.0), None)
    one.tell()
    assert told == [(True, False, False)]
    assert one.monitor.warnings
    assert "drift: " in caplog.text
    one.tell()  # nothing is new
    assert len(told) == 1


def test_a_watch_that_cannot_be_written_is_told_all_the_same(tmp_path, caplog):
    """Once in the log; and it is written when that can be done again."""
    one = track(tmp_path, 1000, "frozen")
    (tmp_path / "state").write_text("a file where the folder should be")
    for number in range(60):
        one.take(arrival(number, 3.0), None)
        one.tell()
    assert one.monitor.warnings
    assert caplog.text.count("the watch over promises is not kept") == 1
    (tmp_path / "state").unlink()
    one.save()
    same(track(tmp_path, 1000, "frozen").monitor, one.monitor)


def test_of_another_calibration_or_damaged_it_begins_anew_and_says_so(tmp_path, caplog):
    one = track(tmp_path, 1000, "frozen")
    for number in range(60):
        one.take(arrival(number, 3.0), None)
    one.tell()
    path = tmp_path / "state" / "one.watch.npz"
    content = path.read_bytes()
    other = fake_calibration()
    other = replace(other, pilot=PilotSet(other.pilot.rewards + 1.0, other.pilot.values))
    new = Track(other, "frozen", 1000, tmp_path / "state" / "one.npz", SolutionCache())
    assert not new.monitor.alarmed
    assert "a watch over another calibration; it is kept as one.watch.damaged" in caplog.text
    assert (tmp_path / "state" / "one.watch.damaged").read_bytes() == content
    caplog.clear()
    path.write_bytes(content[:-100])
    assert not track(tmp_path, 1000, "frozen").monitor.alarmed
    assert "the watch over promises begins anew" in caplog.text


# the server


async def test_what_is_counted_is_on_the_disk_while_it_serves(tmp_path):
    ours = load_settings(state_dir=tmp_path / "state", calibrate_at_start=False)
    async with run_fake(tmp_path, ours) as running:
        for n_requests in (4, 7):
            await ask(running, range(n_requests))
            back, path = watching(), tmp_path / "state" / "live"
            calibration = running.context.aligner.calibration
            root = (calibration.root or calibration).pilot.fingerprint
            load_watch(path / f"{calibration.id}.watch.npz", root, back)
            same(back, running.context.follower.track(calibration).monitor)


WHOLE = [[range(50), range(50, 95)]]
PARTS = [[range(25)], [range(25, 50)], [range(50, 75)], [range(75, 95)]]


@pytest.fixture
async def served(tmp_path):
    """Return what a server knows that is started after others have answered, for each of the two.

    Answers become three times as long after 50 requests.
    """
    fake_calibration().save(tmp_path / "root.npz")
    backend, found = Shifting(), []
    for name, lives in (("whole", WHOLE), ("parts", PARTS)):
        ours = load_settings(
            state_dir=tmp_path / name, calibrate_at_start=False, refresh="frozen",
            calibration=tmp_path / "root.npz",
        )  # fmt: skip
        for life in lives:
            async with run_fake(tmp_path, ours, backend, is_calibrated=False) as running:
                for numbers in life:
                    backend.factor = 3 if numbers.start >= 50 else 1
                    await ask(running, numbers)
        async with run_fake(tmp_path, ours, backend, is_calibrated=False) as running:
            drift = (await state(running))["drift"]
            answer = await running.chat(palette={"targets": {"words": "keep"}})
        found.append((without_times(drift), answer.json()["palette"]["calibration"]["warnings"]))
    return found


async def test_a_server_that_is_started_again_goes_on_watching(served):
    """As one that ran all the time: the same numbers of every value."""
    (whole, warned), (parts, _) = served
    assert whole == parts
    assert whole["words"]["promise"]["state"] == "above"
    assert 0 < whole["words"]["promise"]["requests"] < 95
    assert any("drift: words is above" in one for one in warned)


def without_times(drift):
    for value in drift["values"].values():
        for kind in value.values():
            assert kind.pop("since")
    return drift["values"]
