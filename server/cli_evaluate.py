"""The command that evaluates palettes on held-out prompts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
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
    Temperature,
    TopK,
    TopP,
    fail,
    palette_option,
    run,
    settings_of,
)
from server.schemas import PaletteOptions


def evaluate(
    prompts: Annotated[
        Path,
        typer.Argument(help="JSONL of strings or messages, not those of the calibration."),
    ],
    palette: Annotated[
        list[str],
        typer.Option(help='JSON, as `{"targets": {...}}`; repeat to compare palettes.'),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder to write; continued when it exists.", file_okay=False)
    ] = Path("evaluation"),
    candidates: Annotated[int, typer.Option(min=2, max=1024, help="N, per prompt.")] = 16,
    limit: Annotated[int | None, typer.Option(min=2, help="Only the first prompts.")] = None,
    keep_texts: Annotated[
        bool, typer.Option("--keep-texts", help="Write the answers' texts to the folder too.")
    ] = False,
    html: Annotated[bool, typer.Option(help="Write report.html, with plots.")] = True,
    model: Model = None,
    rewards: Rewards = None,
    calibration: CalibrationFile = None,
    device: Device = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    max_tokens: MaxTokens = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Prompts in flight.")] = 4,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Serve held-out prompts under palettes: realised against asked, and against other methods.

    Candidates are sampled once and kept as numbers in the folder: run it again to continue, with
    other palettes to compare them on the same candidates, or with more prompts.

    Example: `palette evaluate heldout.jsonl --palette '{"targets": {"helpful": {"gain": 0.3}}}'
    --palette '{"targets": {"helpful": {"gain": 0.3}, "harmless": "keep"}}' --limit 200`
    """
    options = [palette_option(text) or PaletteOptions() for text in palette]
    settings = settings_of(
        model=model,
        rewards=rewards,
        calibration=calibration,
        device=device,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_tokens=max_tokens,
    )
    if html and importlib.util.find_spec("matplotlib") is None:
        fail(
            'report.html needs matplotlib: pip install "palette-server[evaluate]", or leave the '
            "page out with --no-html",
            BAD_USAGE,
        )
    # torch and scipy are slow to import: not for `palette --help`
    from server.evaluation.job import evaluate_file
    from server.evaluation.tables import print_report

    report = run(
        evaluate_file(
            settings, prompts, out, options, n_candidates=candidates, limit=limit,
            concurrency=concurrency, seed=seed, keep_texts=keep_texts, is_page_wanted=html,
        )
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(report, allow_nan=False, ensure_ascii=False))
    else:
        print_report(report)
    typer.echo(f"report written to {out}", err=True)
