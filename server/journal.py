"""The journal of a calibration in the making: one line per finished prompt, numbers only."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from server.calibration import CalibrationError, make_folder
from solver.pilot_files import sync_folder

logger = logging.getLogger(__name__)

FORMAT = "palette-calibration-journal/1"


@dataclass(frozen=True, slots=True)
class Answers:
    """What a calibration keeps of the candidates of one prompt.

    Attributes
    ----------
    rewards : ndarray, shape (n_candidates, n_values), float32
    longest : int
        Tokens of the longest candidate.
    n_cut : int
        Candidates that ``max_tokens`` cut short.
    """

    rewards: npt.NDArray[np.float32]
    longest: int
    n_cut: int


def partial_path(path: Path) -> Path:
    """Return where the journal of a calibration is: beside the file that it will become."""
    return path.with_name(f"{path.name}.partial")


def run_key(header: dict[str, Any]) -> str:
    """Return eight hex digits that tell one run from another."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:8]


class Journal:
    """The prompts that are done. What was appended survives the death of the process.

    Made by `open_journal`; one process at a time has it.

    Attributes
    ----------
    done : dict of int to Answers
        What was there when it was opened, by the prompt's position.
    """

    def __init__(self, path: Path, file: BinaryIO, done: dict[int, Answers]) -> None:
        self._path = path
        self._file = file
        self.done = done

    def append(self, index: int, answers: Answers) -> None:
        """Write a finished prompt.

        Raises
        ------
        OSError
            When the disk is full, and the like.
        """
        record = {
            "index": index,
            "rewards": answers.rewards.tolist(),
            "longest": answers.longest,
            "cut": answers.n_cut,
        }
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Let go of the file, which stays to be continued; all of it reaches the disk."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def remove(self) -> None:
        """Delete the file: the calibration is there."""
        self._path.unlink(missing_ok=True)
        sync_folder(self._path.parent)


def open_journal(path: Path, header: dict[str, Any]) -> Journal:
    """Return the journal of a run, begun or continued.

    Parameters
    ----------
    path : Path
        See `partial_path`.
    header : dict
        What the run depends on, JSON-able; with ``values`` and ``candidates``, the names and K,
        and ``prompts``, their number.

    Raises
    ------
    CalibrationError
        When the file is of another run or no journal, or another process has it. It is left as
        it is.
    """
    make_folder(path.parent)
    file = path.open("a+b")
    try:
        _lock(path, file)
        done = _read(path, file, {"format": FORMAT, **header})
    except BaseException:
        file.close()
        raise
    return Journal(path, file, done)


def _lock(path: Path, file: BinaryIO) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Who had it may have finished, and deleted it, since it was opened here.
        is_there = path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except BlockingIOError:
        is_there = False
    if not is_there:
        msg = f"another process makes this calibration now ({path}): wait for it, or stop it"
        raise CalibrationError(msg)


def _read(path: Path, file: BinaryIO, header: dict[str, Any]) -> dict[int, Answers]:
    """Return the prompts that are done; the file then ends behind the last whole line."""
    expected = json.dumps(header, sort_keys=True).encode() + b"\n"
    file.seek(0)
    first = file.readline()
    if not first.strip(b"\0") or (not first.endswith(b"\n") and expected.startswith(first)):
        # Nothing yet, or the process ended, or the power went, while the first line was written.
        file.truncate(0)
        file.write(expected)
        file.flush()
        os.fsync(file.fileno())
        sync_folder(path.parent)
        return {}
    if first != expected:
        raise CalibrationError(_foreign(path, first, header))
    done: dict[int, Answers] = {}
    whole = len(first)
    for line in file:
        try:
            if not line.endswith(b"\n"):
                break
            index, answers = _parse(line, header)
        except (ValueError, KeyError, TypeError, RecursionError):
            logger.warning("%s is damaged at byte %d; what follows is made again", path, whole)
            break
        done[index] = answers
        whole += len(line)
    file.truncate(whole)
    return done


def _parse(line: bytes, header: dict[str, Any]) -> tuple[int, Answers]:
    record = json.loads(line)
    rewards = np.array(record["rewards"], dtype=np.float32)
    index, longest, n_cut = (record[name] for name in ("index", "longest", "cut"))
    if not all(type(number) is int and number >= 0 for number in (index, longest, n_cut)):
        raise ValueError("no counts")
    if rewards.shape != (header["candidates"], len(header["values"])) or not (
        index < header["prompts"] and np.isfinite(rewards).all()
    ):
        raise ValueError("no record of this run")
    return index, Answers(rewards, longest, n_cut)


def _foreign(path: Path, first: bytes, header: dict[str, Any]) -> str:
    """Return why the file cannot be continued."""
    remedy = "write to another file with --out, or delete this one"
    try:
        written = json.loads(first)
        is_ours = written.get("format") == FORMAT
    except (ValueError, AttributeError, RecursionError):
        is_ours = False
    if not is_ours:
        return f"{path} is no unfinished calibration: {remedy}"
    other = sorted(name for name in header if written.get(name) != header[name])
    return (
        f"{path} is an unfinished calibration with other {', '.join(other)}: give the same "
        f"options again to continue it, {remedy}"
    )
