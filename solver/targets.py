"""One target: from its wire form to the interval of levels it asks for."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from solver.errors import PaletteError

if TYPE_CHECKING:
    from solver.pilot import PilotSet

Kind = Literal["quantile", "gain", "keep", "at_least", "at_most", "between", "multiplier"]
Basis = Literal["prompt", "traffic"]

# Squares and sums of numbers up to this size stay finite; nothing measured is larger.
LARGEST: Final = 1e100

FORMS: Final = (
    '{"quantile": 0.8}, {"quantile": 0.8, "of": "traffic"}, {"gain": 0.5}, {"at_least": 1.2}, '
    '{"at_most": 120}, {"between": [80, 120]}, "keep" or {"multiplier": 2.0}; '
    'an object may add "optional": true'
)
_KINDS: Final[tuple[Kind, ...]] = (
    "quantile",
    "gain",
    "keep",
    "at_least",
    "at_most",
    "between",
    "multiplier",
)


@dataclass(frozen=True, slots=True)
class Target:
    """What one value is asked for.

    Attributes
    ----------
    kind : str
        The word of the wire form.
    numbers : tuple of float
        Empty for ``keep``, two for ``between``, otherwise one.
    of : {"prompt", "traffic"}
        What a quantile is taken over.
    optional : bool
        Whether it may be left out where the value cannot be measured. It asks for the same level.
    """

    kind: Kind
    numbers: tuple[float, ...] = ()
    of: Basis = "prompt"
    optional: bool = False

    def to_wire(self) -> object:
        """Return the JSON form that `parse_target` reads."""
        if self.kind == "keep" and not self.optional:
            return "keep"
        wire: dict[str, object] = {}
        if self.kind == "keep":
            wire["keep"] = True
        elif self.kind == "between":
            wire["between"] = list(self.numbers)
        else:
            wire[self.kind] = self.numbers[0]
        if self.of == "traffic":
            wire["of"] = "traffic"
        if self.optional:
            wire["optional"] = True
        return wire

    def interval(self, pilot: PilotSet, column: int) -> tuple[float, float]:
        """Return the lowest and highest level asked of value `column`, in reward units.

        A multiplier asks for no level: its interval is the whole line.
        """
        match self.kind:
            case "quantile" if self.of == "traffic":
                return float(pilot.traffic_quantile(self.numbers[0], column)), math.inf
            case "quantile":
                return float(pilot.quantile(self.numbers[0], column)), math.inf
            case "gain":
                gain = self.numbers[0] * float(pilot.within_std[column])
                return float(pilot.base[column]) + gain, math.inf
            case "keep":
                return float(pilot.base[column]), math.inf
            case "at_least":
                return self.numbers[0], math.inf
            case "at_most":
                return -math.inf, self.numbers[0]
            case "between":
                return self.numbers[0], self.numbers[1]
            case "multiplier":
                return -math.inf, math.inf


def parse_target(name: str, wire: object) -> Target:
    """Return the target that a wire form means.

    Raises
    ------
    PaletteError
        The form is unknown, mixes two kinds, or holds a number outside its limits.
    """
    param = f"targets.{name}"
    if isinstance(wire, str):
        if wire == "keep":
            return Target("keep")
        raise PaletteError(f"{param}: {wire!r} is not a target; write {FORMS}.", param)
    if not isinstance(wire, Mapping):
        raise PaletteError(
            f'{param}: a target is an object or "keep", not {wire!r}; write {FORMS}.', param
        )
    kinds = [kind for kind in _KINDS if kind in wire]
    if not kinds:
        raise PaletteError(f"{param}: no kind of target in {dict(wire)!r}; write {FORMS}.", param)
    if len(kinds) > 1:
        raise PaletteError(
            f"{param}: {' and '.join(kinds)} are two targets for one value; keep one of them"
            + (' (for a range write {"between": [low, high]}).' if "at_least" in kinds else "."),
            param,
        )
    kind = kinds[0]
    allowed = {kind, "of", "optional"} if kind == "quantile" else {kind, "optional"}
    for key in wire:
        if key not in allowed:
            raise PaletteError(
                f"{param}.{key}: unknown key beside {kind!r}; remove it.", f"{param}.{key}"
            )
    of: Basis = "prompt"
    if "of" in wire:
        if wire["of"] not in ("prompt", "traffic"):
            raise PaletteError(
                f'{param}.of: a quantile is of "prompt" or "traffic", not {wire["of"]!r}.',
                f"{param}.of",
            )
        of = "traffic" if wire["of"] == "traffic" else "prompt"
    optional = _flag(wire.get("optional", False), f"{param}.optional")
    if kind == "keep":
        if not _flag(wire[kind], f"{param}.keep"):
            msg = f'{param}.keep: false is no target; leave {name} out, or write "keep".'
            raise PaletteError(msg, f"{param}.keep")
        return Target(kind, optional=optional)
    if kind == "between":
        return Target(kind, _range(wire[kind], f"{param}.between"), optional=optional)
    number = parse_number(wire[kind], f"{param}.{kind}")
    if kind == "quantile" and not 0.0 < number < 1.0:
        raise PaletteError(
            f"{param}.quantile: {number:g} is outside (0, 1); write 0.8 for the 80 % quantile.",
            f"{param}.quantile",
        )
    return Target(kind, (number,), of, optional)


def parse_number(wire: object, param: str) -> float:
    """Return a finite number no larger than `LARGEST`; booleans and text are refused.

    Raises
    ------
    PaletteError
        It is not such a number.
    """
    if isinstance(wire, bool) or not isinstance(wire, numbers.Real):
        raise PaletteError(f"{param}: expected a number, got {wire!r}.", param)
    try:
        number = float(wire)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or abs(number) > LARGEST:
        raise PaletteError(
            f"{param}: {wire!r:.40} is not a finite number within ±{LARGEST:g}; give a level in "
            "the reward's own unit.",
            param,
        )
    return number


def parse_count(wire: object, param: str, least: int = 1) -> int:
    """Return a whole number from `least` up; booleans, fractions and text are refused.

    Raises
    ------
    PaletteError
        It is not such a number.
    """
    if isinstance(wire, bool) or not isinstance(wire, numbers.Integral) or wire < least:
        raise PaletteError(f"{param}: {wire!r} is not a whole number from {least} up.", param)
    return int(wire)


def _flag(wire: object, param: str) -> bool:
    if not isinstance(wire, bool):
        raise PaletteError(f"{param}: expected true or false, got {wire!r}.", param)
    return wire


def _range(wire: object, param: str) -> tuple[float, float]:
    if isinstance(wire, str | bytes) or not isinstance(wire, list | tuple) or len(wire) != 2:
        raise PaletteError(f"{param}: expected two numbers [low, high], got {wire!r}.", param)
    low, high = (parse_number(number, param) for number in wire)
    if low > high:
        raise PaletteError(
            f"{param}: low {low:g} is above high {high:g}; write [{high:g}, {low:g}].", param
        )
    return low, high
