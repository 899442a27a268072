"""The work behind the commands that end: calibrate, solve, generate, score."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from rewards import RewardError, Sample
from server import embedded, terminal
from server.app import calibration_path, make_backend, make_rewards, running_aligner
from server.backends.base import BackendError
from server.batch import OutputError, generate_file
from server.calibration import CalibrationError, CalibrationMissingError
from server.calibrator import calibrate
from server.promise import AUTO_CANDIDATES, InfeasiblePaletteError
from server.prompts import PromptsError, parse_prompt, read_prompts
from server.schemas import PaletteOptions
from server.settings import Settings
from server.threads import share_cores
from solver import (
    Palette,
    PaletteError,
    PilotError,
    PilotSet,
    SolverError,
    Status,
    min_candidates,
    repair,
)
from solver import solve as solve_palette

INFEASIBLE_ERRORS = (InfeasiblePaletteError,)
USAGE_ERRORS = (PaletteError, PilotError, PromptsError, OutputError)
RUN_ERRORS = (
    BackendError,
    RewardError,
    SolverError,
    CalibrationError,
    CalibrationMissingError,
    OSError,
)

# Answers handed to the rewards at once: enough to fill batches, little enough to show progress.
SCORE_CHUNK = 512


async def calibrate_to_file(
    settings: Settings,
    prompts: Path | None,
    out: Path | None,
    *,
    n_candidates: int,
    limit: int | None,
    concurrency: int,
    seed: int,
) -> Path:
    """Make a calibration, write it in one piece, and return where."""
    conversations = read_prompts(prompts or embedded.PROMPTS)[:limit]
    share_cores(settings)
    backend, rewards = make_backend(settings), make_rewards(settings)
    try:
        await backend.start()
        await rewards.start()
        with terminal.progress_bar("calibrating") as progress:
            calibration = await calibrate(
                backend,
                rewards,
                conversations,
                n_candidates=n_candidates,
                sampling=settings.sampling,
                seed=seed,
                prompts_source=prompts.name if prompts else "the shipped general prompts",
                concurrency=concurrency,
                progress=progress,
            )
        path = out or calibration_path(settings, backend, rewards)
        calibration.save(path)
    finally:
        await backend.close()
        await rewards.close()
    return path


def solve_file(
    path: Path,
    targets: Mapping[str, Any],
    n_candidates: float | Literal["auto"],
    *,
    on_infeasible: str,
    method: Literal["interpolate", "nearest", "greedy"],
    max_kl: float | None,
    groups: int | None,
    seed: int,
) -> dict[str, Any]:
    """Return DESIGN.md 4.2's object for a palette on a pilot file."""
    pilot, palette = PilotSet.load(path), Palette(targets)
    smallest = min_candidates(palette, pilot, seed=seed)
    options: dict[str, Any] = {"groups": groups, "seed": seed}
    if isinstance(n_candidates, str):
        most = pilot.n_prompts if pilot.pooled else pilot.n_candidates
        n: float = min(next((n for n in AUTO_CANDIDATES if n >= (smallest or 1)), most), most)
    else:
        n = n_candidates
    solution = solve_palette(palette, pilot, n, max_kl=max_kl, **options)
    result = solution.to_dict() | {"min_candidates": smallest, "repaired": None}
    if solution.status is not Status.OPTIMAL and on_infeasible != "reject":
        mended = repair(
            palette,
            pilot,
            n,
            method if on_infeasible == "repair" else "nearest",
            max_kl=max_kl,
            **options,
        )
        result = mended.solution.to_dict() | {
            "status": "repaired" if on_infeasible == "repair" else "best_effort",
            "certificate": result["certificate"],
            "min_candidates": smallest,
            "repaired": mended.to_dict(),
        }
    return result


def print_solution(result: Mapping[str, Any]) -> None:
    """Print a solution as a table."""
    table = Table(box=None, pad_edge=False)
    for heading in ("value", "target", "multiplier", "expected", "±", "base"):
        table.add_column(heading, justify="left" if heading == "value" else "right")
    is_solved = result["status"] in ("optimal", "repaired", "best_effort", "boundary")
    for name in result["values"]:
        target = result["targets"].get(name)
        solved = [result[key][name] for key in ("multipliers", "expected", "stderr")]
        table.add_row(
            name,
            "" if target is None else _number(target),
            *(_number(number if is_solved else None) for number in solved),
            _number(result["base"][name]),
        )
    terminal.results.print(table)
    certificate = result["certificate"]
    terminal.results.print(
        f"\n{result['status']} with {result['candidates']} candidates"
        + (f"; ESS {_number(result['ess'])}, KL {_number(result['kl'])} nats" * is_solved)
        + f"; smallest N {result['min_candidates'] or 'unknown: more than the pilot has'}"
    )
    if certificate:
        terminal.results.print(certificate["sentence"], soft_wrap=True)


async def generate_to_file(
    settings: Settings,
    prompts: Path,
    out: Path,
    palette: PaletteOptions | None,
    *,
    concurrency: int,
    seed: int,
) -> int:
    """Answer a file of prompts; return how many could not be answered."""
    conversations = read_prompts(prompts)
    # The limit protects a server from its clients; here the operator is the only one.
    settings = settings.model_copy(update={"max_running": concurrency})
    share_cores(settings)
    async with running_aligner(settings) as aligner:
        with terminal.progress_bar("generating") as progress:
            return await generate_file(
                aligner,
                conversations,
                out,
                palette=palette,
                sampling=settings.sampling,
                seed=seed,
                concurrency=concurrency,
                progress=progress,
            )


async def score_to_file(settings: Settings, file: Path, out: Path | None) -> None:
    """Score the answers of a file, line by line in the same order."""
    suite = make_rewards(settings)
    samples = list(_read_answers(file))
    share_cores(settings)
    await suite.start()
    try:
        names = suite.text_only_names
        with ExitStack() as stack:
            target = sys.stdout if out is None else stack.enter_context(out.open("w"))
            progress = stack.enter_context(terminal.progress_bar("scoring"))
            for start in range(0, len(samples), SCORE_CHUNK):
                chunk = samples[start : start + SCORE_CHUNK]
                for row in (await suite.score(chunk, names)).tolist():
                    target.write(json.dumps({"rewards": dict(zip(names, row, strict=True))}) + "\n")
                progress(start + len(chunk), len(samples))
    finally:
        await suite.close()


def _read_answers(file: Path) -> Iterable[Sample]:
    where = "standard input" if str(file) == "-" else str(file)
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"answers {where} cannot be read: {error}"
        raise PromptsError(msg) from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            messages = parse_prompt(record)
            answer = record["answer"]
            if not isinstance(answer, str):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            msg = (
                f"{where}, line {number}: each line is "
                f'{{"messages": [...] or "prompt": "...", "answer": "..."}} ({error})'
            )
            raise PromptsError(msg) from error
        yield Sample(messages=messages, answer=answer)


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return " to ".join(_number(one) for one in value)
    return f"{value:.4g}"
