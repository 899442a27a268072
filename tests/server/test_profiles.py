"""The profiles' file: versions, whoever else writes, damage, and a process killed while writing."""

from __future__ import annotations

import inspect
import os
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from server.profile_file import ProfileFileError
from server.profiles import (
    FILE,
    ProfileConflictError,
    ProfileNameError,
    ProfileNotFoundError,
    Profiles,
    open_profiles,
)

BRIEF = {"targets": {"words": {"at_most": 40}}}
# Of the writer below; KILLS=200 takes some minutes.
KILLS = int(os.environ.get("KILLS", "10"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / FILE


@pytest.fixture
def profiles(path):
    found = Profiles(path)
    yield found
    found.close()


# versions


def test_nothing_is_made_before_something_is_written(profiles, path):
    assert profiles.newest() == []
    with pytest.raises(ProfileNotFoundError):
        profiles.get("brief")
    with pytest.raises(ProfileNotFoundError):
        profiles.versions("brief")
    assert not path.parent.exists()


def test_a_version_for_every_write(profiles):
    first = profiles.put("brief", BRIEF, "short")
    second = profiles.put("brief", {"targets": {}}, "free")
    assert (first.version, first.palette, first.description) == (1, BRIEF, "short")
    assert (second.version, second.palette) == (2, {"targets": {}})
    assert profiles.get("brief") == second
    assert profiles.get("brief", 1) == first
    assert profiles.versions("brief") == [second, first]


def test_the_newest_of_each(profiles):
    profiles.put("b", BRIEF)
    profiles.put("a", BRIEF)
    last = profiles.put("b", {})
    profiles.put("c", BRIEF)
    profiles.delete("c")
    assert [(one.name, one.version) for one in profiles.newest()] == [("a", 1), ("b", 2)]
    assert profiles.newest()[1] == last


def test_deleting_keeps_history(profiles):
    first = profiles.put("brief", BRIEF, "short")
    deletion = profiles.delete("brief")
    assert (deletion.version, deletion.palette) == (2, None)
    with pytest.raises(ProfileNotFoundError):
        profiles.get("brief")
    with pytest.raises(ProfileNotFoundError, match="deleted by its version 2"):
        profiles.get("brief", 2)
    with pytest.raises(ProfileNotFoundError):
        profiles.delete("brief")
    assert profiles.get("brief", 1) == first
    assert profiles.versions("brief") == [deletion, first]
    assert profiles.put("brief", {}).version == 3


def test_it_is_there_after_a_restart(path):
    for version in range(1, 4):
        profiles = Profiles(path)
        assert profiles.put("brief", {"version": version}).version == version
        profiles.close()
    profiles = open_profiles(path.parent)
    assert profiles.get("brief").palette == {"version": 3}
    profiles.close()


def test_a_closed_store_opens_itself(profiles):
    profiles.put("brief", BRIEF)
    profiles.close()
    assert profiles.get("brief").palette == BRIEF


@pytest.mark.parametrize("expected", [1, 2, 4])
def test_an_update_made_for_another_version_is_refused(profiles, expected):
    for _ in range(3):
        profiles.put("brief", BRIEF)
    with pytest.raises(ProfileConflictError, match=f"at version 3.* version {expected}"):
        profiles.put("brief", {}, expected_version=expected)
    with pytest.raises(ProfileConflictError):
        profiles.delete("brief", expected_version=expected)
    assert profiles.get("brief").version == 3
    assert profiles.put("brief", {}, expected_version=3).version == 4


def test_expecting_none(profiles):
    assert profiles.put("brief", BRIEF, expected_version=0).version == 1
    with pytest.raises(ProfileConflictError, match="is at version 1"):
        profiles.put("brief", BRIEF, expected_version=0)
    profiles.delete("brief")
    with pytest.raises(ProfileConflictError, match="does not exist"):
        profiles.put("brief", BRIEF, expected_version=2)
    assert profiles.put("brief", BRIEF, expected_version=0).version == 3


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "-x", "a b", "a/b", "a:b", "ä", "a\n", "x" * 65, "\ud800"]
)
def test_names_that_are_none(profiles, path, name):
    with pytest.raises(ProfileNameError, match="64 letters"):
        profiles.put(name, BRIEF)
    assert not path.exists()
    profiles.put("x", BRIEF)
    with pytest.raises(ProfileNotFoundError):
        profiles.get(name)
    with pytest.raises(ProfileNotFoundError):
        profiles.versions(name)


@pytest.mark.parametrize("name", ["a", "x" * 64, "Family-friendly_2.1", "9"])
def test_names_that_are_some(profiles, name):
    assert profiles.put(name, BRIEF).name == name


def test_names_are_not_patterns_nor_cases(profiles):
    profiles.put("a", BRIEF)
    for name in ("A", "%", "_", "a' OR '1'='1"):
        with pytest.raises(ProfileNotFoundError):
            profiles.get(name)


# others who write


def test_threads_lose_no_update(profiles):
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda i: profiles.put("brief", {"i": i}).version, range(100)))
    assert sorted(written) == list(range(1, 101))
    assert {one.palette["i"] for one in profiles.versions("brief")} == set(range(100))


def test_of_many_who_expect_the_same_version_one_wins(profiles):
    def write(i):
        try:
            return profiles.put("brief", {"i": i}, expected_version=0)
        except ProfileConflictError:
            return None

    with ThreadPoolExecutor(8) as pool:
        won = [one for one in pool.map(write, range(32)) if one is not None]
    assert won == [profiles.get("brief")]


def test_connections_share_a_file_from_its_first_moment(path):
    def write(i):
        profiles = Profiles(path)
        versions = [profiles.put("brief", {"i": i}).version for _ in range(5)]
        profiles.close()
        return versions

    with ThreadPoolExecutor(6) as pool:
        written = [version for versions in pool.map(write, range(6)) for version in versions]
    assert sorted(written) == list(range(1, 31))


def test_a_change_by_another_connection_is_seen_at_once(profiles, path):
    other = Profiles(path)
    assert profiles.newest() == []
    other.put("brief", BRIEF)
    assert profiles.get("brief").version == 1
    other.delete("brief")
    assert profiles.newest() == []
    other.close()


def test_a_write_that_fails_changes_nothing(profiles):
    profiles.put("brief", BRIEF)
    with pytest.raises(ValueError, match="JSON"):
        profiles.put("brief", {"level": float("nan")})
    assert [one.version for one in profiles.versions("brief")] == [1]
    assert profiles.put("brief", {}).version == 2


def test_a_file_that_stays_locked(profiles, path, monkeypatch):
    monkeypatch.setattr("server.profile_file._BUSY_S", 0.01)
    profiles.put("brief", BRIEF)
    profiles.close()
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(ProfileFileError, match="locked"):
        profiles.put("brief", {})
    assert profiles.get("brief").version == 1  # reading goes on
    holder.execute("ROLLBACK")
    holder.close()
    assert profiles.put("brief", {}).version == 2


# damage


def written(path, n_versions=50):
    profiles = Profiles(path)
    for i in range(n_versions):
        profiles.put("brief", {"text": f"{i} " * 5000})
    profiles.close()


@pytest.mark.parametrize("kind", ["text", "header", "pages", "page", "half", "foreign", "json"])
def test_a_file_that_is_damaged_is_named_and_left_as_it_is(path, kind):
    written(path)
    whole = path.read_bytes()
    if kind == "text":
        path.write_text("these are no profiles\n" * 500)
    elif kind == "header":
        path.write_bytes(b"\0" * 100 + whole[100:])
    elif kind == "pages":
        path.write_bytes(whole[:4096] + b"\x55" * (len(whole) - 4096))
    elif kind == "page":  # of versions that nobody asks for
        at = whole.rindex(b"20 20 20 20") // 4096 * 4096
        path.write_bytes(whole[:at] + b"\x55" * 4096 + whole[at + 4096 :])
    elif kind == "half":
        path.write_bytes(whole[: len(whole) // 8192 * 4096])
    elif kind == "foreign":
        path.unlink()
        other = sqlite3.connect(path)
        other.execute("CREATE TABLE songs (name)")
        other.execute("PRAGMA user_version = 1")
        other.commit()
        other.close()
    elif kind == "json":
        other = sqlite3.connect(path)
        other.execute("UPDATE versions SET palette = '{' WHERE version = 50")
        other.commit()
        other.close()
    damaged = path.read_bytes()
    for use in (
        lambda: Profiles(path).get("brief"),
        lambda: Profiles(path).newest(),
        lambda: Profiles(path).put("other", {}) if kind != "json" else Profiles(path).newest(),
    ):
        with pytest.raises(ProfileFileError, match=r"left as it\s+is") as raised:
            use()
        assert str(path) in str(raised.value)
        assert path.read_bytes() == damaged


def test_a_file_of_a_later_version_is_left_as_it_is(path):
    written(path, 1)
    other = sqlite3.connect(path)
    other.execute("PRAGMA user_version = 2")
    other.close()
    later = path.read_bytes()
    with pytest.raises(ProfileFileError, match="schema 2, and this Palette knows 1"):
        Profiles(path)
    assert path.read_bytes() == later


def test_an_empty_file_whose_log_is_not_is_not_taken_for_a_new_one(path):
    profiles = Profiles(path)
    profiles.put("brief", BRIEF)
    log = path.with_name(f"{FILE}-wal")
    kept = log.read_bytes()
    assert kept
    profiles.close()
    path.write_bytes(b"")
    log.write_bytes(kept)
    with pytest.raises(ProfileFileError, match="its log is not"):
        Profiles(path)
    assert log.read_bytes() == kept


def test_an_empty_file_is_a_new_one(path):
    path.parent.mkdir(parents=True)
    path.touch()  # all that a process leaves that was killed in the first moment
    profiles = Profiles(path)
    assert profiles.put("brief", BRIEF).version == 1
    profiles.close()


def test_a_folder_in_its_place(path):
    path.mkdir(parents=True)
    with pytest.raises(ProfileFileError, match="cannot be used"):
        Profiles(path)


def test_a_state_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "state").write_text("a file")
    profiles = open_profiles(tmp_path / "state")
    assert profiles.newest() == []
    with pytest.raises(ProfileFileError, match="cannot be used"):
        profiles.put("brief", BRIEF)


# killed


def text_of(version):
    """Return a palette's text: now and then so long that a kill is likely to come amid it."""
    return f"{version} " * (version * 7919 % 5_000) * (10 if version % 5 == 0 else 1)


WRITER = f"""
import sys
from pathlib import Path
from server.profiles import Profiles

{inspect.getsource(text_of)}

profiles = Profiles(Path(sys.argv[1]))
newest = profiles.newest()
version = newest[0].version if newest else 0
while True:
    version += 1
    palette = {{"text": text_of(version)}}
    assert profiles.put("brief", palette, str(version)).version == version
    sys.stdout.write(f"{{version}}\\n")
    sys.stdout.flush()
"""


def test_killed_while_writing(path):
    """After each kill the file opens, with every version acknowledged, whole, and at most one more.

    The texts are long enough for the log to be written back to the file many times.
    """
    rng = np.random.default_rng(5)
    acknowledged = 0
    for _ in range(KILLS):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(int(rng.integers(1, 20))):
            line = writer.stdout.readline()
            assert line, "the writer failed"
        # The writer is at work on the next ones: it ends anywhere in them.
        time.sleep(rng.uniform(0, 0.01))
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        for last in (line, *writer.stdout.read().splitlines(keepends=True)):
            if last.endswith("\n"):
                acknowledged = int(last)
        writer.stdout.close()
        if rng.random() < 0.5:  # else the next writer is the first to open what is left
            check_written(path, acknowledged, 5)
    check_written(path, acknowledged, acknowledged)
    assert acknowledged > 3 * KILLS


def check_written(path, acknowledged, n_last):
    """Check what is acknowledged, of the last versions word by word."""
    profiles = Profiles(path)
    newest = profiles.get("brief").version
    assert newest in (acknowledged, acknowledged + 1)
    for version in range(newest, max(0, newest - n_last), -1):
        one = profiles.get("brief", version)
        assert (one.version, one.description) == (version, str(version))
        assert one.palette == {"text": text_of(version)}
    profiles.close()


def test_synchronised_to_the_disk(profiles):
    profiles.put("brief", BRIEF)
    connection = profiles._file._connection
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
