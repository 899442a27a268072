"""The calibration files behind a shelf: read when it is made, and again where they change."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from server.calibration import Calibration, CalibrationError, folder_of, load_calibration

logger = logging.getLogger(__name__)

Source = Literal["named", "kept", "shipped"]
# What no two contents of a file share: device, inode, size, and when it was last written or named.
Seal = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Held:
    """A calibration on the shelf.

    Attributes
    ----------
    calibration : Calibration
    path : Path or None
        Its file.
    source : {"named", "kept", "shipped"}
        By the operator; in the state folder; with the embedded models.
    """

    calibration: Calibration
    path: Path | None = None
    source: Source = "kept"


@dataclass(frozen=True, slots=True)
class Damaged:
    """A file among the calibrations that cannot be used; `reason` begins with its path."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Changes:
    """What is different from what a shelf has.

    Attributes
    ----------
    came : tuple of Held
        New, or in the place of the one from the same file.
    gone : frozenset of Path
        Files that were deleted.
    damaged : tuple of Damaged
        All there are now.
    seals : mapping of Path to Seal
        The files as they were found.
    """

    came: tuple[Held, ...]
    gone: frozenset[Path]
    damaged: tuple[Damaged, ...]
    seals: Mapping[Path, Seal]


class ShelfFiles:
    """The files whose calibrations fit the model and the rewards in use.

    For one thread at a time.

    Parameters
    ----------
    named : Path or None
        The operator's choice: held whatever it was made with, as long as its values are these
        (answers then carry warnings).
    state_dir : Path
        Those kept here are held when they fit.
    shipped : Path
        The one that comes with the embedded models: held by them.
    values : tuple of str
    model_fingerprint, rewards_fingerprint : str
    align : callable
        Makes what is aligned of what a file holds; raises CalibrationError when it cannot.
    """

    def __init__(
        self,
        named: Path | None,
        state_dir: Path,
        shipped: Path,
        *,
        values: tuple[str, ...],
        model_fingerprint: str,
        rewards_fingerprint: str,
        align: Callable[[Calibration], Calibration],
    ) -> None:
        self._named = named
        self._folder = folder_of(state_dir)
        self._shipped = shipped
        self._values = values
        self._made_with = (model_fingerprint, rewards_fingerprint)
        self._align = align
        self._seals: Mapping[Path, Seal] = {}
        self._damaged: dict[Path, Damaged] = {}
        self._is_readable = True

    def load(self) -> tuple[Held, ...]:
        """Return all that fit. What is damaged in the state folder is told in the log.

        Raises
        ------
        CalibrationError
            For a named file that cannot be used.
        """
        held = []
        if self._named is not None:
            own = self._own(load_calibration(self._named))
            held.append(Held(own, self._named, "named"))
        found = self.changes(held)
        if found is not None:
            held += found.came
            self.note(found)
        if self._shipped.exists() and not self._is_named(self._shipped):
            calibration = self._read(self._shipped, None)
            held += [] if calibration is None else [Held(calibration, self._shipped, "shipped")]
        return tuple(held)

    @property
    def damaged(self) -> tuple[Damaged, ...]:
        """Files that were found unusable."""
        return tuple(self._damaged.values())

    def changes(self, held: Sequence[Held]) -> Changes | None:
        """Return what changed since what was last noted; None where nothing did.

        A file that is torn, or holds what does not fit, changes nothing but the log: what came of
        it before stays. So does what the operator named when its file is deleted, and everything
        while the folder cannot be read.

        Parameters
        ----------
        held : sequence of Held
            What is on the shelf.
        """
        try:
            seals = self._list()
        except OSError as error:
            if self._is_readable:
                logger.warning("%s; its calibrations are served with as they were read", error)
            self._is_readable = False
            return None
        self._is_readable = True
        changed = [path for path, seal in seals.items() if self._seals.get(path) != seal]
        gone = self._seals.keys() - seals.keys()
        if not changed and not gone:
            return None
        before = {one.path: one.calibration for one in held}
        came = []
        for path in changed:
            found = self._read(path, before.get(path))
            if found is not None:
                came.append(Held(found, path, "named" if path == self._named else "kept"))
        for path in gone:
            self._damaged.pop(path, None)
        if self._named in gone:
            logger.warning("%s is deleted; it is served with until the server stops", self._named)
        return Changes(tuple(came), frozenset(gone - {self._named}), self.damaged, seals)

    def note(self, changes: Changes) -> None:
        """Take the changes as made: they are not told again."""
        self._seals = changes.seals

    def _list(self) -> dict[Path, Seal]:
        """Return the files that there are, without another name of the operator's choice.

        Raises
        ------
        OSError
            When the folder cannot be read, or is not there any more.
        """
        paths = [] if self._named is None else [self._named]
        if self._folder.exists() or any(path.parent == self._folder for path in self._seals):
            names = sorted(entry.name for entry in os.scandir(self._folder))
            paths += [self._folder / name for name in names if name.endswith(".npz")]
        found: dict[Path, Seal] = {}
        for path in dict.fromkeys(paths):
            with contextlib.suppress(FileNotFoundError):
                found[path] = _seal(path)
        own = None if self._named is None else found.get(self._named)
        return {path: seal for path, seal in found.items() if path == self._named or seal != own}

    def _read(self, path: Path, old: Calibration | None) -> Calibration | None:
        """Return what a file holds now, if it fits and is another than before."""
        told = "it is passed over" if old is None else "what it held before is served with"
        try:
            calibration = load_calibration(path)
        except CalibrationError as error:
            if path.exists():  # else it is deleted, which is seen next time
                if path not in self._damaged:  # a copy that is being made is told once
                    logger.warning("%s; %s", error, told)
                self._damaged[path] = Damaged(path, str(error))
            return None
        self._damaged.pop(path, None)
        fit: Callable[[Calibration], Calibration | None]
        fit = self._own if path == self._named else self._fitting
        try:
            fitting = fit(calibration)
        except CalibrationError as error:
            logger.warning("%s: %s; %s", path, error, told)
            return None
        if fitting is None and old is not None:
            logger.warning("%s is now of another model or other rewards; %s", path, told)
        if fitting is None or (
            old is not None and (fitting.id, fitting.info) == (old.id, old.info)
        ):
            return None
        return fitting

    def _own(self, calibration: Calibration) -> Calibration:
        """Return the operator's choice as it is aligned.

        Raises
        ------
        CalibrationError
            When its values are not those in use.
        """
        try:
            found = self._align(calibration)
        except CalibrationError as error:
            msg = f"calibration {self._named}: {error}"
            raise CalibrationError(msg) from error
        if found.pilot.values != self._values:
            msg = (
                f"calibration {self._named} is about the values "
                f"{', '.join(found.pilot.values)}; the rewards in use give "
                f"{', '.join(self._values)}: calibrate again with `palette calibrate`"
            )
            raise CalibrationError(msg)
        return found

    def _fitting(self, calibration: Calibration) -> Calibration | None:
        """Return a calibration as it is aligned; None where it was made with something else.

        Raises
        ------
        CalibrationError
            When it cannot be aligned.
        """
        info = calibration.info
        if (info.model_fingerprint, info.rewards_fingerprint) != self._made_with:
            return None
        found = self._align(calibration)
        return found if found.pilot.values == self._values else None

    def _is_named(self, path: Path) -> bool:
        return self._named is not None and self._named.exists() and path.samefile(self._named)


def _seal(path: Path) -> Seal:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def scan(state_dir: Path) -> tuple[tuple[Held, ...], tuple[Damaged, ...]]:
    """Return all calibrations kept in a state folder, of whatever model, and what is damaged."""
    held, damaged = [], []
    for path in sorted(folder_of(state_dir).glob("*.npz")):
        try:
            held.append(Held(load_calibration(path), path))
        except CalibrationError as error:
            damaged.append(Damaged(path, str(error)))
    return tuple(held), tuple(damaged)
