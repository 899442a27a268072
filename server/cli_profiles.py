"""``palette profile ...``: the stored palettes of a server, on its file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from server.cli_support import BAD_USAGE, AsJson, fail, guard, palette_option, settings_of
from server.profiles import Profile, Profiles, open_profiles
from server.settings import Settings

T = TypeVar("T")

app = typer.Typer(
    name="profile",
    help="Stored palettes. A server on the same state directory sees changes at once.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Name = Annotated[str, typer.Argument(help="Letters, digits, `_`, `-`, `.`; at most 64.")]
StateDir = Annotated[
    Path | None, typer.Option(help="Where the server keeps its state.", file_okay=False)
]
Expected = Annotated[
    int | None,
    typer.Option(min=0, help="Only if this is the newest version; 0: only if there is none."),
]


@app.command("list")
def list_profiles(state_dir: StateDir = None, as_json: AsJson = False) -> None:
    """List the profiles.

    Example: `palette profile list --json`
    """
    found = _on_store(settings_of(state_dir=state_dir), lambda profiles: profiles.newest())
    _show(found, as_json)


@app.command()
def show(
    name: Name,
    version: Annotated[int | None, typer.Option(min=1, help="The newest by default.")] = None,
    versions: Annotated[bool, typer.Option("--versions", help="All of them instead.")] = False,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Show a profile.

    Example: `palette profile show family-friendly --versions`
    """
    settings = settings_of(state_dir=state_dir)
    if versions:
        if version is not None:
            fail("--versions shows all of them: leave --version out", BAD_USAGE)
        _show(_on_store(settings, lambda profiles: profiles.versions(name)), as_json)
    else:
        _show(_on_store(settings, lambda profiles: profiles.get(name, version)), as_json)


@app.command("set")
def set_profile(
    name: Name,
    palette: Annotated[str, typer.Option(help='JSON, as `{"targets": {...}}`.')],
    description: Annotated[str, typer.Option(help="What it is for.")] = "",
    expected_version: Expected = None,
    rewards: Annotated[
        Path | None, typer.Option(help="YAML file of values it may name.", dir_okay=False)
    ] = None,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Write a new version of a profile.

    Example: `palette profile set brief --palette '{"targets": {"words": {"at_most": 40}}}'`
    """
    wanted = palette_option(palette)
    if wanted is None:
        fail("--palette: null is no palette", BAD_USAGE)
    settings = settings_of(state_dir=state_dir, rewards=rewards)

    def write(profiles: Profiles) -> Profile:
        # Here, for they are slow to import.
        from server.app import make_rewards
        from server.layers import Layers
        from server.promise import Promiser

        promiser = Promiser(
            make_rewards(settings).names,
            default_candidates=settings.candidates,
            max_candidates=settings.max_candidates,
        )
        Layers(profiles, promiser, settings.floors).check(wanted)
        return profiles.put(
            name,
            wanted.model_dump(mode="json", exclude_unset=True),
            description,
            expected_version,
        )

    _show(_on_store(settings, write), as_json)


@app.command()
def delete(
    name: Name,
    expected_version: Expected = None,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Delete a profile; its versions stay readable by their number.

    Example: `palette profile delete brief`
    """
    settings = settings_of(state_dir=state_dir)
    _show(_on_store(settings, lambda profiles: profiles.delete(name, expected_version)), as_json)


def _on_store(settings: Settings, work: Callable[[Profiles], T]) -> T:
    def run() -> T:
        profiles = open_profiles(settings.state_dir)
        try:
            return work(profiles)
        finally:
            profiles.close()

    return guard(run)


def _show(found: Profile | list[Profile], as_json: bool) -> None:
    if as_json:
        told = [asdict(one) for one in found] if isinstance(found, list) else asdict(found)
        typer.echo(json.dumps(told))
        return
    for one in found if isinstance(found, list) else [found]:
        palette = "deleted" if one.palette is None else json.dumps(one.palette)
        words = [one.name, f"version {one.version}", one.created, palette, one.description]
        typer.echo("  ".join(word for word in words if word))
