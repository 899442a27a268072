"""The file of a watch over promises: numbers only, written whole, of one calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from server.live.monitor import Monitor
from solver import PilotError
from solver.pilot_files import read_npz, replacing, write_npz

FORMAT = "palette-watch/1"


class WatchError(Exception):
    """A kept watch that cannot be gone on with; the message says why."""


def save_watch(path: Path, root: str, monitor: Monitor) -> None:
    """Write what a watch knows in one piece: a reader sees the old file or the new one.

    Parameters
    ----------
    path : Path
    root : str
        Fingerprint of the calibration that it is about, as it was made.
    monitor : Monitor

    Raises
    ------
    PilotError, OSError
        When the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        write_npz(file, format=np.array(FORMAT), root=np.array(root), **monitor.state())


def load_watch(path: Path, root: str, monitor: Monitor) -> None:
    """Make a watch go on from what `save_watch` wrote.

    Raises
    ------
    WatchError
        When the file is damaged, or of another calibration or another kind of watch; the monitor
        is as it was.
    """
    try:
        state = read_npz(path)
    except PilotError as error:
        msg = f"{path} is no watch over promises: {error}"
        raise WatchError(msg) from error
    if str(state.get("format")) != FORMAT:
        msg = f"{path} is no watch over promises of this kind ({FORMAT})"
        raise WatchError(msg)
    if str(state.get("root")) != root:
        msg = f"{path} is a watch over another calibration"
        raise WatchError(msg)
    try:
        monitor.restore(state)
    except (ValueError, OverflowError, OSError) as error:
        msg = f"{path} is another watch than this one: {error}"
        raise WatchError(msg) from error
