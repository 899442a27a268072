"""The SQLite file of the profiles: opened, checked, locked; its errors in our words."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
# Another process, such as the command line, may be writing.
_BUSY_S = 5.0


class ProfileError(Exception):
    """Root of what the store raises."""


class ProfileFileError(ProfileError):
    """The store's file cannot be used; it is left as it is."""


class ProfileFile:
    """One connection to the file, used by one thread at a time.

    What it does may wait for the disk or for another process.

    Parameters
    ----------
    path : Path
        Made by the first write.

    Raises
    ------
    ProfileFileError
        For a file that is there and is damaged, another program's, or of a later version; and
        from every use, when the file fails.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        with self.reading():
            pass

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        with self._lock:
            self._disconnect()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection | None]:
        """Give the connection, or None while there is no file."""
        with self._lock, self._translated():
            yield self._connect() if self._connection or self.path.exists() else None

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
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
            raise self.damaged(str(error)) from error
        except OSError as error:
            msg = f"profiles {self.path} cannot be used: {error}"
            raise ProfileFileError(msg) from error

    def damaged(self, reason: str) -> ProfileFileError:
        """Return the error of a file that holds what it cannot."""
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
            raise self.damaged("it is empty, and its log is not")
        if _is_new(connection):
            connection.execute("PRAGMA journal_mode = WAL")
            with _transaction(connection):
                if _is_new(connection):  # another process may have been first
                    connection.execute(_TABLES)
                    connection.execute(f"PRAGMA application_id = {_APPLICATION}")
                    connection.execute(f"PRAGMA user_version = {SCHEMA}")
        if _pragma(connection, "application_id") != _APPLICATION:
            raise self.damaged("it is another program's")
        schema = _pragma(connection, "user_version")
        if schema != SCHEMA:
            msg = (
                f"profiles {self.path} have schema {schema}, and this Palette knows {SCHEMA}: run "
                "the Palette that wrote them, or name another state_dir; the file is left as it is"
            )
            raise ProfileFileError(msg)
        findings = _pragma(connection, "quick_check")
        if findings != "ok":
            raise self.damaged(str(findings).replace("\n", "; "))
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
