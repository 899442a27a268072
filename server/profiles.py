"""Stored named palettes with all their versions, in one SQLite file.

A version is never changed: writing adds one, and so does deleting, whose version has no palette.
Nothing is read or written before it is asked for, so a server without profiles has no file.
"""

from __future__ import annotations

import json
import re
import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from server.profile_file import ProfileError, ProfileFile

FILE = "profiles.sqlite3"
_COLUMNS = "SELECT name, version, palette, description, created FROM versions"
# No colon: a model's name and a profile's are told apart by it. No dot in front: it is a path.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class ProfileNameError(ProfileError):
    """A name that no profile can have."""


class ProfileNotFoundError(ProfileError):
    """There is no profile of this name, or not this version of it.

    Attributes
    ----------
    param : str or None
        The palette's field that asks for it, if one does.
    """

    param: str | None = None


class ProfileConflictError(ProfileError):
    """The profile is not at the version that the change was made for."""


class ProfileInUseError(ProfileError):
    """The profile is what the server serves by default."""


@dataclass(frozen=True, slots=True)
class Profile:
    """One version of a named palette.

    Attributes
    ----------
    version : int
        From 1, without gaps.
    palette : dict or None
        As it was written; None where the profile was deleted.
    created : str
        ISO 8601, UTC.
    """

    name: str
    version: int
    palette: dict[str, Any] | None
    description: str
    created: str


def open_profiles(state_dir: Path) -> Profiles:
    """Return the profiles kept in the server's state; raises as `Profiles`."""
    return Profiles(state_dir / FILE)


class Profiles:
    """The profiles of one file.

    Every method may wait for the disk or for another process: call it off the event loop.

    Parameters
    ----------
    path : Path
        Made by the first write.

    Raises
    ------
    ProfileFileError
        For a file that is there and is damaged, another program's, or of a later version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = ProfileFile(path)

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        self._file.close()

    def newest(self) -> list[Profile]:
        """Return the newest version of every profile that is not deleted, by name."""
        with self._file.reading() as connection:
            if connection is None:
                return []
            found = connection.execute(
                f"{_COLUMNS} AS one WHERE palette IS NOT NULL AND version ="
                " (SELECT MAX(version) FROM versions WHERE name = one.name) ORDER BY name"
            )
            return [self._profile(row) for row in found]

    def versions(self, name: str) -> list[Profile]:
        """Return all versions of a profile, the newest first, those of deletions too.

        Raises
        ------
        ProfileNotFoundError
            When nothing was ever written under this name.
        """
        with self._file.reading() as connection:
            rows = [] if connection is None else _rows(connection, name)
            found = [self._profile(row) for row in rows]
        if not found:
            raise _unknown(name)
        return found

    def get(self, name: str, version: int | None = None) -> Profile:
        """Return a version of a profile, the newest by default.

        Raises
        ------
        ProfileNotFoundError
            When there is none, or when it is a deletion.
        """
        with self._file.reading() as connection:
            row = None if connection is None else _row(connection, name, version)
            found = None if row is None else self._profile(row)
        if found is not None and found.palette is not None:
            return found
        if version is None or found is None:
            raise _unknown(name, version)
        msg = f"profile {name} was deleted by its version {version}: ask for an earlier one"
        raise ProfileNotFoundError(msg)

    def put(
        self,
        name: str,
        palette: dict[str, Any],
        description: str = "",
        expected_version: int | None = None,
    ) -> Profile:
        """Write a new version; return it once it is on the disk.

        Parameters
        ----------
        name : str
            1 to 64 letters, digits, `_`, `-`, `.`; the first a letter or digit.
        palette : dict
            JSON-safe.
        description : str
        expected_version : int, optional
            Write only if this is the newest version; 0 when there must be no such profile.

        Raises
        ------
        ProfileNameError
        ProfileConflictError
            When another version than the one expected is the newest.
        """
        if not _NAME.fullmatch(name):
            msg = (
                f"{name!r:.80} is no name of a profile: it has 1 to 64 letters, digits, `_`, `-` "
                "and `.`, and begins with a letter or digit"
            )
            raise ProfileNameError(msg)
        text = json.dumps(palette, allow_nan=False)
        description = description.encode(errors="replace").decode()
        with self._file.writing() as connection:
            last = _check_version(connection, name, expected_version)
            return self._add(connection, name, last, text, description)

    def delete(self, name: str, expected_version: int | None = None) -> Profile:
        """Delete a profile by a version without a palette, which is returned. History stays.

        Raises
        ------
        ProfileNotFoundError
        ProfileConflictError
            As `put`.
        """
        with self._file.writing() as connection:
            last = _check_version(connection, name, expected_version)
            row = _row(connection, name, None)
            if row is None or row[2] is None:
                raise _unknown(name)
            return self._add(connection, name, last, None, row[3])

    def _add(
        self,
        connection: sqlite3.Connection,
        name: str,
        last: int,
        palette: str | None,
        description: str,
    ) -> Profile:
        created = datetime.now(UTC).isoformat(timespec="seconds")
        row = (name, last + 1, palette, description, created)
        connection.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?)", row)
        return self._profile(row)

    def _profile(self, row: tuple[Any, ...]) -> Profile:
        name, version, palette, description, created = row
        try:
            known = None if palette is None else json.loads(palette)
        except ValueError as error:
            raise self._file.damaged(f"{name}, version {version}, is no JSON") from error
        return Profile(name, version, known, description, created)


def _rows(connection: sqlite3.Connection, name: str) -> list[tuple[Any, ...]]:
    if not _NAME.fullmatch(name):
        return []
    return connection.execute(
        f"{_COLUMNS} WHERE name = ? ORDER BY version DESC", (name,)
    ).fetchall()


def _row(connection: sqlite3.Connection, name: str, version: int | None) -> tuple[Any, ...] | None:
    if not _NAME.fullmatch(name):
        return None
    found: tuple[Any, ...] | None = connection.execute(
        f"{_COLUMNS} WHERE name = ? AND version = COALESCE(?, version)"
        " ORDER BY version DESC LIMIT 1",
        (name, version),
    ).fetchone()
    return found


def _check_version(connection: sqlite3.Connection, name: str, expected: int | None) -> int:
    """Return the last version, 0 for none; a deleted profile is expected as 0, as one never was."""
    row = _row(connection, name, None)
    last: int = 0 if row is None else row[1]
    now = 0 if row is None or row[2] is None else last
    if expected is not None and expected != now:
        there = f"is at version {now}" if now else "does not exist"
        msg = (
            f"profile {name} {there}, and this change was made for version {expected}: read it "
            "again and decide anew"
        )
        raise ProfileConflictError(msg)
    return last


def _unknown(name: str, version: int | None = None) -> ProfileNotFoundError:
    one = f"profile {name!r:.80}" + (f" of version {version}" if version is not None else "")
    return ProfileNotFoundError(
        f"there is no {one}; GET /v1/palette/profiles and `palette profile list` show which are"
    )
