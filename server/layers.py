"""The layers of a palette: the operator's floors, a stored profile, and what the request says."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pydantic import ValidationError

from server.profile_file import ProfileError
from server.profiles import ProfileNotFoundError, Profiles
from server.promise import Promiser
from server.schemas import PaletteOptions, ProfileReport
from solver import PaletteError


class ProfileUnusableError(ProfileError):
    """A profile that was written by a server with another idea of a palette."""


@dataclass(frozen=True, slots=True)
class Laid:
    """A palette with nothing left to look up.

    Attributes
    ----------
    options : PaletteOptions or None
        Without a profile; None where nothing is asked and the operator has no floors.
    profile : ProfileReport or None
        The one it lies on.
    """

    options: PaletteOptions | None
    profile: ProfileReport | None = None


class Layers:
    """Lays what a request says over its profile, and both over the operator's floors.

    Parameters
    ----------
    profiles : Profiles
    promiser : Promiser
        Knows which values there are.
    floors : mapping of str to float
        Lowest rewards that nobody can lower.

    Raises
    ------
    PaletteError
        For floors of values that are not there.
    """

    def __init__(self, profiles: Profiles, promiser: Promiser, floors: Mapping[str, float]) -> None:
        self.profiles = profiles
        self._promiser = promiser
        self._floors = dict(floors)
        try:
            promiser.check(PaletteOptions(floors=self._floors), n_choices=1)
        except PaletteError as error:
            raise type(error)(f"the operator's {error}", error.param) from error

    async def resolve(self, options: PaletteOptions | None) -> Laid:
        """Return the palette that holds for a request; off the event loop where it has a profile.

        Raises
        ------
        PaletteError
            When it would get below the operator's floors, or the profile makes no sense here.
        ProfileNotFoundError, ProfileFileError, ProfileUnusableError
        """
        if options is None or options.profile is None:
            return Laid(self._floored(options))
        return await asyncio.to_thread(self.lay, options)

    def lay(self, options: PaletteOptions) -> Laid:
        """Return what `resolve` does; it may wait for the disk."""
        if options.profile is None:
            return Laid(self._floored(options))
        try:
            stored = self.profiles.get(options.profile)
        except ProfileNotFoundError as error:
            error.param = "profile"
            raise
        told = f"profile {stored.name}, version {stored.version}"
        try:
            ground = PaletteOptions.model_validate(stored.palette)
            self.check(ground)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            msg = f"{told}: {where}: {first['msg']}; write it anew"
            raise ProfileUnusableError(msg) from error
        except PaletteError as error:
            raise type(error)(f"{told}: {error}", error.param) from error
        return Laid(
            self._floored(laid_over(ground, options)),
            ProfileReport(name=stored.name, version=stored.version),
        )

    def check(self, options: PaletteOptions) -> None:
        """Check what can be checked of a palette before anyone asks for it.

        Raises
        ------
        PaletteError
            For a profile on a profile, unknown values, and what `resolve` refuses.
        """
        if options.profile is not None:
            msg = "a profile cannot lie on another one: give its targets themselves"
            raise PaletteError(msg, param="profile")
        floored = self._floored(options)
        assert floored is not None
        self._promiser.check(floored, n_choices=1)

    def _floored(self, options: PaletteOptions | None) -> PaletteOptions | None:
        """Return the palette with the operator's floors, which then is one also where none was."""
        if not self._floors:
            return options
        options = options or PaletteOptions()
        if options.on_floor == "best":
            msg = (
                "this server's operator has set floors, and `best` would serve answers below "
                "them: leave on_floor out"
            )
            raise PaletteError(msg, param="on_floor")
        return options.model_copy(update={"floors": _higher(self._floors, options.floors)})


def laid_over(ground: PaletteOptions, given: PaletteOptions) -> PaletteOptions:
    """Return `ground` with what was given over it, and without a profile."""
    fields = {name: getattr(given, name) for name in given.model_fields_set - {"profile"}}
    fields["targets"] = {**ground.targets, **given.targets}
    fields["floors"] = _higher(ground.floors, given.floors)
    return ground.model_copy(update=fields)


def split_model(name: str, served: Collection[str]) -> tuple[str, str | None]:
    """Return the model and the profile that a client's model name means.

    ``base:profile``; as a model's own name may have colons, the longest one served counts. A name
    that begins with none of them comes back whole.
    """
    for model in sorted(served, key=len, reverse=True):
        if name == model:
            return name, None
        if name.startswith(f"{model}:"):
            return model, name[len(model) + 1 :]
    return name, None


def _higher(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """Return the floors of both, the higher where both have one."""
    return {
        name: max(floor for floor in (one.get(name), other.get(name)) if floor is not None)
        for name in {**one, **other}
    }
