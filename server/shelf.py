"""The calibrations of one model with its rewards, and which of them is for a request."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rewards import Message
from server.backends.base import SamplingSettings
from server.calibration import Calibration, system_of
from server.shelf_files import Damaged, Held, ShelfFiles
from solver import PaletteError

logger = logging.getLogger(__name__)

_RANKS = ("named", "kept", "shipped")


class UnknownCalibrationError(PaletteError):
    """A palette names a calibration that is not there."""


class Shelf:
    """Calibrations side by side; safe to read and to change from any thread.

    Parameters
    ----------
    held : sequence of Held
    sampling : SamplingSettings
        Of a request that says nothing.
    model_fingerprint : str, optional
        Of the model in use. One made with other weights or rewards covers no request; only what
        the operator named may be such a one.
    rewards_fingerprint : str, optional
    files : ShelfFiles, optional
        Where they come from, and further ones may.

    Attributes
    ----------
    damaged : tuple of Damaged
        Files that were found unusable.
    """

    def __init__(
        self,
        held: Sequence[Held] = (),
        *,
        sampling: SamplingSettings | None = None,
        model_fingerprint: str | None = None,
        rewards_fingerprint: str | None = None,
        files: ShelfFiles | None = None,
    ) -> None:
        self.sampling = sampling or SamplingSettings()
        self.damaged: tuple[Damaged, ...] = () if files is None else files.damaged
        self._files = files
        self._made_with = (model_fingerprint, rewards_fingerprint)
        self._held = tuple(held)  # replaced whole, so that readers need no lock
        self._lock = threading.Lock()

    @classmethod
    def of(cls, only: Calibration | None) -> Shelf:
        """Return a shelf with a single calibration, or with none."""
        return cls(() if only is None else (Held(only),))

    @property
    def held(self) -> tuple[Held, ...]:
        """All that is there."""
        return self._held

    @property
    def default(self) -> Calibration | None:
        """The one for a conversation that leaves sampling to the server, without system prompt."""
        return self.choose(self.sampling, ())

    def choose(
        self, sampling: SamplingSettings, messages: Sequence[Message], name: str | None = None
    ) -> Calibration | None:
        """Return the calibration for a request, or None when there is none at all.

        Of those that cover the request (`Calibration.distance` 0): the one with the largest share
        of prompts with this very system prompt; then what the operator named before what is kept
        before what is shipped; then the newest. When none covers it: what the operator named, else
        the nearest; its `warnings_for` say what it lacks.

        Parameters
        ----------
        sampling : SamplingSettings
        messages : sequence of Message
        name : str, optional
            Choose among those with this name or id only.

        Raises
        ------
        UnknownCalibrationError
            When none has that name.
        """
        held = self._held
        if name is not None:
            held = tuple(
                one for one in held if name in (one.calibration.id, one.calibration.info.name)
            )
            if not held:
                raise self._unknown(name)
        if not held:
            return None
        system = system_of(messages)

        def order(one: Held) -> tuple[float, ...]:
            calibration = one.calibration
            distance = calibration.distance(sampling, system)
            is_covered = distance == 0 and self._fits(calibration)
            return (
                not is_covered,
                # Of those that do not cover it, the operator's choice, however far.
                not is_covered and one.source != "named",
                distance,
                -calibration.share_of(system),
                _RANKS.index(one.source),
                -calibration.info.created.timestamp(),
            )

        return min(held, key=order).calibration

    def add(self, calibration: Calibration, path: Path | None = None) -> None:
        """Put one more on the shelf; in the place of the one from the same file, if any.

        Where that is this very one already, maybe in a newer version, it stays.
        """
        with self._lock:
            others = [one for one in self._held if path is None or one.path != path]
            same = [one for one in self._held if one.path == path and path is not None]
            if not same or same[0].calibration.id != calibration.id:
                self._held = (*others, Held(calibration, path))

    def replace(self, calibration_id: str, newer: Calibration) -> None:
        """Put a newer version in the place of one that is there, at once for all readers.

        Raises
        ------
        UnknownCalibrationError
            When there is none with that id (any more).
        """
        with self._lock:
            if calibration_id not in {one.calibration.id for one in self._held}:
                raise self._unknown(calibration_id)
            self._held = tuple(
                replace(one, calibration=newer) if one.calibration.id == calibration_id else one
                for one in self._held
            )

    def reread(
        self, ready: Callable[[Calibration], Calibration] = lambda calibration: calibration
    ) -> bool:
        """Take in what changed in the files; return whether anything did.

        All readers see it at once, and requests under way keep what they began with. Waits for
        the disk; for one thread at a time.

        Parameters
        ----------
        ready : callable
            Is given each calibration that comes, before any request can get it; returns the
            version that is to be served.
        """
        changes = None if self._files is None else self._files.changes(self._held)
        if changes is None or self._files is None:
            return False
        came = {one.path: replace(one, calibration=ready(one.calibration)) for one in changes.came}
        with self._lock:
            left = [one for one in self._held if one.path not in changes.gone]
            gone = [one for one in self._held if one.path in changes.gone]
            kept = [came.pop(one.path, one) for one in left]
            self._held = (*kept, *came.values())
            self.damaged = changes.damaged
        self._files.note(changes)
        for one in changes.came:
            logger.info("calibration %s is served with: %s", one.calibration.id, one.path)
        for one in gone:
            logger.info("calibration %s is deleted: %s", one.calibration.id, one.path)
        if gone and not self._held:
            logger.warning("there is no calibration left; run `palette calibrate`")
        return True

    def _fits(self, calibration: Calibration) -> bool:
        info = calibration.info
        pairs = zip(
            self._made_with, (info.model_fingerprint, info.rewards_fingerprint), strict=True
        )
        return all(ours is None or ours == made for ours, made in pairs)

    def _unknown(self, name: str) -> UnknownCalibrationError:
        known = [
            f"{info.name} ({one.calibration.id})" if info.name else one.calibration.id
            for one in self._held
            for info in (one.calibration.info,)
        ]
        told = f"those there are: {', '.join(known)}" if known else "there is none yet"
        return UnknownCalibrationError(f"no calibration {name!r}; {told}", param="calibration")


def load_shelf(
    named: Path | None,
    state_dir: Path,
    shipped: Path,
    *,
    values: tuple[str, ...],
    model_fingerprint: str,
    rewards_fingerprint: str,
    sampling: SamplingSettings,
    align: Callable[[Calibration], Calibration] = lambda calibration: calibration,
) -> Shelf:
    """Return the calibrations that fit the model and the rewards in use.

    A file in the state folder that is damaged is told in the log, and by the shelf, and does not
    keep the others from being served with.

    Parameters
    ----------
    sampling : SamplingSettings
        See `Shelf`.
    named, state_dir, shipped, values, model_fingerprint, rewards_fingerprint, align
        See `ShelfFiles`.

    Raises
    ------
    CalibrationError
        For a named file that cannot be used.
    """
    files = ShelfFiles(
        named,
        state_dir,
        shipped,
        values=values,
        model_fingerprint=model_fingerprint,
        rewards_fingerprint=rewards_fingerprint,
        align=align,
    )
    return Shelf(
        files.load(),
        sampling=sampling,
        model_fingerprint=model_fingerprint,
        rewards_fingerprint=rewards_fingerprint,
        files=files,
    )
