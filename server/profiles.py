"""Stored named palettes with all their versions, in one SQLite file.

A version is never changed: writing adds one, and so does deleting, whose version has no palette.
Nothing is read or written before it is asked for, so a server without profiles has no file.
"""

from __future__ import annotations

import json
import re
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FILE = "profiles.sqlite3"
# Of the tables below; a file of a later one is left alone.
SCHEMA = 1
# "PLTE" in the file's header says whose it is.
_APPLICATION = 0x504C5445
_TABLES = """
CREATE TABLE versions (
    name TEXT NOT NULL,
    version INTEGER NOT NULL,
    palette TEXT,
    description TEXT NOT NULL,
    created TEXT NOT NULL,
    PRIMARY KEY (name, version)
) STRICT, WITHOUT ROWID
"""
_COLUMNS = "SELECT name, version, palette, description, created FROM versions"
# Another process, such as the command line, may be writing.
_BUSY_S = 5.0
# No colon: a model's name and a profile's are told apart by it. No dot in front: it is a path.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class ProfileError(Exception):
    """Root of what the store raises."""


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


class ProfileFileError(ProfileError):
    """The store's file cannot be used; it is left as it is."""


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
    """The profiles of one file. One connection, used by one thread at a time.

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
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        with self._reading():
            pass

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        with self._lock:
            self._disconnect()

    def newest(self) -> list[Profile]:
        """Return the newest version of every profile that is not deleted, by name."""
        with self._reading() as connection:
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
        with self._reading() as connection:
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
        with self._reading() as connection:
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
        with self._writing() as connection:
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
        with self._writing() as connection:
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
            raise self._damaged(f"{name}, version {version}, is no JSON") from error
        return Profile(name, version, known, description, created)

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection | None]:
        """Give the connection, or None while there is no file."""
        with self._lock, self._translated():
            yield self._connect() if self._connection or self.path.exists() else None

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Give the connection in a transaction, which is on the disk when this ends."""
        with self._lock, self._translated():
            if self._connection is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = self._connect()
            with _transaction(connection):
                yield connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn what SQLite and the disk raise into our error."""
        try:
            yield
        except sqlite3.Error as error:
            self._disconnect()  # what was wrong may be mended when it is opened again
            if isinstance(error, sqlite3.OperationalError):
                msg = f"profiles {self.path} cannot be used now ({error}); nothing was changed"
                raise ProfileFileError(msg) from error
            raise self._damaged(str(error)) from error
        except OSError as error:
            msg = f"profiles {self.path} cannot be used: {error}"
            raise ProfileFileError(msg) from error

    def _damaged(self, reason: str) -> ProfileFileError:
        return ProfileFileError(
            f"profiles {self.path} are damaged or no profiles ({reason}); the file is left as it "
            "is: put a copy of it in its place, or move it away to begin anew"
        )

    def _connect(self) -> sqlite3.Connection:
        if self._connection is None:
            # Autocommit: transactions begin and end where we say.
            connection = sqlite3.connect(
                self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Check whose file it is before anything is written to it; make what a new one needs."""
        wal = self.path.with_name(self.path.name + "-wal")
        if self.path.stat().st_size == 0 and wal.exists() and wal.stat().st_size > 0:
            # SQLite would take it for a new one, and throw away what is in the log.
            raise self._damaged("it is empty, and its log is not")
        if _is_new(connection):
            connection.execute("PRAGMA journal_mode = WAL")
            with _transaction(connection):
                if _is_new(connection):  # another process may have been first
                    connection.execute(_TABLES)
                    connection.execute(f"PRAGMA application_id = {_APPLICATION}")
                    connection.execute(f"PRAGMA user_version = {SCHEMA}")
        if _pragma(connection, "application_id") != _APPLICATION:
            raise self._damaged("it is another program's")
        schema = _pragma(connection, "user_version")
        if schema != SCHEMA:
            msg = (
                f"profiles {self.path} have schema {schema}, and this Palette knows {SCHEMA}: run "
                "the Palette that wrote them, or name another state_dir; the file is left as it is"
            )
            raise ProfileFileError(msg)
        findings = _pragma(connection, "quick_check")
        if findings != "ok":
            raise self._damaged(str(findings).replace("\n", "; "))
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _is_new(connection: sqlite3.Connection) -> bool:
    """Return whether nobody has made anything of this file."""
    (n_tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    marks = _pragma(connection, "application_id"), _pragma(connection, "user_version")
    return n_tables == 0 and marks == (0, 0)


def _pragma(connection: sqlite3.Connection, name: str) -> Any:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


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
