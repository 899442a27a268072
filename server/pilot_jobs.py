"""The work behind the commands on a pilot file: solve, frontier, spread, negotiate, interference.

Each `..._file` returns the JSON object that ``--json`` prints; each `print_...` shows it to people.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from server import terminal
from server.promise import AUTO_CANDIDATES
from solver import (
    Palette,
    PaletteError,
    Party,
    PilotSet,
    Status,
    frontier,
    interference,
    min_candidates,
    negotiate,
    prices,
    repair,
    spread,
)
from solver import solve as solve_palette

Json = dict[str, Any]


def solve_file(
    path: Path,
    targets: Mapping[str, Any],
    n_candidates: float | Literal["auto"],
    *,
    floors: Mapping[str, float],
    on_infeasible: str,
    method: Literal["interpolate", "nearest", "greedy"],
    max_kl: float | None,
    ridge: float,
    groups: int | None,
    seed: int,
) -> Json:
    """Return what `palette solve` tells of a palette on a pilot file, with prices if it has them.

    Raises
    ------
    PaletteError, PilotError
    """
    pilot, palette = PilotSet.load(path), Palette(targets, floors)
    smallest = min_candidates(palette, pilot, seed=seed)
    options: Json = {"groups": groups, "seed": seed, "max_kl": max_kl, "ridge": ridge}
    if isinstance(n_candidates, str):
        most = pilot.n_prompts if pilot.pooled else pilot.n_candidates
        n: float = min(next((n for n in AUTO_CANDIDATES if n >= (smallest or 1)), most), most)
    else:
        n = n_candidates
    served, solution = palette, solve_palette(palette, pilot, n, **options)
    result = solution.to_dict() | {"repaired": None}
    if solution.status is not Status.OPTIMAL and on_infeasible != "reject":
        way = method if on_infeasible == "repair" else "nearest"
        mended = repair(palette, pilot, n, way, **options)
        served, solution = mended.palette, mended.solution
        result = solution.to_dict() | {
            "status": "repaired" if on_infeasible == "repair" else "best_effort",
            "certificate": result["certificate"],
            "repaired": mended.to_dict(),
        }
    found = None
    if solution.status is Status.OPTIMAL:
        found = prices(served, pilot, n, solution=solution, **options).to_dict()
        del found["solution"]
    return result | {"min_candidates": smallest, "prices": found}


def frontier_file(
    path: Path,
    values: Sequence[str],
    targets: Mapping[str, Any],
    n_candidates: float,
    *,
    n_points: int,
    max_kl: float | None,
    less: Sequence[str],
    groups: int | None,
    seed: int,
) -> Json:
    """Return the curve of two values on a pilot file.

    Raises
    ------
    PaletteError, PilotError
    """
    return frontier(
        Palette(targets),
        PilotSet.load(path),
        values,
        n_candidates,
        n_points=n_points,
        max_kl=max_kl,
        senses=dict.fromkeys(less, "less"),
        groups=groups,
        seed=seed,
    ).to_dict()


def spread_file(
    path: Path,
    n_palettes: int,
    values: Sequence[str] | None,
    n_candidates: float,
    *,
    max_kl: float | None,
    groups: int | None,
    seed: int,
) -> Json:
    """Return diverse palettes for a pilot file.

    Raises
    ------
    PaletteError, PilotError
    """
    pilot = PilotSet.load(path)
    found = spread(
        pilot, n_palettes, n_candidates, values=values, max_kl=max_kl, groups=groups, seed=seed
    )
    names = list(values or pilot.values)
    return {"values": names, "palettes": [one.to_dict() for one in found]}


def negotiate_file(
    path: Path,
    parties: Path,
    n_candidates: float,
    *,
    max_kl: float | None,
    groups: int | None,
    seed: int,
) -> Json:
    """Return the agreement of the parties in a JSON file.

    Raises
    ------
    PaletteError, PilotError
        Also for a file of parties that cannot be read.
    """
    return negotiate(
        _read_parties(parties),
        PilotSet.load(path),
        n_candidates,
        max_kl=max_kl,
        groups=groups,
        seed=seed,
    ).to_dict()


def interference_file(path: Path, *, seed: int) -> Json:
    """Return the interference report of a pilot file.

    Raises
    ------
    PilotError
    """
    return interference(PilotSet.load(path), seed=seed).to_dict()


def _read_parties(path: Path) -> list[Party]:
    form = '[{"name": "parents", "targets": {"harmless": {"quantile": 0.9}}, "weight": 1}, ...]'
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise PaletteError(f"{path}: cannot be read ({error}); write {form}.", "parties") from error
    if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        raise PaletteError(f"{path}: not a list of parties; write {form}.", "parties")
    parties = []
    for i, entry in enumerate(entries):
        unknown = sorted(set(entry) - {"name", "targets", "floors", "weight"})
        if unknown or "name" not in entry or "targets" not in entry:
            what = f"unknown key {unknown[0]!r}" if unknown else "name or targets missing"
            raise PaletteError(f"{path}, party {i}: {what}; write {form}.", f"parties[{i}]")
        palette = Palette(entry["targets"], floors=entry.get("floors", {}))
        parties.append(Party(entry["name"], palette, entry.get("weight", 1.0)))
    return parties


def print_solution(result: Json) -> None:
    """Print a solution as a table."""
    found = result["prices"]
    columns = ("value", "target", "multiplier", "±", "expected", "±", "base")
    rows: list[tuple[str, ...]] = []
    for name in result["values"]:
        target = result["targets"].get(name)
        is_solved = found is not None or result["status"] == "boundary"
        error = found["multiplier_stderr"][name] if found else None
        row = (
            name,
            "" if target is None else _number(target),
            _number(result["multipliers"][name] if is_solved else None),
            _number(error) if error else "",
            *(_number(result[key][name] if is_solved else None) for key in ("expected", "stderr")),
            _number(result["base"][name]),
        )
        rows.append(row)
    terminal.print_table(columns, rows)
    served = f"; ESS {_number(result['ess'])}, KL {_number(result['kl'])} nats" * (
        result["status"] != "infeasible"
    )
    terminal.results.print(
        f"\n{result['status']} with {result['candidates']} candidates{served}"
        f"; smallest N {result['min_candidates'] or 'unknown: more than the pilot has'}"
    )
    if result["certificate"]:
        terminal.results.print(result["certificate"]["sentence"], soft_wrap=True)
    for name in found["binding"] if found else ():
        # What binds is held where it is.
        slopes = {
            other: row[name]
            for other, row in found["level_slopes"].items()
            if other not in found["binding"]
        }
        told = ", ".join(f"{other} {slope:+.3g}" for other, slope in slopes.items())
        if told:
            terminal.results.print(f"one more unit of {name} moves {told}", soft_wrap=True)


def print_frontier(result: Json) -> None:
    """Print the curve as a table, from the most of the second value to the most of the first."""
    first, second = result["values"]
    at = "at the limit" if result["max_kl"] is None else f"at KL {result['max_kl']:g}"
    columns = (
        f"{first}, {at}", second, f"-d {second} / d {first}", f"λ {first}", f"λ {second}", "KL",
        "ESS",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for point in result["points"]:
        solution = point["solution"]
        row = (
            *(_number(point["limit"][name]) for name in (first, second)),
            _number(point["exchange"]),
            *(_number(solution["multipliers"][name]) for name in (first, second)),
            _number(solution["kl"]),
            _number(solution["ess"]),
        )
        rows.append(row)
    terminal.print_table(columns, rows)
    others = result["others"]
    if not result["points"]:
        certificate = others["certificate"]
        reason = certificate["sentence"] if certificate else others["status"]
        terminal.results.print(f"the other targets cannot be served: {reason}", soft_wrap=True)
    elif result["max_kl"] is None:
        terminal.results.print(
            "\nThe limit itself takes unbounded multipliers: λ, KL and ESS are of a palette a "
            "little short of it.",
            soft_wrap=True,
        )


def print_spread(result: Json) -> None:
    """Print each palette with the level it serves of every value."""
    names = result["values"]
    rows: list[tuple[str, ...]] = []
    for one in result["palettes"]:
        solution = one["solution"]
        levels = [_number(solution["expected"][name]) for name in names]
        rows.append((one["name"], *levels, _number(solution["kl"]), _number(solution["ess"])))
    terminal.print_table(("palette", *names, "KL", "ESS"), rows)
    terminal.results.print("\n--json prints the palettes as requests take them.")


def print_agreement(result: Json) -> None:
    """Print how satisfied each party is, and the palette agreed on."""
    rows: list[tuple[str, ...]] = []
    for name in result["parties"]:
        numbers = (result[key][name] for key in ("satisfaction", "served", "alone"))
        shares = (f"{100 * x:.1f} %" for x in numbers)
        rows.append((name, _number(result["weights"][name]), *shares))
    terminal.print_table(("party", "weight", "satisfaction", "as served", "alone"), rows)
    targets = result["palette"]["targets"]
    terminal.results.print(f"\npalette: {json.dumps(targets)}", soft_wrap=True)
    for sentence in (result["limits"], *result["stopped"]):
        if sentence:
            terminal.results.print(sentence, soft_wrap=True)


def print_interference(result: Json) -> None:
    """Print correlations below the diagonal, information above it, and what it means for λ."""
    names = result["values"]
    rows: list[tuple[str, ...]] = []
    for i, row in enumerate(names):
        cells = []
        for j, column in enumerate(names):
            part = "correlation" if j < i else "mutual_information"
            cells.append("" if i == j else _number(result[part][row][column]))
        rows.append((row, *cells, _number(result["inflation"][row])))
    terminal.print_table(("correlation \\ nats", *names, "inflation"), rows)
    terminal.results.print(
        "\nBelow the diagonal: correlation within a prompt; above it: mutual information, nats. "
        "Inflation: how much steeper a multiplier rises than if the value stood alone.",
        soft_wrap=True,
    )
    for combination in result["collinear"]:
        terminal.results.print(combination["sentence"], soft_wrap=True)
    if not result["collinear"]:
        terminal.results.print("No combination of values is nearly collinear.")


def _number(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, list | tuple):
        return " to ".join(_number(one) for one in value)
    return f"{value:.4g}" if abs(value) >= 1e-12 else "0"  # what is smaller is rounding
