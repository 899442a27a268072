"""The work behind the commands that load models and end: calibrate, generate, score."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from rewards import RewardError, Sample
from rewards.checking import Report, check_rewards
from rewards.judging import ChatModel
from server import terminal
from server.app import make_rewards, running_aligner
from server.backends.base import BackendError
from server.backends.choice import make_backend
from server.batch import OutputError, generate_file
from server.calibrating import make_calibration
from server.calibration import CalibrationError, CalibrationMissingError
from server.cli_support import BAD_USAGE, FAILED, INFEASIBLE
from server.profile_file import ProfileError
from server.profiles import ProfileNameError
from server.promise import InfeasiblePaletteError
from server.prompt_sources import PromptSource
from server.prompts import PromptsError, parse_prompt, read_prompts
from server.schemas import PaletteOptions
from server.settings import Settings
from server.threads import share_cores
from solver import PaletteError, PilotError, SolverError

_USAGE_ERRORS = (PaletteError, PilotError, PromptsError, OutputError, ProfileNameError)
_RUN_ERRORS = (
    BackendError,
    RewardError,
    SolverError,
    CalibrationError,
    CalibrationMissingError,
    ProfileError,
    OSError,
)

# Answers handed to the rewards at once: enough to fill batches, little enough to show progress.
SCORE_CHUNK = 512


def exit_code(error: Exception) -> int | None:
    """Return the exit code of an error that a user can mend; None for any other."""
    if isinstance(error, InfeasiblePaletteError):
        return INFEASIBLE
    if isinstance(error, _USAGE_ERRORS):
        return BAD_USAGE
    return FAILED if isinstance(error, _RUN_ERRORS) else None


async def calibrate_to_file(
    settings: Settings,
    source: PromptSource,
    out: Path | None,
    *,
    n_candidates: int,
    name: str | None,
    concurrency: int,
    seed: int,
) -> tuple[str, Path]:
    """Make a calibration, or continue one; return its id and where it was written."""
    conversations, told = source.read(seed)
    share_cores(settings)
    backend, rewards = make_backend(settings), make_rewards(settings)
    try:
        await backend.start()
        rewards.use_judge(backend)
        await rewards.start()
        with terminal.progress_bar("calibrating") as progress:
            calibration, path = await make_calibration(
                backend,
                rewards,
                conversations,
                state_dir=settings.state_dir,
                out=out,
                n_candidates=n_candidates,
                sampling=settings.sampling,
                seed=seed,
                prompts_source=told,
                name=name,
                concurrency=concurrency,
                progress=progress,
            )
    finally:
        await backend.close()
        await rewards.close()
    return calibration.id, path


async def fingerprints_in_use(settings: Settings) -> tuple[str, str]:
    """Return the fingerprints of the model and of the rewards of the settings.

    The chat model is not loaded: its files say what it is, or its server. Reward models are.
    """
    if settings.upstream_url is None:
        from server.backends.hf_loading import identify

        model = identify(settings.model, settings.revision, settings.trust_remote_code)
    else:
        backend = make_backend(settings)
        try:
            await backend.start()
            model = backend.fingerprint
        finally:
            await backend.close()
    async with make_rewards(settings) as rewards:
        return model, rewards.fingerprint


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
    # Reward models alone do without the chat model.
    backend = make_backend(settings) if suite.needs_judge else None
    try:
        if backend is not None:
            await backend.start()
            suite.use_judge(backend)
        await suite.start()
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
        if backend is not None:
            await backend.close()
        await suite.close()


async def check_with_model(
    settings: Settings, file: Path, device: str, tell: Callable[[str], None]
) -> Report:
    """Return what is found of a rewards file when the chat model of the settings is asked too."""
    share_cores(settings)
    backend = make_backend(settings)
    try:
        await backend.start()
        chat = ChatModel(backend, asyncio.get_running_loop())
        return await asyncio.to_thread(check_rewards, file, device=device, tell=tell, chat=chat)
    finally:
        await backend.close()


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
