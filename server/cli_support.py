"""What every command does alike: read JSON, run, and turn errors into one line and an exit code."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from pydantic import ValidationError

from server.schemas import PaletteOptions
from server.settings import Settings, SettingsError, load_settings

T = TypeVar("T")

# Exit codes.
FAILED, BAD_USAGE, INFEASIBLE = 1, 2, 3

Seed = Annotated[int, typer.Option(min=0, help="Same seed, same answers.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Model = Annotated[
    str | None, typer.Option(help="Local folder or hub name; by default the embedded model.")
]
Rewards = Annotated[Path | None, typer.Option(help="YAML file of values.", dir_okay=False)]
CalibrationFile = Annotated[Path | None, typer.Option(help="Calibration file.", dir_okay=False)]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Temperature = Annotated[float | None, typer.Option(min=0, max=2)]
TopP = Annotated[float | None, typer.Option(min=0, max=1)]
TopK = Annotated[int | None, typer.Option(min=0)]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")]


def json_option(name: str, text: str) -> Any:
    """Return what the text of an option means, or end with the remedy."""
    try:
        return json.loads(text)
    except ValueError as error:
        fail(f"{name} is no JSON ({error}); quote it for the shell: '{{\"a\": 1}}'", BAD_USAGE)


def palette_option(text: str) -> PaletteOptions | None:
    """Return the palette that the text of an option means, None for `null`, or end."""
    value = json_option("--palette", text)
    if value is None:
        return None
    try:
        return PaletteOptions.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        fail(f"--palette: {where}: {first['msg']}", BAD_USAGE)


def settings_of(**given: Any) -> Settings:
    """Return the settings of a command's options, None for those not given, or end."""
    try:
        return load_settings(**given)
    except SettingsError as error:
        fail(str(error), BAD_USAGE)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Return what asynchronous work returns; errors as `guard`."""
    return guard(lambda: asyncio.run(work))


def guard(work: Callable[[], T]) -> T:
    """Return what `work` returns, and turn what users can mend into one line and an exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return work()
    except KeyboardInterrupt:
        fail("stopped; what was written is whole, run the same command to continue", 130)
    except Exception as error:
        from server.jobs import exit_code  # knows every package's errors: slow to import

        code = exit_code(error)
        if code is None:
            raise
        fail(str(error), code)


def fail(message: str, code: int) -> NoReturn:
    """End the command."""
    typer.secho(f"palette: {message}", err=True, fg="red" if sys.stderr.isatty() else None)
    raise typer.Exit(code)
