"""Pilot files: a calibration (.npz), JSON lines, or the paper's list of flat records."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from solver.errors import PilotError

FORMAT = "palette-pilot/1"
# With the number of answers to each prompt, which readers of the first would overlook.
RAGGED_FORMAT = "palette-pilot/2"


@dataclass
class Content:
    """What a file holds, before `PilotSet` checks the numbers."""

    rewards: Any
    values: tuple[str, ...]
    pooled: bool
    metadata: dict[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None
    counts: Any = None


def save(
    path: Path,
    rewards: npt.NDArray[np.float64],
    values: tuple[str, ...],
    pooled: bool,
    metadata: Mapping[str, Any],
    fingerprint: str,
    counts: npt.NDArray[np.intp] | None = None,
) -> None:
    """Write a calibration file atomically.

    A reader sees the old file or the new one: the bytes go to a temporary file in the same
    folder, which reaches the disk before it takes the name.

    Raises
    ------
    PilotError
        The metadata is not JSON, or the folder cannot be written.
    """
    try:
        notes = json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PilotError(
            f"metadata: {error}; keep to text, finite numbers, lists and objects."
        ) from error
    with replacing(path) as file:
        write_npz(
            file,
            **({} if counts is None else {"counts": np.asarray(counts)}),
            format=np.array(FORMAT if counts is None else RAGGED_FORMAT),
            rewards=np.asarray(rewards),
            values=np.array(values),
            pooled=np.array(pooled),
            metadata=np.array(notes),
            fingerprint=np.array(fingerprint),
        )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write; once all of it is on the disk, it takes the place of `path`.

    Raises
    ------
    PilotError
        The folder cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise PilotError(f"{path}: cannot write into {path.parent} ({error.strerror}).") from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # A temporary file is private to its owner; replicas under other users read a calibration.
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise PilotError(f"{path}: cannot be written ({error.strerror}).") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    sync_folder(path.parent)


def sweep(path: Path) -> None:
    """Delete what saves of this file left that were cut off; nobody may be saving it now."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)


def write_npz(file: BinaryIO, **arrays: npt.NDArray[Any]) -> None:
    """Write arrays of numbers and text into an open file; none of them needs pickle."""
    np.savez(file, **arrays)  # type: ignore[arg-type]


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut; nothing, where folders cannot be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def load(path: Path) -> Content:
    """Return what a pilot file holds, whatever of the three formats it has.

    Raises
    ------
    PilotError
        The file is missing, empty, damaged, ragged, or of another kind.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    except OSError as error:
        raise PilotError(
            f"{path}: cannot be read ({error.strerror}); give the path of a calibration."
        ) from error
    if head.startswith(b"PK"):
        return _load_npz(path)
    if head.startswith(b"["):
        return _load_records(path)
    if head.startswith(b"{"):
        return _load_lines(path)
    what = "is empty" if not head else "is not a pilot file"
    raise PilotError(
        f"{path}: {what}; expected a calibration (.npz), JSON lines "
        '{"prompt": ..., "rewards": {...}} or a JSON list of records.'
    )


def read_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays that `write_npz` wrote.

    Raises
    ------
    PilotError
        The file is missing, damaged, or of another kind.
    """
    try:
        # Opened here, because np.load leaves its own handle open when the archive is damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (
        OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error,
        TypeError,  # a single array is no archive
        RuntimeError,  # zipfile's, where a damaged header asks for a password or another method
    ) as error:  # fmt: skip
        raise PilotError(
            f"{path}: damaged or cut short ({error}); restore it or calibrate again."
        ) from error


def _load_npz(path: Path) -> Content:
    arrays = read_npz(path)
    written = str(arrays.get("format", "nothing"))
    names = {"rewards", "values", "pooled", "metadata", "fingerprint"}
    if written == RAGGED_FORMAT:
        names.add("counts")
    if written not in (FORMAT, RAGGED_FORMAT) or not names <= set(arrays):
        raise PilotError(
            f"{path}: holds {written!r}, not a {FORMAT!r} calibration; make one with "
            "`palette calibrate` or PilotSet.save."
        )
    try:
        metadata = json.loads(str(arrays["metadata"]))
        if not isinstance(metadata, dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError) as error:
        raise PilotError(f"{path}: its metadata is damaged ({error}); calibrate again.") from error
    return Content(
        rewards=arrays["rewards"],
        values=tuple(str(name) for name in np.atleast_1d(arrays["values"])),
        pooled=bool(arrays["pooled"]),
        metadata=metadata,
        fingerprint=str(arrays["fingerprint"]),
        counts=arrays["counts"] if written == RAGGED_FORMAT else None,
    )


def _load_lines(path: Path) -> Content:
    """Read ``{"prompt": ..., "rewards": {"humor": [r_1, ..., r_K], ...}}``, one prompt a line."""
    prompts: list[list[list[float]]] = []
    values: tuple[str, ...] = ()
    n_candidates = 0
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        record = _parse(line, where)
        rewards = record.get("rewards") if isinstance(record, dict) else None
        if not isinstance(rewards, dict) or not rewards:
            raise PilotError(f'{where}: no "rewards" object, value name -> list of numbers.')
        values = values or tuple(rewards)
        if set(rewards) != set(values):
            odd = sorted(set(rewards) ^ set(values))
            raise PilotError(
                f"{where}: its values differ from the first line's ({', '.join(odd)}); score "
                "every prompt with every reward."
            )
        columns = []
        for name in values:
            column = rewards[name]
            if not isinstance(column, list) or not column or not all(map(_is_number, column)):
                raise PilotError(f"{where}: {name} is not a list of finite numbers.")
            n_candidates = n_candidates or len(column)
            if len(column) != n_candidates:
                raise PilotError(
                    f"{where}: {name} has {len(column)} rewards where the first line has "
                    f"{n_candidates}; give every prompt the same number of answers."
                )
            columns.append(column)
        prompts.append(columns)
    return Content(np.array(prompts, dtype=np.float64).transpose(0, 2, 1), values, pooled=False)


def _load_records(path: Path) -> Content:
    """Read ``[{"humor": 2.5, ...}, ...]``: one answer a prompt; anything but numbers is ignored."""
    records = _parse(_text(path), str(path))
    if not records or not all(isinstance(record, dict) for record in records):
        raise PilotError(f'{path}: expected a list of records such as {{"humor": 2.5}}.')
    values = tuple(key for key, entry in records[0].items() if isinstance(entry, int | float))
    values = tuple(key for key in values if not isinstance(records[0][key], bool))
    if not values:
        raise PilotError(f"{path}, record 1: no numbers, so no values; give one number a value.")
    for number, record in enumerate(records, start=1):
        for name in values:
            if not _is_number(record.get(name)):
                raise PilotError(
                    f"{path}, record {number}: {name} is {record.get(name)!r} where a finite "
                    "number is needed; score every answer with every reward."
                )
        extra = [key for key in record if key not in values and _is_number(record[key])]
        if extra:
            raise PilotError(
                f"{path}, record {number}: {extra[0]} is not in record 1; score every answer with "
                "every reward."
            )
    return Content([[record[name] for name in values] for record in records], values, pooled=True)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PilotError(f"{path}: cannot be read as UTF-8 text ({error}).") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PilotError(f"{where}: not JSON ({error}); the file may be cut short.") from error


def _is_number(entry: object) -> bool:
    return (
        isinstance(entry, int | float) and not isinstance(entry, bool) and abs(entry) < float("inf")
    )
