"""From prompts to a calibration that is kept; what was done before it was stopped is not lost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rewards import RewardSuite
from server.backends.base import Backend, SamplingSettings
from server.calibration import Calibration, default_path
from server.calibrator import Progress, calibrate
from server.journal import open_journal, partial_path, run_key
from server.prompts import Conversation, hash_of
from solver.pilot_files import sweep


async def make_calibration(
    backend: Backend,
    rewards: RewardSuite,
    prompts: Sequence[Conversation],
    *,
    state_dir: Path,
    out: Path | None = None,
    n_candidates: int,
    sampling: SamplingSettings,
    seed: int = 0,
    prompts_source: str,
    name: str | None = None,
    concurrency: int = 4,
    progress: Progress = lambda done, total: None,
) -> tuple[Calibration, Path]:
    """Return a calibration and where it was written.

    Stopped, in whatever way, and called again with the same arguments, it goes on with the prompts
    that are not done; the result is that of a run that was not stopped. A run that differs in
    anything that decides the numbers has another file in `state_dir`.

    Parameters
    ----------
    state_dir : Path
    out : Path, optional
        Written instead of a file in `state_dir`.
    backend, rewards, prompts, n_candidates, sampling, seed, prompts_source, name, concurrency,
    progress
        See `calibrate`.

    Raises
    ------
    CalibrationError
        As `calibrate` and `open_journal`.
    BackendError, RewardError, PilotError, OSError
    """
    header = run_header(
        backend, rewards, prompts, n_candidates=n_candidates, sampling=sampling, seed=seed
    )
    path = out or default_path(
        state_dir, backend.model_id, backend.fingerprint, rewards.fingerprint, run_key(header)
    )
    journal = await asyncio.to_thread(open_journal, partial_path(path), header)
    try:
        await asyncio.to_thread(sweep, path)
        calibration = await calibrate(
            backend,
            rewards,
            prompts,
            n_candidates=n_candidates,
            sampling=sampling,
            seed=seed,
            prompts_source=prompts_source,
            name=name,
            concurrency=concurrency,
            progress=progress,
            journal=journal,
        )
        await asyncio.to_thread(calibration.save, path)
        journal.remove()
    finally:
        journal.close()
    return calibration, path


def run_header(
    backend: Backend,
    rewards: RewardSuite,
    prompts: Sequence[Conversation],
    *,
    n_candidates: int,
    sampling: SamplingSettings,
    seed: int,
) -> dict[str, Any]:
    """Return everything that decides the numbers of a calibration, JSON-able."""
    return {
        "model": backend.fingerprint,
        "max_context": backend.max_context,
        "rewards": rewards.fingerprint,
        "values": list(rewards.columns),
        "sampling": {**asdict(sampling), "stop": list(sampling.stop)},
        "candidates": n_candidates,
        "seed": seed,
        "prompts": len(prompts),
        "prompts_hash": hash_of(prompts),
    }
