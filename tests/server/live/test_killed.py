"""A server killed while it follows live traffic: the next one serves with a whole version."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest

from server.calibration import folder_of
from server.live.monitor import Monitor
from server.live.track import logger
from server.live.watch_file import load_watch
from server.settings import load_settings
from solver import PilotSet
from tests.server.conftest import fake_calibration, run_fake
from tests.server.live.refreshing_process import HALF_LIFE, refreshers

PALETTE = {"targets": {"words": {"quantile": 0.7}}, "candidates": 8}
# `KILLS=200 pytest ...` for a long run.
KILLS = int(os.environ.get("KILLS", "10"))


@pytest.fixture
def settings(tmp_path):
    return load_settings(
        state_dir=tmp_path / "state", calibrate_at_start=False, refresh_half_life=HALF_LIFE
    )


@pytest.fixture
def root_file(settings):
    path = folder_of(settings.state_dir) / "root.npz"
    fake_calibration().save(path)
    return path


@pytest.fixture
def folder(settings):
    return settings.state_dir / "live"


def kept(folder):
    """Return the version that is on the disk, 0 where none is; raise where one is not whole."""
    path = folder / f"{fake_calibration().id}.npz"
    if not path.exists():
        return 0
    pilot = PilotSet.load(path)
    assert np.isfinite(pilot.rewards).all()
    assert pilot.values == fake_calibration().pilot.values
    return pilot.metadata["live"]["version"]


def watched(folder):
    """Return how many requests the watch on the disk has seen; raise where it is not whole."""
    path = folder / f"{fake_calibration().id}.watch.npz"
    if not path.exists():
        return 0
    monitor = Monitor(fake_calibration().pilot.values)
    load_watch(path, fake_calibration().pilot.fingerprint, monitor)
    return int(monitor.state()["n_steps"])


async def serves(tmp_path, settings, version, seed):
    """Check that a server that starts now serves with this version, and goes on from it."""
    async with run_fake(tmp_path, settings, is_calibrated=False) as running:
        serving = running.context.aligner.calibration
        assert (serving.id, serving.version) == (fake_calibration().id, version)
        assert np.isfinite(serving.pilot.rewards).all()
        assert np.isfinite(serving.pilot.base).all()
        response = await running.chat(palette=PALETTE, seed=seed)
        assert response.status_code == 200, response.text
        report = response.json()["palette"]
        told = report["calibration"]
        assert (told["id"], told["version"]) == (fake_calibration().id, version)
        assert told["valid"]
        assert (told["live_prompts"] > 0) == (version > 0)
        expected = [number for level in report["expected"].values() for number in level.values()]
        assert np.isfinite([*expected, *report["realised"].values()]).all()
        await running.context.follower.settled()
        assert running.context.follower.track(serving).taken == 1
    folder = settings.state_dir / "live"
    # The answer served is in the next version; nothing torn is left, and nothing was set aside.
    assert kept(folder) == version + 1
    assert sorted(os.listdir(folder)) == [f"{serving.id}.npz", f"{serving.id}.watch.npz"]


async def test_killed_at_any_moment(tmp_path, settings, root_file, folder, caplog):
    rng = random.Random(5)
    newest, n_made, n_torn, n_seen = 0, 0, 0, 0
    with caplog.at_level("WARNING", logger.name), refreshers() as children:
        n = -1
        # On until enough kills came amid a write: where they come is chance, and one that never
        # does shows nothing.
        while (n := n + 1) < KILLS or (n_torn < KILLS / 10 and n < 10 * KILLS):
            kill = {"killed_after": rng.randrange(4), "then_s": rng.uniform(0, 0.02)}
            code, told = children.work(root_file, folder, n, **kill)
            assert code == -9
            # What was told is there; at most one more was on the way.
            n_made += len(told)
            assert told == list(range(newest + 1, newest + 1 + len(told)))
            newest += len(told)
            assert kept(folder) in (newest, newest + 1)
            newest = kept(folder)
            n_torn += folder.exists() and any(folder.glob(".*.tmp"))
            # The watch goes on from what was on the disk, and has all that it has told of.
            assert watched(folder) >= max(n_seen, children.watched or 0)
            n_seen = watched(folder)
            if rng.random() < 0.5:  # else the next process is the first to open what is left
                await serves(tmp_path, settings, newest, n)
                newest += 1
                assert watched(folder) == n_seen + 1
                n_seen += 1
        await serves(tmp_path, settings, newest, n)
    assert not caplog.records
    assert n_made >= KILLS
    assert n_torn >= KILLS / 10


async def test_killed_at_each_step_that_makes_it_durable(tmp_path, settings, root_file, folder):
    """Before the first fsync of two versions, before the second, ... until it is not killed."""
    newest = n_seen = 0
    with refreshers() as children:
        for step in range(100):
            code, told = children.work(root_file, folder, step, die_at=step, most=2)
            assert kept(folder) - newest - len(told) in (0, 1)
            newest = kept(folder)
            assert watched(folder) >= max(n_seen, children.watched or 0)
            n_seen = watched(folder)
            await serves(tmp_path, settings, newest, step)
            newest += 1
            assert watched(folder) == n_seen + 1
            n_seen += 1
            if code == 0:
                break
            assert code == -9
        else:
            raise AssertionError("it never ended")
    assert step >= 5
    assert len(told) == 2
