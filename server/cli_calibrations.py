"""``palette calibrations``: the calibrations that are kept, looked after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server import embedded
from server.cli_support import (
    BAD_USAGE,
    FAILED,
    AsJson,
    Model,
    Rewards,
    fail,
    guard,
    run,
    settings_of,
)

if TYPE_CHECKING:
    from server.calibration_files import Inventory
    from server.shelf_files import Held

app = typer.Typer(
    help="List, show, verify, delete, export and import calibrations.", no_args_is_help=True
)

Reference = Annotated[str, typer.Argument(help="Id, name, or file name.")]


@app.command("list")
def list_all(as_json: AsJson = False) -> None:
    """List all calibrations that are kept, of whatever model, with the damaged and the unfinished.

    Example: `palette calibrations list`
    """
    there = _inventory()
    if as_json:
        _print(
            {
                "calibrations": [_record(one) for one in there.held],
                "damaged": [{"file": str(one.path), "reason": one.reason} for one in there.damaged],
                "unfinished": [
                    {"file": str(one.path), "done": one.done, "prompts": one.prompts}
                    for one in there.unfinished
                ],
            }
        )
        return
    from server import terminal

    rows = []
    for one in there.held:
        info, pilot = one.calibration.info, one.calibration.pilot
        told = (
            one.calibration.id,
            info.name or "",
            info.model,
            f"{pilot.n_prompts} x {pilot.n_candidates}",
            f"T {info.temperature:g}, p {info.top_p:g}, k {info.top_k}, {info.max_tokens} tokens",
            _systems(info.systems),
            f"{info.created:%Y-%m-%d}" + (" (shipped)" if one.source == "shipped" else ""),
        )
        rows.append(told)
    columns = ("id", "name", "model", "prompts x K", "sampling", "systems", "made")
    terminal.print_table(columns, rows, justify="left")
    for unfinished in there.unfinished:
        terminal.errors.print(
            f"unfinished: {unfinished.path}, {unfinished.done} of {unfinished.prompts} prompts",
            markup=False, soft_wrap=True,
        )  # fmt: skip
    for problem in there.damaged:
        terminal.errors.print(f"damaged: {problem.reason}", markup=False, soft_wrap=True)


@app.command()
def show(calibration: Reference, as_json: AsJson = False) -> None:
    """Show what a calibration is valid for, and the base model's levels in it.

    Example: `palette calibrations show 3f0c`
    """
    record = _record(_find(calibration))
    if as_json:
        _print(record)
        return
    from server import terminal

    for name, value in record.items():
        told = value if isinstance(value, str) else json.dumps(value)
        terminal.results.print(f"{name}: {told}", markup=False, soft_wrap=True)


@app.command()
def verify(
    calibration: Annotated[str | None, typer.Argument(help="One of them; all by default.")] = None,
    in_use: Annotated[
        bool,
        typer.Option(
            "--in-use",
            help="Also whether they fit the model and the rewards of the settings. The model is "
            "not loaded; reward models are.",
        ),
    ] = False,
    model: Model = None,
    rewards: Rewards = None,
    as_json: AsJson = False,
) -> None:
    """Check that calibrations are whole: fingerprints computed anew, records, numbers of prompts.

    Ends with 1 when one is damaged, or with --in-use when none fits.

    Example: `palette calibrations verify --in-use`
    """
    from server import jobs, terminal
    from server.calibration_files import left_out, problems_of

    settings = settings_of(model=model, rewards=rewards)
    there = _inventory()
    held = there.held if calibration is None else (_find(calibration),)
    damaged = there.damaged if calibration is None else ()
    ours = run(jobs.fingerprints_in_use(settings)) if in_use else None
    found: list[dict[str, Any]] = []
    for one in held:
        info = one.calibration.info
        checked: dict[str, Any] = {
            "file": str(one.path),
            "id": one.calibration.id,
            "problems": problems_of(one.calibration),
            "left_out": left_out(one.calibration),
        }
        if ours is not None:
            made_with = (info.model_fingerprint, info.rewards_fingerprint)
            checked["fits_model"], checked["fits_rewards"] = (
                here == made for here, made in zip(ours, made_with, strict=True)
            )
        found.append(checked)
    found += [{"file": str(one.path), "id": None, "problems": [one.reason]} for one in damaged]
    if as_json:
        _print(found)
    else:
        for checked in found:
            terminal.results.print(_verdict(checked), markup=False, soft_wrap=True)
    fits = [one for one in found if one.get("fits_model") and one.get("fits_rewards")]
    if any(one["problems"] for one in found) or (in_use and not fits):
        raise typer.Exit(FAILED)


@app.command()
def delete(
    calibration: Reference,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a calibration that is kept.

    Example: `palette calibrations delete 3f0c --yes`
    """
    from server import calibration_files

    held = _find(calibration)
    if not yes and not typer.confirm(f"Delete {held.path} for good?", err=True):
        fail("nothing was deleted", FAILED)
    path = guard(lambda: calibration_files.delete(held))
    typer.echo(f"deleted {path}", err=True)


@app.command()
def export(
    calibration: Reference,
    target: Annotated[Path, typer.Argument(help="File to write, or a folder.")],
) -> None:
    """Write a calibration to one file elsewhere, to be imported on another machine.

    Example: `palette calibrations export 3f0c /mnt/share/support.npz`
    """
    from server import calibration_files

    held = _find(calibration)
    path = guard(lambda: calibration_files.export(held.calibration, target))
    typer.echo(f"calibration {held.calibration.id} written to {path}", err=True)


@app.command("import")
def bring_in(file: Annotated[Path, typer.Argument(help="A calibration.", dir_okay=False)]) -> None:
    """Check a calibration and keep a copy of it; one that is there already is left as it is.

    Example: `palette calibrations import /mnt/share/support.npz`
    """
    from server import calibration_files

    settings = settings_of()
    there = _inventory()
    made, path, is_new = guard(lambda: calibration_files.bring_in(there, settings.state_dir, file))
    told = f"written to {path}" if is_new else f"is there already: {path}"
    typer.echo(f"calibration {made.id} {told}", err=True)


def _inventory() -> Inventory:
    from server import calibration_files

    settings = settings_of()
    return guard(lambda: calibration_files.inventory(settings.state_dir, embedded.CALIBRATION))


def _find(reference: str) -> Held:
    from server import calibration_files
    from server.calibration import CalibrationError

    there = _inventory()
    try:
        return calibration_files.find(there, reference)
    except CalibrationError as error:
        fail(str(error), BAD_USAGE)


def _record(one: Held) -> dict[str, Any]:
    pilot = one.calibration.pilot
    return {
        "id": one.calibration.id,
        "file": str(one.path),
        "source": one.source,
        "fingerprint": pilot.fingerprint,
        "prompts": pilot.n_prompts,
        "candidates": pilot.n_candidates,
        "base": dict(zip(pilot.values, pilot.base.tolist(), strict=True)),
        "within_std": dict(zip(pilot.values, pilot.within_std.tolist(), strict=True)),
        **one.calibration.info.model_dump(mode="json"),
    }


def _systems(systems: dict[str, int] | None) -> str:
    from server.calibration import NO_SYSTEM

    if systems is None:
        return "not recorded"
    others = [system for system in systems if system != NO_SYSTEM]
    if len(others) == len(systems) == 1:
        return others[0]
    told = ["none"] if NO_SYSTEM in systems else []
    return " and ".join(told + ([f"{len(others)} different"] if others else []))


def _verdict(checked: dict[str, Any]) -> str:
    told = [f"{checked['id'] or 'damaged'}: {checked['file']}"]
    told += checked["problems"] or ["whole"]
    if checked.get("left_out"):
        told.append(f"{checked['left_out']} of the prompts given were left out")
    for what in ("model", "rewards"):
        if f"fits_{what}" in checked:
            is_fit = checked[f"fits_{what}"]
            told.append(f"{'made' if is_fit else 'NOT made'} with the {what} in use")
    return "; ".join(told)


def _print(result: Any) -> None:
    typer.echo(json.dumps(result, allow_nan=False))
