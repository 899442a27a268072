"""The commands about rewards files: no server, and a chat model only for judged values."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli_support import BAD_USAGE, FAILED, AsJson, fail, guard, settings_of

if TYPE_CHECKING:
    from rich.console import Console

    from rewards.checking import Report, ScorerReport

app = typer.Typer(
    help="Rewards files: the values that can be asked for, and what measures them.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@app.callback()
def _group() -> None:
    """Rewards files: the values that can be asked for, and what measures them."""


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="YAML file of values.", dir_okay=False)],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    model: Annotated[
        str | None,
        typer.Option(help="Chat model that judged values ask; else they are not tested."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Load every scorer of a rewards file, test it, and tell its size, licence and speed.

    Ends with 0 when a server would start with it, 1 when a test fails, 2 when the file is wrong.

    Example: `palette rewards check my-values.yaml --model Qwen/Qwen3-8B`
    """
    from rewards import load_rewards
    from rewards.checking import check_rewards
    from rewards.errors import RewardConfigError
    from server import terminal  # slow to import: not for `palette --help`

    def work() -> Report:
        try:
            with terminal.errors.status("loading") as status:

                def tell(name: str) -> None:
                    status.update(f"testing {name}")

                if model is None or not load_rewards(file).needs_judge:
                    return check_rewards(file, device=device, tell=tell)
                from server.jobs import check_with_model

                settings = settings_of(model=model, device=device)
                return asyncio.run(check_with_model(settings, file, device, tell))
        except RewardConfigError as error:
            fail(str(error), BAD_USAGE)

    report = guard(work)
    if as_json:
        typer.echo(json.dumps(report.as_json(), allow_nan=False))
    else:
        _print(report, terminal.results)
    if not report.is_sound:
        raise typer.Exit(FAILED)


def _print(report: Report, console: Console) -> None:
    for scorer in report.scorers:
        _line(console, f"[bold]{scorer.name}[/]", f"{scorer.kind} {scorer.model or ''}".strip())
        for fact in _facts(scorer):
            _line(console, "   ", fact)
        if scorer.problem:
            _line(console, "    [red]failed[/]:", scorer.problem)
        for warning in scorer.warnings:
            _line(console, "    [yellow]warning[/]:", warning)
    console.print()
    for value in report.values:
        if value.problem:
            _line(console, f"[bold]{value.name}[/] [red]failed[/]:", value.problem)
        elif value.is_tested:
            _line(
                console,
                f"[bold]{value.name}[/]",
                f"tells better from worse ({value.n_pairs} pairs)",
            )
        elif value.n_pairs:
            told = "is not tested, for a scorer that it needs is not"
            _line(console, f"[bold]{value.name}[/]", told)
    untested = [value.name for value in report.values if not (value.problem or value.n_pairs)]
    if untested:
        told = "is not tested, for there is no pair of a better and a worse answer (check:)"
        _line(console, f"the sign of [bold]{', '.join(untested)}[/]", told)


def _line(console: Console, marked: str, text: str) -> None:
    console.print(marked, end=" ")
    console.print(text, markup=False, soft_wrap=True)


def _facts(scorer: ScorerReport) -> list[str]:
    size = []
    if scorer.n_parameters is not None and scorer.n_bytes is not None:
        size = [f"{scorer.n_parameters / 1e6:,.4g} M parameters, {scorer.n_bytes / 1e6:,.0f} MB"]
    if scorer.licence is not None:
        size.append(f"licence {scorer.licence}")
    if scorer.max_length is not None:
        size.append(f"up to {scorer.max_length} tokens")
    speed = []
    if scorer.texts_per_s is not None:
        speed = [f"{scorer.texts_per_s:,.3g} texts/s"]
    if scorer.ms_per_1k_tokens is not None:
        speed.append(f"{scorer.ms_per_1k_tokens:,.3g} ms per 1,000 tokens")
    tests = [f"passed: {', '.join(scorer.passed)}"] if scorer.passed else []
    return [", ".join(part) for part in (size, [*speed, *tests]) if part]
