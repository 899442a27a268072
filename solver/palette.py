"""What the client asks for: targets by value name, per-answer floors, and their resolution."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from solver.errors import PaletteError, UnknownValueError
from solver.targets import FORMS, Target, parse_number, parse_target

if TYPE_CHECKING:
    from solver.pilot import PilotSet

FloatArray = npt.NDArray[np.float64]
OnFloor = Literal["refuse", "best"]


@dataclass(frozen=True, eq=False)
class Constraints:
    """A palette resolved against a pilot set; every array has shape (n_values,), reward units.

    Attributes
    ----------
    lower, upper : ndarray
        The interval asked for the expected level. A value without a target has the whole line,
        ``at_least`` an infinite upper end, ``at_most`` an infinite lower end.
    fixed : ndarray
        Given multipliers, per reward unit; NaN where the multiplier is solved for.
    floors : ndarray
        Per-answer lower bounds; NaN where there is none.
    on_floor : {"refuse", "best"}
        What happens when no candidate reaches the floors.
    """

    values: tuple[str, ...]
    lower: FloatArray
    upper: FloatArray
    fixed: FloatArray
    floors: FloatArray
    on_floor: OnFloor = "refuse"

    @property
    def active(self) -> npt.NDArray[np.intp]:
        """Columns whose multiplier is solved for."""
        return np.flatnonzero(np.isfinite(self.lower) | np.isfinite(self.upper))

    @property
    def has_floors(self) -> bool:
        """Whether any value has a floor."""
        return not bool(np.isnan(self.floors).all())


@dataclass(frozen=True, eq=False)
class Palette:
    """A level for each human value, as the client writes it.

    Parameters
    ----------
    targets : mapping of str to object
        Value name to wire form (DESIGN.md 2.6): ``{"quantile": 0.8}``, ``{"gain": 0.5}``,
        ``{"at_least": x}``, ``{"at_most": x}``, ``{"between": [low, high]}``, ``"keep"`` or
        ``{"multiplier": x}``. A value that is not named is free. Whoever serves may leave out a
        target with ``"optional": true`` where the value cannot be measured.
    floors : mapping of str to float
        Value name to the least reward that any served answer may have.
    on_floor : {"refuse", "best"}
        When no candidate reaches the floors: serve none, or the one that misses them least.

    Raises
    ------
    PaletteError
        Something in it cannot be read; ``param`` says which field. Unknown value names show only
        when the palette meets a pilot set.
    """

    targets: Mapping[str, object]
    floors: Mapping[str, float] = field(default_factory=dict)
    on_floor: OnFloor = "refuse"
    parsed: Mapping[str, Target] = field(init=False, repr=False)
    key: tuple[Hashable, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Parse everything once, so that resolving and hashing are cheap."""
        if not isinstance(self.targets, Mapping):
            raise PaletteError(
                f"targets: expected an object, value name -> target, got {self.targets!r}; "
                f"a target is {FORMS}.",
                "targets",
            )
        if not isinstance(self.floors, Mapping):
            raise PaletteError(
                f"floors: expected an object, value name -> number, got {self.floors!r}.", "floors"
            )
        if self.on_floor not in ("refuse", "best"):
            raise PaletteError(
                f'on_floor: {self.on_floor!r} is neither "refuse" nor "best".', "on_floor"
            )
        parsed = {
            _name(name, "targets"): parse_target(name, wire) for name, wire in self.targets.items()
        }
        floors = {
            _name(name, "floors"): parse_number(floor, f"floors.{name}")
            for name, floor in self.floors.items()
        }
        wire = {name: target.to_wire() for name, target in parsed.items()}
        # Without floors the two policies mean the same palette, and must share a cache entry; so
        # must targets that are optional and those that are not.
        key = (
            tuple(sorted((name, t.kind, t.numbers, t.of) for name, t in parsed.items())),
            tuple(sorted(floors.items())),
            self.on_floor if floors else "refuse",
        )
        object.__setattr__(self, "parsed", MappingProxyType(parsed))
        object.__setattr__(self, "targets", MappingProxyType(wire))
        object.__setattr__(self, "floors", MappingProxyType(floors))
        object.__setattr__(self, "key", key)

    def __hash__(self) -> int:
        """Hash the canonical form."""
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        """Palettes are equal when they ask for the same, in whatever order."""
        return isinstance(other, Palette) and self.key == other.key

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle through the wire form: the read-only views do not pickle."""
        return Palette, (dict(self.targets), dict(self.floors), self.on_floor)

    @property
    def needs_pilot(self) -> bool:
        """False when every target is a given multiplier: then there is nothing to solve."""
        return any(target.kind != "multiplier" for target in self.parsed.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the wire form; empty parts are left out."""
        wire: dict[str, Any] = {"targets": dict(self.targets)}
        if self.floors:
            wire |= {"floors": dict(self.floors), "on_floor": self.on_floor}
        return wire

    def check_values(self, values: Iterable[str]) -> None:
        """Check that every name is among `values`.

        Raises
        ------
        UnknownValueError
            One is not.
        """
        known = tuple(values)
        for part, names in (("targets", self.parsed), ("floors", self.floors)):
            for name in names:
                if name not in known:
                    raise UnknownValueError.of(name, known, f"{part}.{name}")

    def multipliers(self, values: Iterable[str]) -> FloatArray:
        """Return the given multipliers in the order of `values`, shape (n_values,); others are 0.

        Raises
        ------
        PaletteError
            Some target is not a multiplier, so a pilot set is needed.
        UnknownValueError
            A name is not among `values`.
        """
        values = tuple(values)
        self.check_values(values)
        for name, target in self.parsed.items():
            if target.kind != "multiplier":
                raise PaletteError(
                    f"targets.{name}: a {target.kind} target needs a calibration to be solved on; "
                    "calibrate, or give multipliers only.",
                    f"targets.{name}",
                )
        given = {name: target.numbers[0] for name, target in self.parsed.items()}
        return np.array([given.get(name, 0.0) for name in values], dtype=np.float64)

    def resolve(self, pilot: PilotSet) -> Constraints:
        """Return the palette in the reward units and value order of `pilot`.

        Raises
        ------
        UnknownValueError
            A name is not one of the pilot set's values.
        """
        self.check_values(pilot.values)
        n_values = len(pilot.values)
        lower = np.full(n_values, -np.inf)
        upper = np.full(n_values, np.inf)
        fixed = np.full(n_values, np.nan)
        floors = np.full(n_values, np.nan)
        for column, name in enumerate(pilot.values):
            if name in self.floors:
                floors[column] = self.floors[name]
            if name not in self.parsed:
                continue
            target = self.parsed[name]
            if target.kind == "multiplier":
                fixed[column] = target.numbers[0]
            else:
                lower[column], upper[column] = target.interval(pilot, column)
        return Constraints(pilot.values, lower, upper, fixed, floors, self.on_floor)


def _name(name: object, part: str) -> str:
    if not isinstance(name, str) or not name.strip():
        raise PaletteError(
            f"{part}: {name!r} is not a value name; name the value, as in "
            '{"harmless": {"quantile": 0.8}}.',
            part,
        )
    return name
