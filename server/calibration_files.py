"""The calibrations in a state folder: found, checked, taken out and brought in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from server.calibration import (
    Calibration,
    CalibrationError,
    default_path,
    folder_of,
    load_calibration,
)
from server.calibrator import FEWEST_PROMPTS
from server.journal import FORMAT, partial_path
from server.shelf_files import Damaged, Held, scan
from solver.pilot_files import sync_folder


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A calibration that was stopped; the command that began it continues it."""

    path: Path
    done: int
    prompts: int


@dataclass(frozen=True, slots=True)
class Inventory:
    """All that a state folder has, with what ships with the embedded models."""

    held: tuple[Held, ...]
    damaged: tuple[Damaged, ...]
    unfinished: tuple[Unfinished, ...]


def inventory(state_dir: Path, shipped: Path) -> Inventory:
    """Return what there is, of whatever model."""
    held, damaged = scan(state_dir)
    if shipped.exists():
        held = (*held, Held(load_calibration(shipped), shipped, "shipped"))
    partials = sorted(folder_of(state_dir).glob("*.partial"))
    return Inventory(held, damaged, tuple(filter(None, map(_unfinished, partials))))


def find(there: Inventory, reference: str) -> Held:
    """Return the calibration with this id (or the begin of it), name, or file.

    Raises
    ------
    CalibrationError
        When there is none, or several, or its file is damaged.
    """
    is_file = Path(reference).suffix == ".npz"
    found = [
        one
        for one in there.held
        if one.calibration.info.name == reference
        or (len(reference) >= 4 and one.calibration.id.startswith(reference))
        or (is_file and one.path is not None and one.path.name == Path(reference).name)
    ]
    if len(found) == 1:
        return found[0]
    for problem in there.damaged:
        if is_file and problem.path.name == Path(reference).name:
            raise CalibrationError(problem.reason)
    if found:
        ids = ", ".join(one.calibration.id for one in found)
        msg = f"{reference!r} is more than one calibration: give one of the ids {ids}"
        raise CalibrationError(msg)
    ids = ", ".join(one.calibration.id for one in there.held) or "none"
    msg = f"no calibration {reference!r}; `palette calibrations list` shows those there are ({ids})"
    raise CalibrationError(msg)


def problems_of(calibration: Calibration) -> list[str]:
    """Return why a calibration whose file is whole cannot be relied on; empty when it can."""
    pilot, info = calibration.pilot, calibration.info
    found = []
    if pilot.n_prompts < FEWEST_PROMPTS:
        found.append(f"{pilot.n_prompts} prompts are too few: {FEWEST_PROMPTS} at least")
    if pilot.n_candidates < 2:
        found.append("one answer a prompt: there is nothing to choose among")
    counted = pilot.n_prompts if info.systems is None else sum(info.systems.values())
    if counted != pilot.n_prompts:
        found.append(f"its record counts {counted} prompts, its rewards are of {pilot.n_prompts}")
    if info.n_given is not None and pilot.n_prompts > info.n_given:
        found.append(f"rewards of {pilot.n_prompts} prompts, of {info.n_given} given")
    return found


def left_out(calibration: Calibration) -> int:
    """Return how many of the prompts given are not in it: the model refused them, or failed."""
    given = calibration.info.n_given
    return 0 if given is None else max(0, given - calibration.pilot.n_prompts)


def delete(held: Held) -> Path:
    """Delete a kept calibration's file, for good once this returns.

    Raises
    ------
    CalibrationError
        For the shipped one.
    """
    if held.path is None or held.source == "shipped":
        msg = f"{held.calibration.id} ships with Palette and stays"
        raise CalibrationError(msg)
    held.path.unlink()
    partial_path(held.path).unlink(missing_ok=True)
    sync_folder(held.path.parent)
    return held.path


def export(calibration: Calibration, target: Path) -> Path:
    """Write a calibration to a file, or into a folder under a name of its own; return which.

    Raises
    ------
    CalibrationError
        When there is something already.
    """
    if target.is_dir():
        target = target / f"{calibration.info.name or calibration.id}.npz"
    if target.exists():
        msg = f"{target} exists: give another name, or delete it"
        raise CalibrationError(msg)
    calibration.save(target)
    return target


def bring_in(there: Inventory, state_dir: Path, file: Path) -> tuple[Calibration, Path, bool]:
    """Copy a calibration into the state folder.

    Returns
    -------
    Calibration, Path, bool
        The calibration, its file there, and whether it is new.

    Raises
    ------
    CalibrationError
        When it is damaged, or not fit to be served with.
    """
    calibration = load_calibration(file)
    problems = problems_of(calibration)
    if problems:
        msg = f"{file} is not taken in: {'; '.join(problems)}"
        raise CalibrationError(msg)
    for one in there.held:
        if one.calibration.id == calibration.id and one.path is not None:
            return one.calibration, one.path, False
    info = calibration.info
    path = default_path(
        state_dir,
        info.model,
        info.model_fingerprint,
        info.rewards_fingerprint,
        # Of all its rewards, so that a file of this name can be no other calibration.
        calibration.pilot.fingerprint[:24],
    )
    calibration.save(path)
    return calibration, path, True


def _unfinished(path: Path) -> Unfinished | None:
    """Return how far a journal is; None for a file that is none."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline())
            if header["format"] != FORMAT:
                return None
            done = sum(line.endswith(b"\n") for line in file)
            return Unfinished(path, done, header["prompts"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
