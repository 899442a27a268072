"""Prompts of served requests, written to a file for `palette calibrate --prompts`, if allowed."""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
from pathlib import Path
from typing import BinaryIO

from server.alignment_stages import Served
from server.prompts import parse_prompt

logger = logging.getLogger(__name__)

# When a file is full it becomes FILE.1, in the place of the one before: the newest prompts stay,
# in at most twice this.
FULL_BYTES = 32 * 2**20
# Conversations that may wait for the disk; more are not recorded.
_WAITING = 1024


class PromptRecorder:
    """Appends the conversations of served requests as JSON lines, in a thread of its own.

    Conversations that `palette calibrate` cannot use (with tools, or a text to be continued) are
    left out. A disk that fails ends the recording, not the server.

    Parameters
    ----------
    path : Path
        Readable by its owner only.
    full_bytes : int

    Raises
    ------
    OSError
        When the file cannot be written.
    """

    def __init__(self, path: Path, full_bytes: int = FULL_BYTES) -> None:
        self._path = path
        self._full_bytes = full_bytes
        self._file = _open(path)
        logger.warning("prompts of served requests are written to %s", path)
        self._lines: queue.Queue[bytes | None] = queue.Queue(_WAITING)
        self._is_behind = False
        self._thread = threading.Thread(target=self._write, name="record prompts", daemon=True)
        self._thread.start()

    def note(self, served: Served) -> None:
        """Take the conversation of an answered request; returns at once."""
        request = served.plan.request
        if request.tools is not None or request.text is not None:
            return
        messages = list(request.messages)
        try:
            parse_prompt(messages)
        except ValueError:  # answers of tools among them
            return
        try:
            self._lines.put_nowait(json.dumps({"messages": messages}).encode() + b"\n")
        except queue.Full:
            if not self._is_behind:
                self._is_behind = True
                logger.warning("%s is written too slowly; prompts are left out", self._path)

    def close(self) -> None:
        """Write what waits, and end."""
        self._lines.put(None)
        self._thread.join()

    def _write(self) -> None:
        is_failed = False
        while (line := self._lines.get()) is not None:
            if is_failed:
                continue  # so that nobody waits for a place in the queue
            try:
                if self._file.tell() + len(line) > self._full_bytes:
                    self._file.close()
                    os.replace(self._path, self._path.with_name(f"{self._path.name}.1"))
                    self._file = _open(self._path)
                self._file.write(line)
            except OSError as error:
                is_failed = True
                logger.error("prompts are no longer recorded: %s", error)
        self._file.close()


def _open(path: Path) -> BinaryIO:
    """Return the file to append to; a line that was cut off is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    os.fchmod(handle, 0o600)  # whatever it was made with
    file = os.fdopen(handle, "r+b", buffering=0)
    end = whole = file.seek(0, os.SEEK_END)
    while whole:
        start = max(0, whole - 65_536)
        file.seek(start)
        found = file.read(whole - start).rfind(b"\n")
        if found >= 0:
            whole = start + found + 1
            break
        whole = start
    if whole != end:
        file.truncate(whole)
    file.seek(whole)
    return file
