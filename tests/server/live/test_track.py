from types import SimpleNamespace

import numpy as np
import pytest

from server.live.intake import Arrival
from server.live.track import Track
from server.schemas import PaletteOptions
from solver import SolutionCache
from tests.server.conftest import fake_calibration


def arrival(number, shift=0.0):
    """One request that promised nothing, so only base levels are watched."""
    pilot = fake_calibration().pilot
    rewards = pilot.rewards[number % pilot.n_prompts, :16] + shift * pilot.scale
    messages = ({"role": "user", "content": f"prompt {number}"},)
    plan = SimpleNamespace(
        prompt=SimpleNamespace(messages=messages, token_ids=()),
        request=SimpleNamespace(palette=PaletteOptions()),
    )
    return Arrival(plan, fake_calibration(), None, rewards)


def track(tmp_path, half_life, mode="on"):
    path = tmp_path / "state" / "one.npz"
    return Track(fake_calibration(), mode, half_life, path, SolutionCache())


@pytest.mark.parametrize(("half_life", "share"), [(50, 1.0), (300, 2.164), (1000, 4.0)])
def test_a_drift_makes_it_forget_faster_but_not_to_too_few(tmp_path, half_life, share):
    """What is left of the 200 prompts of the root, of as many drifting requests; 4 errors."""
    one = track(tmp_path, half_life)
    number = 0
    while not one.monitor.alarmed:
        one.take(arrival(number, 3.0), None)
        number += 1
    before = one._reservoir.n_prompts - one._reservoir.n_live
    for more in range(60):
        one.take(arrival(number + more, 3.0), None)
    assert one.monitor.alarmed
    kept = 2.0 ** (-60 * share / half_life)
    left = one._reservoir.n_prompts - one._reservoir.n_live
    assert abs(left - before * kept) < 4 * np.sqrt(before * kept * (1 - kept)) + 1


def test_a_version_waits_for_enough_or_for_long_enough(tmp_path, monkeypatch):
    one = track(tmp_path, 1000)
    for number in range(15):
        one.take(arrival(number), None)
    assert not one.is_due
    one.take(arrival(15), None)
    assert one.is_due
    one.refresh()
    assert (one.calibration.version, one.is_due) == (1, False)
    monkeypatch.setattr("server.live.track.LONGEST_WAIT_S", 0.0)
    assert not one.is_due  # nothing is new
    one.take(arrival(16), None)
    assert one.is_due


def test_what_cannot_be_written_is_told_and_tried_again(tmp_path, caplog):
    one = track(tmp_path, 1000)
    one.take(arrival(0), None)
    (tmp_path / "state").write_text("a file where the folder should be")
    one.save()
    assert "not kept" in caplog.text
    (tmp_path / "state").unlink()
    one.save()
    assert track(tmp_path, 1000).calibration.version == 1


def test_left_overs_of_cut_off_writes_go_and_those_that_cannot_stop_nothing(tmp_path, caplog):
    state = tmp_path / "state"
    state.mkdir()
    (state / ".one.npz.abc.tmp").write_text("half")
    (state / ".other.npz.abc.tmp").write_text("half")
    assert track(tmp_path, 1000).calibration.version == 0
    assert [path.name for path in state.iterdir()] == [".other.npz.abc.tmp"]
    assert not caplog.records
    (state / ".one.npz.abc.tmp").mkdir()
    assert track(tmp_path, 1000).calibration.version == 0
    assert "cannot be deleted" in caplog.text
