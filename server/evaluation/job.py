"""The work behind ``palette evaluate``: promise, collect, compare, write."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rewards.transforms import LENGTH
from server import terminal
from server.aligning import translated
from server.alignment import Aligner
from server.app import running_aligner
from server.calibration import Calibration, CalibrationMissingError
from server.evaluation.collecting import Collected, collect
from server.evaluation.methods import senses_of
from server.evaluation.report import make_report
from server.promise import InfeasiblePaletteError, Promise, Promiser
from server.prompts import PromptsError, read_prompts
from server.schemas import PaletteOptions
from server.settings import Settings
from server.threads import share_cores
from solver import Palette, PaletteError, frontier

Json = dict[str, Any]

CANDIDATES_FILE, REPORT_FILE, PAGE_FILE = "candidates.jsonl", "report.json", "report.html"

# Curves of one palette; more pairs than these say little on one page.
MOST_CURVES = 3
_POINTS = 15


async def evaluate_file(
    settings: Settings,
    prompts: Path,
    out: Path,
    palettes: Sequence[PaletteOptions],
    *,
    n_candidates: int,
    limit: int | None,
    concurrency: int,
    seed: int,
    keep_texts: bool,
    is_page_wanted: bool,
) -> Json:
    """Return the report of an evaluation, once it is written to the folder `out`.

    Raises
    ------
    PromptsError
        The file has no two prompts that the model can answer.
    PaletteError, InfeasiblePaletteError, CalibrationMissingError
        A palette cannot be evaluated; told before anything is sampled.
    OutputError
        The folder has the candidates of another run.
    BackendError, RewardError
        See `collect`.
    """
    conversations = read_prompts(prompts)
    settings = settings.model_copy(update={"max_running": concurrency})
    share_cores(settings)
    async with running_aligner(settings) as aligner:
        promises = await promised(aligner, palettes, n_candidates)
        with terminal.progress_bar("sampling") as progress:
            collected = await collect(
                aligner.backend,
                aligner.rewards,
                conversations,
                out / CANDIDATES_FILE,
                limit=limit,
                n_candidates=n_candidates,
                sampling=settings.sampling,
                seed=seed,
                keep_texts=keep_texts,
                concurrency=concurrency,
                progress=progress,
            )
        collected = _aligned(collected, aligner)
        if len(set(collected.cluster.tolist())) < 2:
            msg = (
                f"{prompts}: fewer than two different prompts could be answered; an error needs "
                "two, and some hundred to be small"
            )
            raise PromptsError(msg)
        return await asyncio.to_thread(
            _write, aligner, settings, palettes, promises, collected, out,
            n_candidates, seed, is_page_wanted,
        )  # fmt: skip


async def promised(
    aligner: Aligner, palettes: Sequence[PaletteOptions], n_candidates: int
) -> list[Promise]:
    """Return what the server promises for each palette with these candidates.

    Raises
    ------
    PaletteError, InfeasiblePaletteError, CalibrationMissingError
        Naming the palette.
    """
    if aligner.calibration is None:
        msg = (
            f"{aligner.backend.model_id} has no calibration, so no level is promised: make one "
            "with `palette calibrate`, or name it with --calibration"
        )
        raise CalibrationMissingError(msg)
    promiser = Promiser(
        aligner.rewards.names, default_candidates=n_candidates, max_candidates=n_candidates
    )
    promises = []
    for k, asked in enumerate(palettes):
        where = f"palette {k + 1}"
        options = (await aligner.layers.resolve(asked)).options
        assert options is not None  # a palette was given
        options = translated(options, aligner.calibration, aligner.rewards)
        if options.candidates is None:  # not fewer where the calibration has fewer: all are used
            options = options.model_copy(update={"candidates": n_candidates})
        if options.scope == "answer" or options.deadline_ms is not None:
            field = "scope" if options.scope == "answer" else "deadline_ms"
            msg = (
                f"{where}: {field}: what is evaluated is what is promised on average over "
                "prompts; leave it out"
            )
            raise PaletteError(msg, field)
        if isinstance(options.candidates, int) and options.candidates > n_candidates:
            msg = (
                f"{where}: candidates: {options.candidates} are more than the {n_candidates} that "
                "are sampled; raise --candidates"
            )
            raise PaletteError(msg, "candidates")
        try:
            promises.append(await promiser.on_traffic(options, aligner.calibration))
        except InfeasiblePaletteError as error:
            raise InfeasiblePaletteError(f"{where}: {error}", error.details) from error
    return promises


def _aligned(collected: Collected, aligner: Aligner) -> Collected:
    """Return what was collected, with the rewards that are aligned in place of the measured."""
    units = None if aligner.calibration is None else aligner.calibration.units
    if units is None:
        return collected
    measured = np.concatenate([collected.rewards, collected.words[..., None]], axis=-1)
    columns = (*aligner.rewards.names, LENGTH)
    return replace(collected, rewards=units.of(columns).align(measured))


def curves(promise: Promise, calibration: Calibration) -> list[Json]:
    """Return the trade-off curves of pairs of values that a palette raises or lowers.

    Each with the rest of the palette held: the limit of what N candidates reach, and the levels
    that cost as much KL as the palette does.
    """
    pilot, palette = calibration.pilot, promise.palette
    senses = dict(zip(pilot.values, senses_of(palette, pilot.values).tolist(), strict=True))
    named = [
        value
        for value, target in palette.parsed.items()
        if senses[value] and target.kind != "multiplier"
    ]
    budget = promise.solution.kl if promise.solution is not None else 0.0
    found = []
    for pair in itertools.islice(itertools.combinations(named, 2), MOST_CURVES):
        curve: Json = {"values": list(pair), "max_kl": budget}
        for name, max_kl in (("limit", None), ("at_kl", budget)):
            # A budget of nothing leaves nothing to trade.
            points = (
                frontier(
                    Palette(palette.targets, palette.floors, palette.on_floor),
                    pilot,
                    pair,
                    promise.n_candidates,
                    n_points=_POINTS,
                    max_kl=max_kl,
                    senses={value: "less" for value in pair if senses[value] < 0},
                ).points
                if max_kl is None or max_kl > 0
                else ()
            )
            curve[name] = [
                [float(point.limit[value]) for value in pair]
                for point in points
                if all(math.isfinite(point.limit[value]) for value in pair)
            ]
        found.append(curve)
    return found


def _write(
    aligner: Aligner,
    settings: Settings,
    palettes: Sequence[PaletteOptions],
    promises: Sequence[Promise],
    collected: Collected,
    out: Path,
    n_candidates: int,
    seed: int,
    is_page_wanted: bool,
) -> Json:
    calibration = aligner.calibration
    if calibration is None:
        raise CalibrationMissingError("there is no calibration")
    report = make_report(
        palettes,
        promises,
        calibration,
        collected,
        model=aligner.backend.model_id,
        n_candidates=n_candidates,
        seed=seed,
        watches=aligner.rewards.watches,
        warnings=calibration.warnings_for(
            aligner.backend.fingerprint, aligner.rewards.fingerprint, settings.sampling
        ),
        frontiers=[curves(promise, calibration) for promise in promises],
    )
    _replace(out / REPORT_FILE, json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False))
    if is_page_wanted:
        from server.evaluation.page import make_page  # matplotlib is an extra, and slow to import

        _replace(out / PAGE_FILE, make_page(report))
    return report


def _replace(path: Path, text: str) -> None:
    """Write a file in one piece: a reader sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
