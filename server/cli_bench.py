"""The command that measures this server's stages on this machine."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from server.cli_support import (
    BAD_USAGE,
    AsJson,
    CalibrationFile,
    Device,
    MaxTokens,
    Model,
    Rewards,
    Seed,
    fail,
    palette_option,
    run,
    settings_of,
)
from server.schemas import PaletteOptions


def bench(
    candidates: Annotated[int, typer.Option(min=1, max=1024, help="N of every request.")] = 16,
    clients: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 1,
    requests: Annotated[int, typer.Option(min=1, help="Requests measured, of each kind.")] = 16,
    palette: Annotated[
        str, typer.Option(help="JSON; by default all values are scored and none is asked for.")
    ] = "{}",
    model: Model = None,
    rewards: Rewards = None,
    calibration: CalibrationFile = None,
    device: Device = None,
    max_tokens: MaxTokens = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure where the time of an aligned request goes, beside plain requests of as many tokens.

    Example: `palette bench --candidates 16 --clients 4 --requests 32`
    """
    options = palette_option(palette) or PaletteOptions()
    settings = settings_of(
        model=model,
        rewards=rewards,
        calibration=calibration,
        device=device,
        max_tokens=max_tokens,
    )
    most = settings.max_running + settings.max_queue
    if clients > most:
        fail(
            f"--clients: this server refuses more than {most} requests at once; ask for fewer, or "
            "raise PALETTE_MAX_QUEUE",
            BAD_USAGE,
        )
    from server.bench import bench_settings, print_bench  # torch is slow to import

    found = run(
        bench_settings(
            settings, options, n_candidates=candidates, n_clients=clients, n_requests=requests,
            seed=seed,
        )
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(found, allow_nan=False))
    else:
        print_bench(found)
