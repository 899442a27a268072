"""``/v1/palette/profiles``: stored named palettes; and model names that choose one."""

from __future__ import annotations

import asyncio
from typing import Annotated, TypeVar

from fastapi import APIRouter, Query

from server.errors import ModelNotFoundError
from server.layers import split_model
from server.openai_requests import SamplingRequest
from server.profiles import Profile, ProfileInUseError, ProfileNotFoundError
from server.routes.context import Context, InContext
from server.routes.parsing import refusal
from server.schemas import PaletteOptions, ProfileAnswer, ProfileList, ProfileRequest

router = APIRouter(prefix="/v1/palette/profiles", tags=["palette"])

# SQLite counts no further.
_MOST = 2**63 - 1
Version = Annotated[int | None, Query(ge=1, le=_MOST)]
Expected = Annotated[int | None, Query(ge=0, le=_MOST)]
Body = TypeVar("Body", bound=SamplingRequest)


@router.get("")
async def list_profiles(context: InContext) -> ProfileList:
    """Return the newest version of every profile."""
    found = await asyncio.to_thread(context.aligner.layers.profiles.newest)
    return ProfileList(data=[_answer(one) for one in found])


@router.get("/{name}")
async def read_profile(name: str, context: InContext, version: Version = None) -> ProfileAnswer:
    """Return a profile, the newest version by default."""
    return _answer(await asyncio.to_thread(context.aligner.layers.profiles.get, name, version))


@router.get("/{name}/versions")
async def list_versions(name: str, context: InContext) -> ProfileList:
    """Return all versions of a profile, the newest first; a deletion is one too."""
    found = await asyncio.to_thread(context.aligner.layers.profiles.versions, name)
    return ProfileList(data=[_answer(one) for one in found])


@router.put("/{name}")
async def write_profile(name: str, body: ProfileRequest, context: InContext) -> ProfileAnswer:
    """Write a new version of a profile and return it once it is on the disk."""
    layers = context.aligner.layers
    layers.check(body.palette)
    palette = body.palette.model_dump(mode="json", exclude_unset=True)
    return _answer(
        await asyncio.to_thread(
            layers.profiles.put, name, palette, body.description, body.expected_version
        )
    )


@router.delete("/{name}")
async def delete_profile(
    name: str, context: InContext, expected_version: Expected = None
) -> ProfileAnswer:
    """Delete a profile; its versions stay readable by their number."""
    if name == (context.settings.default_palette or {}).get("profile"):
        msg = f"profile {name} is this server's default palette: write a new version of it instead"
        raise ProfileInUseError(msg)
    profiles = context.aligner.layers.profiles
    return _answer(await asyncio.to_thread(profiles.delete, name, expected_version))


async def model_names(context: Context) -> list[str]:
    """Return the names of the models served, each followed by its names with a profile."""
    found = await asyncio.to_thread(context.aligner.layers.profiles.newest)
    return [
        name
        for base in _served(context)
        for name in (base, *(f"{base}:{profile.name}" for profile in found))
    ]


async def with_profile(body: Body, context: Context) -> Body:
    """Return the body with the profile of its model's name in its palette, and the base's name.

    Raises
    ------
    ModelNotFoundError
        When there is no such profile.
    RequestValidationError
        When the palette says otherwise.
    """
    base, name = split_model(body.model, _served(context))
    if name is None:
        return body
    try:
        await asyncio.to_thread(context.aligner.layers.profiles.get, name)
    except ProfileNotFoundError as error:
        msg = f"The model `{body.model}` does not exist here: {error}."
        raise ModelNotFoundError(msg) from error
    if "palette" in body.model_fields_set and body.palette is None:
        raise refusal("palette", f"null, but model {body.model} has one: ask for model {base}")
    options = body.palette or PaletteOptions()
    if options.profile not in (None, name):
        msg = f"another profile than that of model {body.model}: ask for model {base}"
        raise refusal("palette.profile", msg)
    palette = PaletteOptions.model_validate(
        {**options.model_dump(exclude_unset=True), "profile": name}
    )
    return body.model_copy(update={"model": base, "palette": palette})


def _served(context: Context) -> tuple[str, ...]:
    return tuple(context.aligners)


def _answer(profile: Profile) -> ProfileAnswer:
    return ProfileAnswer(
        name=profile.name,
        version=profile.version,
        palette=profile.palette,
        description=profile.description,
        created=profile.created,
        deleted=profile.palette is None,
    )
