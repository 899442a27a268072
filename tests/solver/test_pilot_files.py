import json
import os

import numpy as np
import pytest

from solver import PilotError, PilotSet, pilot_files
from tests.solver.problems import gaussian_pilot, names


def same(one, other):
    np.testing.assert_array_equal(one.rewards, other.rewards)
    return (one.values, one.pooled, one.fingerprint) == (
        other.values, other.pooled, other.fingerprint,
    )  # fmt: skip


@pytest.mark.parametrize("pooled", [False, True])
def test_a_calibration_returns(tmp_path, pooled):
    rewards = gaussian_pilot(0).rewards
    pilot = PilotSet(
        rewards.reshape(-1, 3) if pooled else rewards,
        ("harmless", "Höflichkeit", "words"),
        pooled=pooled,
        metadata={"model": "m", "sampling": {"temperature": 1.0}, "note": None},
    )
    path = tmp_path / "calibration.npz"
    pilot.save(path)
    returned = PilotSet.load(path)
    assert same(pilot, returned)
    assert returned.metadata == pilot.metadata
    assert [entry.name for entry in tmp_path.iterdir()] == ["calibration.npz"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_name_without_a_suffix_stays_as_it_is(tmp_path):
    gaussian_pilot(0).save(tmp_path / "calibration")
    assert PilotSet.load(str(tmp_path / "calibration")).n_values == 3


def test_json_lines(tmp_path):
    path = tmp_path / "pilot.jsonl"
    lines = [
        {"prompt": "a", "rewards": {"x": [1, 2], "y": [3, 4.5]}},
        {"prompt": "b", "rewards": {"y": [7, 8], "x": [5, 6]}},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    pilot = PilotSet.load(path)
    assert pilot.values == ("x", "y")
    assert not pilot.pooled
    np.testing.assert_array_equal(pilot.rewards, [[[1, 3], [2, 4.5]], [[5, 7], [6, 8]]])


def test_a_list_of_records_is_a_pool(tmp_path):
    path = tmp_path / "pilot.json"
    records = [
        {"prompt": "a", "x": 1, "flag": True, "y": 2.5, "note": None},
        {"prompt": "b", "y": 4.5, "x": 3},
    ]
    path.write_text("\n " + json.dumps(records))
    pilot = PilotSet.load(path)
    assert pilot.pooled
    assert pilot.values == ("x", "y")
    np.testing.assert_array_equal(pilot.rewards, [[1, 2.5], [3, 4.5]])


LINE = '{"prompt": "a", "rewards": {"x": [1, 2], "y": [3, 4]}}\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("   \n", "is empty"),
        ("hello", "is not a pilot file"),
        ("PK\x03\x04 and nothing else", "damaged or cut short"),
        (LINE + LINE[:20], "line 2: not JSON"),
        (LINE + "[1]\n", 'line 2: no "rewards"'),
        (LINE + '{"prompt": "b"}', 'line 2: no "rewards"'),
        (LINE + '{"rewards": {}}', 'line 2: no "rewards"'),
        (LINE + '{"rewards": {"x": [1, 2]}}', r"line 2: its values differ .*\(y\)"),
        (LINE + '{"rewards": {"x": [1, 2], "z": [3, 4]}}', "line 2: its values differ"),
        (LINE + '{"rewards": {"x": [1], "y": [3, 4]}}', "line 2: x has 1 rewards"),
        (LINE + '{"rewards": {"x": [1, 2], "y": [3]}}', "line 2: y has 1 rewards"),
        (LINE + '{"rewards": {"x": [1, NaN], "y": [3, 4]}}', "line 2: x is not a list of finite"),
        (LINE + '{"rewards": {"x": [1, Infinity], "y": [3, 4]}}', "line 2: x is not a list"),
        (LINE + '{"rewards": {"x": [1, true], "y": [3, 4]}}', "line 2: x is not a list"),
        (LINE + '{"rewards": {"x": 1, "y": [3, 4]}}', "line 2: x is not a list"),
        ('{"rewards": {"x": []}}', "line 1: x is not a list"),
        ('{"rewards": {"x": [1e200]}}', "finite and within"),
        ("[]", "expected a list of records"),
        ("[1, 2]", "expected a list of records"),
        ('[{"x": 1}, {"x": 2}', "not JSON"),
        ('[{"prompt": "a"}]', "record 1: no numbers"),
        ('[{"x": 1}, {"y": 2}]', "record 2: x is None"),
        ('[{"x": 1}, {"x": "2"}]', "record 2: x is '2'"),
        ('[{"x": 1}, {"x": NaN}]', "record 2: x is nan"),
        ('[{"x": 1}, {"x": 2, "y": 3}]', "record 2: y is not in record 1"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_damaged_text_is_located(tmp_path, text, words):
    path = tmp_path / "pilot.data"
    path.write_text(text)
    with pytest.raises(PilotError, match=words) as caught:
        PilotSet.load(path)
    assert str(path) in str(caught.value)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(PilotError, match="cannot be read"):
        PilotSet.load(tmp_path / "nothing.npz")
    with pytest.raises(PilotError, match="cannot be read"):
        PilotSet.load(tmp_path)
    with pytest.raises(PilotError, match="cannot write into"):
        gaussian_pilot(0).save(tmp_path / "absent" / "calibration.npz")


def test_bytes_that_are_not_text(tmp_path):
    path = tmp_path / "pilot.jsonl"
    path.write_bytes(b'{"rewards": {"\xff": [1]}}')
    with pytest.raises(PilotError, match="UTF-8"):
        PilotSet.load(path)


@pytest.mark.parametrize("kept", [30, 200, 0.5, 0.9])
def test_a_calibration_cut_short(tmp_path, kept):
    path = tmp_path / "calibration.npz"
    gaussian_pilot(0).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: kept if kept > 1 else int(kept * len(content))])
    with pytest.raises(PilotError, match="damaged or cut short"):
        PilotSet.load(path)


def test_a_calibration_with_a_flipped_bit(tmp_path):
    path = tmp_path / "calibration.npz"
    gaussian_pilot(0).save(path)
    content = bytearray(path.read_bytes())
    content[3000] ^= 1
    path.write_bytes(content)
    with pytest.raises(PilotError, match="damaged"):
        PilotSet.load(path)


def saved_arrays(pilot):
    return {
        "format": np.array(pilot_files.FORMAT),
        "rewards": pilot.rewards,
        "values": np.array(pilot.values),
        "pooled": np.array(False),
        "metadata": np.array("{}"),
        "fingerprint": np.array(pilot.fingerprint),
    }


def test_other_archives_are_refused(tmp_path):
    path = tmp_path / "calibration.npz"
    np.savez(path, weights=np.zeros(3))
    with pytest.raises(PilotError, match="not a 'palette-pilot/1' calibration"):
        PilotSet.load(path)
    arrays = saved_arrays(gaussian_pilot(0))
    np.savez(path, **arrays | {"format": np.array("palette-pilot/2")})
    with pytest.raises(PilotError, match="palette-pilot/2"):
        PilotSet.load(path)
    np.savez(path, **arrays | {"rewards": arrays["rewards"] + 1})
    with pytest.raises(PilotError, match="fingerprint"):
        PilotSet.load(path)
    np.savez(path, **arrays | {"metadata": np.array("{")})
    with pytest.raises(PilotError, match="metadata is damaged"):
        PilotSet.load(path)
    np.savez(path, **arrays | {"values": np.array(["a"])})
    with pytest.raises(PilotError, match="shape"):
        PilotSet.load(path)


def test_nothing_is_unpickled(tmp_path):
    path = tmp_path / "calibration.npz"
    harmful = np.array([{"a": 1}], dtype=object)
    np.savez(path, **saved_arrays(gaussian_pilot(0)) | {"rewards": harmful})
    with pytest.raises(PilotError, match="allow_pickle"):
        PilotSet.load(path)


def test_metadata_must_be_json(tmp_path):
    for metadata in ({"a": object()}, {"a": float("nan")}):
        pilot = PilotSet(np.zeros((1, 1, 1)), names(1), metadata=metadata)
        with pytest.raises(PilotError, match="metadata"):
            pilot.save(tmp_path / "calibration.npz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["write_npz", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch, where, error):
    path = tmp_path / "calibration.npz"
    old, new = gaussian_pilot(0), gaussian_pilot(1)
    old.save(path)

    def fail(*args, **kwargs):
        if where == "write_npz":
            args[0].write(b"PK half of it")
        raise error

    monkeypatch.setattr(pilot_files if where == "write_npz" else os, where, fail)
    with pytest.raises(PilotError if isinstance(error, OSError) else KeyboardInterrupt):
        new.save(path)
    monkeypatch.undo()
    assert same(PilotSet.load(path), old)
    assert [entry.name for entry in tmp_path.iterdir()] == ["calibration.npz"]
