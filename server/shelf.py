"""The calibrations of one model with its rewards, and which of them is for a request."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rewards import Message
from server.backends.base import SamplingSettings
from server.calibration import (
    Calibration,
    CalibrationError,
    folder_of,
    load_calibration,
    system_of,
)
from solver import PaletteError

logger = logging.getLogger(__name__)

Source = Literal["named", "kept", "shipped"]
_RANKS = ("named", "kept", "shipped")


class UnknownCalibrationError(PaletteError):
    """A palette names a calibration that is not there."""


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
    damaged : sequence of Damaged
        Files that were found unusable.
    """

    def __init__(
        self,
        held: Sequence[Held] = (),
        *,
        sampling: SamplingSettings | None = None,
        model_fingerprint: str | None = None,
        rewards_fingerprint: str | None = None,
        damaged: Sequence[Damaged] = (),
    ) -> None:
        self.sampling = sampling or SamplingSettings()
        self.damaged = tuple(damaged)
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
        """Put one more on the shelf; in the place of the one from the same file, if any."""
        with self._lock:
            others = tuple(one for one in self._held if path is None or one.path != path)
            self._held = (*others, Held(calibration, path))

    def replace(self, calibration_id: str, newer: Calibration, path: Path | None = None) -> None:
        """Put a newer version in the place of one that is there, at once for all readers.

        Parameters
        ----------
        calibration_id : str
        newer : Calibration
        path : Path, optional
            Where the newer one is kept, when that is another file.

        Raises
        ------
        UnknownCalibrationError
            When there is none with that id (any more).
        """
        with self._lock:
            held = list(self._held)
            for at, one in enumerate(held):
                if one.calibration.id == calibration_id:
                    held[at] = replace(one, calibration=newer, path=path or one.path)
                    self._held = tuple(held)
                    return
        raise self._unknown(calibration_id)

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
    named : Path or None
        The operator's choice: held whatever it was made with, as long as its values are these
        (answers then carry warnings).
    state_dir : Path
        Those kept here are held when they fit.
    shipped : Path
        The one that comes with the embedded models: held by them.
    sampling : SamplingSettings
        See `Shelf`.
    align : callable
        Makes what is aligned of what a file holds; raises CalibrationError when it cannot.

    Raises
    ------
    CalibrationError
        For a named file that cannot be used.
    """
    held: list[Held] = []
    if named is not None:
        try:
            calibration = align(load_calibration(named))
        except CalibrationError as error:
            told = str(error)
            raise CalibrationError(
                told if str(named) in told else f"calibration {named}: {told}"
            ) from error
        if calibration.pilot.values != values:
            msg = (
                f"calibration {named} is about the values "
                f"{', '.join(calibration.pilot.values)}; the rewards in use give "
                f"{', '.join(values)}: calibrate again with `palette calibrate`"
            )
            raise CalibrationError(msg)
        held.append(Held(calibration, named, "named"))
    kept, damaged = scan(state_dir)
    for problem in damaged:
        logger.warning("%s; it is passed over", problem.reason)
    if shipped.exists():
        kept = (*kept, Held(load_calibration(shipped), shipped, "shipped"))
    for one in kept:
        info = one.calibration.info
        if (info.model_fingerprint, info.rewards_fingerprint) != (
            model_fingerprint,
            rewards_fingerprint,
        ) or (named is not None and one.path is not None and one.path.samefile(named)):
            continue
        try:
            fitting = align(one.calibration)
        except CalibrationError as error:
            logger.warning("%s is passed over: %s", one.path, error)
            continue
        if fitting.pilot.values == values:
            held.append(replace(one, calibration=fitting))
    return Shelf(
        held,
        sampling=sampling,
        model_fingerprint=model_fingerprint,
        rewards_fingerprint=rewards_fingerprint,
        damaged=damaged,
    )


def scan(state_dir: Path) -> tuple[tuple[Held, ...], tuple[Damaged, ...]]:
    """Return all calibrations kept in a state folder, of whatever model, and what is damaged."""
    held, damaged = [], []
    for path in sorted(folder_of(state_dir).glob("*.npz")):
        try:
            held.append(Held(load_calibration(path), path))
        except CalibrationError as error:
            damaged.append(Damaged(path, str(error)))
    return tuple(held), tuple(damaged)
