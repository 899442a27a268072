"""The commands that work on a pilot file alone: no model, no server."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from server.cli_support import BAD_USAGE, INFEASIBLE, AsJson, Seed, fail, guard, json_option

Pilot = Annotated[
    Path, typer.Option("--pilot", help="Calibration, JSONL of groups, or flat JSON list.")
]
Targets = Annotated[str, typer.Option(help='JSON, as `{"harmless": {"quantile": 0.8}}`.')]
Candidates = Annotated[str, typer.Option(help="N, or `inf`.")]
MaxKl = Annotated[float | None, typer.Option(help="KL budget, nats.")]
Groups = Annotated[int | None, typer.Option(min=1, help="Groups drawn from the pilot.")]


class OnInfeasible(StrEnum):
    """What to do with a palette that cannot be met."""

    reject = "reject"
    repair = "repair"
    best_effort = "best_effort"


class Method(StrEnum):
    """How a palette that cannot be met is repaired."""

    interpolate = "interpolate"
    greedy = "greedy"
    nearest = "nearest"


def solve(
    pilot: Pilot,
    targets: Targets,
    candidates: Annotated[str, typer.Option(help="N, `auto` or `inf`.")] = "16",
    on_infeasible: OnInfeasible = OnInfeasible.reject,
    method: Annotated[Method, typer.Option(help="How to repair.")] = Method.interpolate,
    max_kl: MaxKl = None,
    ridge: Annotated[
        float, typer.Option(help="ρ: targets may be missed a little for smaller multipliers.")
    ] = 0.0,
    floors: Annotated[str, typer.Option(help='JSON, as `{"harmless": -1}`: per answer.')] = "{}",
    groups: Groups = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Solve a palette on a pilot set: multipliers, levels, prices and their errors.

    Example: `palette solve --pilot pilot.jsonl --targets '{"helpful": {"gain": 0.3}}' --json`
    """
    from server import pilot_jobs

    wanted, least = json_option("--targets", targets), json_option("--floors", floors)
    n_candidates: float | Literal["auto"] = "auto" if candidates == "auto" else _count(candidates)
    result = guard(
        lambda: pilot_jobs.solve_file(
            pilot, wanted, n_candidates, floors=least,
            on_infeasible=on_infeasible.value, method=method.value, max_kl=max_kl, ridge=ridge,
            groups=groups, seed=seed,
        )
    )  # fmt: skip
    _show(result, as_json, pilot_jobs.print_solution)
    if result["status"] not in ("optimal", "repaired", "best_effort"):
        raise typer.Exit(INFEASIBLE)


def frontier(
    pilot: Pilot,
    values: Annotated[str, typer.Option(help="The two values, as `helpful,harmless`.")],
    targets: Annotated[str, typer.Option(help="Palette of the other values, JSON.")] = "{}",
    candidates: Candidates = "16",
    points: Annotated[int, typer.Option(min=2, max=1001, help="Points of the curve.")] = 11,
    max_kl: MaxKl = None,
    less: Annotated[str, typer.Option(help="Which of the two is wanted low, as `words`.")] = "",
    groups: Groups = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Trade one value for another: the curve of what is achievable, with prices.

    Example: `palette frontier --pilot calibration.npz --values helpful,humorous --max-kl 1`
    """
    from server import pilot_jobs

    others = json_option("--targets", targets)
    result = guard(
        lambda: pilot_jobs.frontier_file(
            pilot, _names(values), others, _count(candidates),
            n_points=points, max_kl=max_kl, less=_names(less), groups=groups, seed=seed,
        )
    )  # fmt: skip
    _show(result, as_json, pilot_jobs.print_frontier)
    if not result["points"]:
        raise typer.Exit(INFEASIBLE)


def spread(
    pilot: Pilot,
    palettes: Annotated[int, typer.Option(min=1, max=256, help="How many, K.")] = 6,
    values: Annotated[str, typer.Option(help="Values to raise or keep; all by default.")] = "",
    candidates: Candidates = "16",
    max_kl: Annotated[float, typer.Option(help="KL of each palette, nats; inf for none.")] = 1.0,
    groups: Groups = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Propose palettes as different from each other as can be, to be offered as profiles.

    Example: `palette spread --pilot calibration.npz --palettes 8 --json`
    """
    from server import pilot_jobs

    result = guard(
        lambda: pilot_jobs.spread_file(
            pilot, palettes, _names(values) or None, _count(candidates),
            max_kl=None if max_kl == math.inf else max_kl, groups=groups, seed=seed,
        )
    )  # fmt: skip
    _show(result, as_json, pilot_jobs.print_spread)


def negotiate(
    pilot: Pilot,
    parties: Annotated[
        Path,
        typer.Option(help='JSON list of `{"name": ..., "targets": {...}, "weight": 1}`.'),
    ],
    candidates: Candidates = "16",
    max_kl: MaxKl = None,
    groups: Groups = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Find the palette that does best by the least satisfied of several parties.

    Example: `palette negotiate --pilot calibration.npz --parties parties.json`
    """
    from server import pilot_jobs

    result = guard(
        lambda: pilot_jobs.negotiate_file(
            pilot, parties, _count(candidates), max_kl=max_kl, groups=groups, seed=seed
        )
    )
    _show(result, as_json, pilot_jobs.print_agreement)


def interference(pilot: Pilot, seed: Seed = 0, as_json: AsJson = False) -> None:
    """Show which values pull on each other, and what that does to their multipliers.

    Example: `palette interference --pilot calibration.npz`
    """
    from server import pilot_jobs

    result = guard(lambda: pilot_jobs.interference_file(pilot, seed=seed))
    _show(result, as_json, pilot_jobs.print_interference)


def _show(result: Any, as_json: bool, show: Callable[[Any], None]) -> None:
    if as_json:
        typer.echo(json.dumps(result, allow_nan=False))
    else:
        show(result)


def _count(text: str) -> float:
    if text == "inf":
        return math.inf
    if not text.isdecimal():
        fail(f"--candidates: {text!r} is no whole number, and not `inf`", BAD_USAGE)
    return int(text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
