"""Aligns a file of prompts: resumable, nothing lost when it is stopped."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from server.alignment import Aligner
from server.alignment_stages import AlignmentRequest
from server.backends.base import ContextLengthError, PromptError, SamplingSettings
from server.calibrator import Progress
from server.prompts import Conversation
from server.schemas import PaletteOptions

# How every line begins: what is left of a torn one is known by it.
_HEAD = b'{"index": '


class OutputError(Exception):
    """The output file cannot be continued; the message says why and what to do."""


def run_key(
    aligner: Aligner,
    prompts: Sequence[Conversation],
    palette: PaletteOptions | None,
    sampling: SamplingSettings,
    seed: int,
) -> str:
    """Return what tells one run from another: lines of different runs must not mix in a file."""
    record: dict[str, Any] = {
        "prompts": prompts,
        "sampling": asdict(sampling),
        "seed": seed,
        "model": aligner.backend.fingerprint,
    }
    if palette is not None:
        shelf = aligner.shelf
        used = [shelf.choose(sampling, messages, palette.calibration) for messages in prompts]
        found = sorted({one.pilot.fingerprint for one in used if one is not None})
        record |= {
            "palette": palette.model_dump(exclude={"profile"}),  # it is in the rest
            "rewards": aligner.rewards.fingerprint,
            "calibration": " ".join(found) or None,
        }
    text = json.dumps(record, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def answered(path: Path, key: str, n_prompts: int) -> dict[int, bool]:
    """Return, by index, whether the answers that a file already has were refused.

    A line cut in half is removed.

    Raises
    ------
    OutputError
        When the file holds something else, or lines of another run. It is left as it is.
    """
    found: dict[int, bool] = {}

    def take(record: Any) -> bool:
        index, run, is_refused = record["index"], record["run"], "error" in record
        if run != key or type(index) is not int or not 0 <= index < n_prompts:
            return False
        found[index] = is_refused
        return True

    continue_lines(
        path,
        take,
        "`palette generate`",
        "answers to other prompts, or of another palette, seed, model, calibration or other "
        "settings",
    )
    return found


def continue_lines(path: Path, take: Callable[[Any], bool], command: str, others: str) -> None:
    """Hand every line of a file to `take` and remove a last one that was cut in half.

    Parameters
    ----------
    path : Path
        JSONL whose lines begin with their index; it need not exist.
    take : callable
        Returns False for the record of another run; ValueError, KeyError and TypeError mean that
        it is none at all.
    command, others : str
        What writes such files, and what such a file of another run holds.

    Raises
    ------
    OutputError
        When the file holds something else, or lines of another run. It is left as it is.
    """
    if not path.exists():
        return
    remedy = "write to another file, or delete this one"
    with path.open("r+b") as file:
        whole = 0
        for line in file:
            if not line.endswith(b"\n") and line.startswith(_HEAD[: len(line)]):
                break  # the process ended while it wrote this line
            try:
                is_ours = take(json.loads(line))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                msg = f"{path} is no output of {command}: {remedy}"
                raise OutputError(msg) from error
            if not is_ours:
                raise OutputError(f"{path} holds {others}: {remedy}")
            whole += len(line)
        file.truncate(whole)


async def generate_file(
    aligner: Aligner,
    prompts: Sequence[Conversation],
    out: Path,
    *,
    palette: PaletteOptions | None,
    sampling: SamplingSettings,
    seed: int = 0,
    concurrency: int = 4,
    progress: Progress = lambda done, total: None,
) -> int:
    """Write one JSON line per prompt as its answer is chosen; return how many were refused.

    Each answer depends on its prompt, the palette, the settings and (seed, index) alone, so a run
    that was stopped and continued gives the same answers as one that was not.

    Raises
    ------
    OutputError
        See `answered`.
    PaletteError, InfeasiblePaletteError, CalibrationMissingError, BackendError, RewardError
        The first failure ends the run; what was answered stays in the file.
    """
    # Looked up once: lines of two versions of a profile must not mix.
    palette = (await aligner.layers.resolve(palette)).options
    key = run_key(aligner, prompts, palette, sampling, seed)
    have = answered(out, key, len(prompts))
    waiting = iter([index for index in range(len(prompts)) if index not in have])
    done, refused = len(have), sum(have.values())
    progress(done, len(prompts))
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("ab") as file:

        async def work() -> None:
            nonlocal done, refused
            for index in waiting:
                record: dict[str, Any] = {"index": index, "run": key}
                request = AlignmentRequest(
                    messages=prompts[index],
                    sampling=sampling,
                    n_choices=1,
                    seed=seed_of(seed, index),
                    palette=palette,
                )
                try:
                    aligned = await aligner.run(await aligner.plan(request))
                except (PromptError, ContextLengthError) as error:
                    refused += 1
                    record |= {"answer": None, "error": str(error)}
                else:
                    served = aligned.chosen[0] if aligned.chosen else None
                    record |= {
                        "messages": prompts[index],
                        "answer": served.text if served else None,
                        "finish_reason": served.finish_reason if served else "content_filter",
                        "palette": aligned.report.model_dump(mode="json")
                        if aligned.report
                        else None,
                    }
                line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
                file.write(line.encode())
                file.flush()
                done += 1
                progress(done, len(prompts))

        try:
            async with asyncio.TaskGroup() as group:
                # More would only wait in the queue, and be refused when that is full.
                for _ in range(min(concurrency, aligner.admission.max_running)):
                    group.create_task(work())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            os.fsync(file.fileno())
    return refused


def seed_of(seed: int, index: int) -> int:
    """Return the seed of one prompt of a file."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> 1)
