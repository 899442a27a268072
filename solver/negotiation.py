"""Negotiation: one palette for several parties, the least satisfied of them first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from solver.conflicts import limits, stopped
from solver.dual import ServedDual
from solver.errors import PaletteError, UnknownValueError
from solver.leximin import Claims, alone, leximin
from solver.palette import Constraints, Palette
from solver.pilot import PilotSet
from solver.repairs import PULLS
from solver.solution import Solution, Status
from solver.solving import solve
from solver.targets import parse_number

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Party:
    """Someone who asks for a palette.

    Parameters
    ----------
    name : str
    palette : Palette
        Without given multipliers.
    weight : float
        Positive. What is made equal, as far as it can be, is satisfaction divided by weight.

    Raises
    ------
    PaletteError
        The name or the weight cannot be used.
    """

    name: str
    palette: Palette
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Check what can be checked without the others."""
        if not isinstance(self.name, str) or not self.name.strip():
            raise PaletteError(f"name: {self.name!r} is not a party's name.", "name")
        weight = parse_number(self.weight, "weight")
        if not weight > 0.0:
            raise PaletteError(
                f"weight: {weight:g} of {self.name!r} is not positive; leave out a party that "
                "does not count.",
                "weight",
            )
        object.__setattr__(self, "weight", weight)


@dataclass(frozen=True, eq=False)
class Agreement:
    """What the parties get; maps go from party name, in order, to number.

    Attributes
    ----------
    parties : tuple of str
    weights : mapping of str to float
    satisfaction : mapping of str to float
        The exact optimum, from 0 (what the base model gives) to 1 (the whole wish).
    served : mapping of str to float
        What `solution` delivers: where the optimum is a limit, a little less for the worst, and
        less again under a KL budget.
    alone : mapping of str to float
        The most each could have if nobody else asked for anything.
    worst : (str, float)
        The least satisfied party and its satisfaction, not divided by its weight; the first of
        equals.
    levels : mapping of str to object
        Bounds of the exact optimum, value name to target in wire form, reward units.
    palette : Palette
        What is served.
    solution : Solution
        Of `palette`.
    limits : str, optional
        What keeps the worst party from more; None where every wish is met whole.
    stopped : tuple of str
        Wishes that collide with another party's guard, in words: there the guard wins.
    """

    parties: tuple[str, ...]
    weights: Mapping[str, float]
    satisfaction: Mapping[str, float]
    served: Mapping[str, float]
    alone: Mapping[str, float]
    worst: tuple[str, float]
    levels: Mapping[str, object]
    palette: Palette
    solution: Solution
    limits: str | None
    stopped: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-safe maps."""
        return {
            "parties": list(self.parties),
            "weights": dict(self.weights),
            "satisfaction": dict(self.satisfaction),
            "served": dict(self.served),
            "alone": dict(self.alone),
            "worst": {"party": self.worst[0], "satisfaction": self.worst[1]},
            "levels": dict(self.levels),
            "palette": self.palette.to_dict(),
            "solution": self.solution.to_dict(),
            "limits": self.limits,
            "stopped": list(self.stopped),
        }


def negotiate(
    parties: Sequence[Party],
    pilot: PilotSet,
    candidates: float = 16,
    *,
    max_kl: float | None = None,
    groups: int | None = None,
    seed: int = 0,
) -> Agreement:
    """Return the achievable palette that does best by the least satisfied party, then the next.

    Parameters
    ----------
    parties : sequence of Party
    pilot : PilotSet
    candidates : int or math.inf
    max_kl : float, optional
        Budget in nats of what is served; see `solve`. It does not enter the optimum.
    groups, seed : int, optional
        How candidates are grouped; see `PilotSet.groups`.

    Raises
    ------
    PaletteError
        No party, a name twice, a palette without targets or with a given multiplier, or a value
        that nobody measures; and as `solve`.

    Notes
    -----
    Every bound that a party asks of a value is a row. Base levels are those served with no
    multipliers. A row that they miss is a wish, and its progress is the share of the way from
    the base level to the level asked; a party's satisfaction s_p is the least progress of its
    wishes, at most 1. A row that they meet (``keep``, a level below the base) has no way to go:
    it is a guard, which everybody respects at the level asked, whoever wished otherwise. The
    guards can always be met together, since the base levels meet them. All floors apply, the
    highest for each value, and ``on_floor`` is "best" only where all who set floors say so.

    The optimum is lexicographic in the sorted s_p / w_p: the solution of Kalai & Smorodinsky
    (Econometrica 43 (1975) 513) with the base as the point of disagreement and, in place of the
    ideal point, the wishes (Chun & Thomson, Math. Soc. Sci. 24 (1992) 19), continued where some
    party can still gain (Imai, Econometrica 51 (1983) 389). It is exact; see `leximin`. The
    budget comes after it: `solve` lowers the agreed palette as a whole.
    """
    asked = _resolved(parties, pilot)
    rule = _joint(asked)
    dual = ServedDual(pilot.groups(candidates, groups=groups, seed=seed), rule)
    claims = Claims.of(dual, asked)
    weights = np.array([party.weight for party in parties])
    share, levels = leximin(dual, claims, weights)
    most = alone(dual, claims)
    if not dual.n_groups:  # the floors refuse everything: nobody is served at all
        share, most = np.zeros_like(share), np.zeros_like(most)
    # The optimum itself where finite multipliers reach it; a limit is served from a little short.
    for pull in (0.0, *PULLS):
        offered = _as_palette(claims.bounds(dual, (1.0 - pull) * share))
        solution = solve(offered, pilot, candidates, groups=groups, seed=seed, max_kl=max_kl)
        if solution.status is Status.OPTIMAL:
            break
    active = dual.active
    delivered = (solution.expected - dual.origin)[active] / dual.groups.scale[active]
    names = tuple(party.name for party in parties)
    worst = int(share.argmin())

    def by_name(numbers: FloatArray) -> dict[str, float]:
        return dict(zip(names, numbers.tolist(), strict=True))

    return Agreement(
        parties=names,
        weights=by_name(weights),
        satisfaction=by_name(share),
        served=by_name(claims.satisfaction(delivered) if dual.n_groups else share),
        alone=by_name(most),
        worst=(names[worst], float(share[worst])),
        levels=_as_palette(claims.bounds(dual, share)).targets,
        palette=offered,
        solution=solution,
        limits=limits(dual, claims, names, share, levels, candidates),
        stopped=stopped(dual, claims, names),
    )


def _resolved(parties: Sequence[Party], pilot: PilotSet) -> list[Constraints]:
    """Return each party's constraints, all checked."""
    if not parties:
        raise PaletteError("parties: there is none; name at least one with its palette.", "parties")
    names = [party.name for party in parties]
    for i, party in enumerate(parties):
        at = f"parties[{i}]"
        if party.name in names[:i]:
            raise PaletteError(
                f"{at}.name: {party.name!r} is there already; give each party a name of its own.",
                f"{at}.name",
            )
        if not party.palette.parsed:
            raise PaletteError(
                f"{at}.targets: {party.name!r} asks for nothing; name a target or leave the party "
                "out.",
                f"{at}.targets",
            )
        for part, asked in (("targets", party.palette.parsed), ("floors", party.palette.floors)):
            for name in asked:
                if name not in pilot.values:
                    raise UnknownValueError.of(name, pilot.values, f"{at}.{part}.{name}")
        for name, target in party.palette.parsed.items():
            if target.kind == "multiplier":
                raise PaletteError(
                    f"{at}.targets.{name}: a given multiplier leaves nothing to negotiate; ask "
                    "for a level.",
                    f"{at}.targets.{name}",
                )
    return [party.palette.resolve(pilot) for party in parties]


def _joint(asked: Sequence[Constraints]) -> Constraints:
    """Return the bounds and floors of all parties together; bounds may contradict each other."""
    policies = {each.on_floor for each in asked if each.has_floors}
    return replace(
        asked[0],
        lower=np.max([each.lower for each in asked], axis=0),
        upper=np.min([each.upper for each in asked], axis=0),
        floors=np.fmax.reduce([each.floors for each in asked]),
        on_floor="best" if policies == {"best"} else "refuse",
    )


def _as_palette(bounds: Constraints) -> Palette:
    targets: dict[str, object] = {}
    ends = zip(bounds.values, bounds.lower.tolist(), bounds.upper.tolist(), strict=True)
    for name, low, high in ends:
        if np.isfinite(low) and np.isfinite(high):
            # Where one party's bound ends at another's, rounding may have crossed them.
            targets[name] = {"between": sorted((low, high))}
        elif np.isfinite(low):
            targets[name] = {"at_least": low}
        elif np.isfinite(high):
            targets[name] = {"at_most": high}
    floors = {
        name: floor
        for name, floor in zip(bounds.values, bounds.floors.tolist(), strict=True)
        if not np.isnan(floor)
    }
    return Palette(targets, floors, bounds.on_floor)
