import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import server
from server.live.reservoir import Reservoir, ReservoirError
from solver import PilotSet
from tests.server.conftest import fake_calibration


def reservoir(half_life=100, seed=0, root=None):
    return Reservoir(root or fake_calibration(), half_life, np.random.default_rng(seed))


def prompt_of(number, n=16):
    return np.full((n, 3), float(number))


def test_it_begins_as_the_calibration_it_grew_from():
    one = reservoir()
    assert one.current() is fake_calibration()
    assert (one.n_prompts, one.n_live, one.version) == (200, 0, 0)


def test_half_is_left_after_a_half_life_and_the_rest_fades_alike():
    """Of 20 runs: 200 prompts, each gone with probability 1/2; 4,000 flips, four errors are 0.032.

    Live prompts of every age are there with the probability that belongs to the age.
    """
    left, ages = [], np.zeros(400)
    for seed in range(20):
        one = reservoir(seed=seed)
        for number in range(100):
            one.add(prompt_of(number))
        left.append(one.n_prompts - one.n_live)
        for number in range(100, 400):
            one.add(prompt_of(number))
        pilot = one.calibration().pilot
        live = pilot.counts == 16
        ages[(399 - pilot.rewards[live, 0, 0]).astype(int)] += 1
        # levels off at half_life / ln 2, give or take its Poisson error
        assert abs(one.n_prompts - 100 / np.log(2) * (1 - 1 / 16) - 200 / 16) < 5 * 12
    assert abs(np.sum(left) / 4000 - 0.5) < 0.032
    expected = 20 * 2.0 ** (-np.arange(400) / 100)
    for decade in range(8):
        part = slice(50 * decade, 50 * decade + 50)
        total = expected[part].sum()
        assert abs(ages[part].sum() - total) < 4 * np.sqrt(total)


def test_in_haste_it_forgets_as_many_times_as_fast():
    one = reservoir(half_life=400)
    for number in range(100):
        one.add(prompt_of(number), haste=4.0)
    assert abs(one.n_prompts - one.n_live - 100) < 4 * np.sqrt(50)
    tiny = reservoir(half_life=1)
    for number in range(10):
        tiny.add(prompt_of(number), haste=4.0)  # every one leaves
    assert (tiny.n_prompts, tiny.n_live) == (1, 1)


def test_a_version_holds_what_came_with_as_many_candidates_as_it_had():
    one = reservoir()
    one.add(np.arange(30.0).reshape(10, 3))
    one.add(np.arange(120.0).reshape(40, 3))
    made = one.calibration()
    assert made.id == fake_calibration().id
    assert (made.version, made.live_prompts, made.root) == (1, 2, fake_calibration())
    assert made.updated > fake_calibration().info.created
    assert made.pilot.counts[-2:].tolist() == [10, 32]
    np.testing.assert_array_equal(made.pilot.rewards[-2, :10].ravel(), np.arange(30.0))
    np.testing.assert_array_equal(made.pilot.rewards[-1].ravel(), np.arange(96.0))
    assert one.n_new == 0
    one.add(prompt_of(1))
    assert made.live_prompts == 2  # a version does not change any more


def test_what_is_kept_comes_back(tmp_path):
    one = reservoir()
    for number in range(30):
        one.add(prompt_of(number, 8 + number))
    made = one.calibration()
    one.save(tmp_path / "new" / "r.npz")
    back = reservoir()
    back.restore(tmp_path / "new" / "r.npz")
    again = back.current()
    assert again.pilot.fingerprint == made.pilot.fingerprint
    assert (again.version, again.updated, again.live_prompts) == (1, made.updated, back.n_live)
    assert back.n_live == one.n_live
    one.add(prompt_of(1))
    one.save(tmp_path / "new" / "r.npz")  # with what no version has yet
    back.restore(tmp_path / "new" / "r.npz")
    assert back.version == 2
    assert back.updated > made.updated
    assert back.n_prompts == one.n_prompts
    # numbers only, and what the calibration was made of
    kept = PilotSet.load(tmp_path / "new" / "r.npz")
    assert set(kept.metadata) == {"calibration", "live"}
    assert set(kept.metadata["live"]) == {"root", "version", "updated", "live"}


def test_a_reservoir_of_another_calibration_is_refused(tmp_path):
    other = fake_calibration()
    pilot = PilotSet(other.pilot.rewards + 1.0, other.pilot.values)
    one = reservoir()
    one.add(prompt_of(1))
    one.save(tmp_path / "r.npz")
    with pytest.raises(ReservoirError, match="another calibration"):
        reservoir(root=replace(other, pilot=pilot)).restore(tmp_path / "r.npz")


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "pilot"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "r.npz"
    one = reservoir()
    one.add(prompt_of(1))
    one.save(path)
    content = bytearray(path.read_bytes())
    if damage == "pilot":
        fake_calibration().save(path)
    else:
        content[len(content) // 2] ^= 255
        kept = {"cut": content[: len(content) // 2], "flipped": content, "empty": b""}[damage]
        path.write_bytes(bytes(kept))
    with pytest.raises(ReservoirError, match=r"r\.npz"):
        reservoir().restore(path)


WRITER = """
import sys
from pathlib import Path
import numpy as np
from server.calibration import load_calibration
from server.live.reservoir import Reservoir
one = Reservoir(load_calibration(Path(sys.argv[1])), 100, np.random.default_rng(0))
while True:
    one.add(np.full((16, 3), 1.0))
    one.calibration()
    one.save(Path(sys.argv[2]))
    print(one.version, flush=True)
"""


def test_a_kill_while_writing_leaves_a_whole_file(tmp_path):
    root, path = tmp_path / "c.npz", tmp_path / "r.npz"
    fake_calibration().save(root)
    folder = Path(server.__file__).parents[1]
    for n_seen in (3, 7, 12):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, root, path], stdout=subprocess.PIPE, cwd=folder
        )
        with process:
            for _ in range(n_seen):
                assert process.stdout.readline()
            process.send_signal(signal.SIGKILL)
            process.wait()
        back = reservoir()
        back.restore(path)
        assert back.version >= n_seen
