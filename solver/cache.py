"""Solutions kept by what was asked: one solve per key at a time, near keys give warm starts."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Hashable
from concurrent.futures import Future
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from solver.palette import Palette
from solver.pilot import PilotSet
from solver.solution import Solution, Status
from solver.solving import solve
from solver.targets import parse_count

FloatArray = npt.NDArray[np.float64]
Origin = Literal["cached", "warm", "cold"]

# Neighbours kept for each family of palettes; looking through them costs some microseconds.
_NEIGHBOURS: Final = 128
_FAMILIES: Final = 256
_DEFAULTS: Final[dict[str, Any]] = {
    "groups": None,
    "seed": 0,
    "ridge": 0.0,
    "max_kl": None,
    "max_iterations": 100,
}


class SolutionCache:
    """A bounded, thread-safe cache of `solve`, least recently used first to go.

    Parameters
    ----------
    max_entries : int
        Solutions kept; one takes about a kilobyte.

    Attributes
    ----------
    counts : Counter of (Origin, Status)
        Solutions given out so far.

    Notes
    -----
    The key is the palette's canonical form, the pilot set's fingerprint, N and the options, so a
    new calibration never gets an old answer. Every outcome is kept, infeasible ones too.
    """

    def __init__(self, max_entries: int = 4096) -> None:
        self.max_entries = parse_count(max_entries, "max_entries")
        self.counts: Counter[tuple[Origin, Status]] = Counter()
        self._solutions: OrderedDict[Hashable, Solution] = OrderedDict()
        self._flights: dict[Hashable, Future[Solution]] = {}
        self._families: OrderedDict[Hashable, deque[tuple[FloatArray, Solution]]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._solutions)

    def clear(self) -> None:
        """Forget every solution; solves under way still reach those who wait for them."""
        with self._lock:
            self._solutions.clear()
            self._families.clear()

    def lookup(
        self, palette: Palette, pilot: PilotSet, candidates: float = 16, **options: Any
    ) -> Solution | None:
        """Return the kept solution or None, in microseconds and without solving.

        Parameters are those of `solve`, except `warm_start`.
        """
        key = _key(palette, pilot, candidates, options)
        with self._lock:
            solution = self._solutions.get(key)
            if solution is not None:
                self._solutions.move_to_end(key)
                self.counts["cached", solution.status] += 1
            return solution

    def solve(
        self, palette: Palette, pilot: PilotSet, candidates: float = 16, **options: Any
    ) -> tuple[Solution, Origin]:
        """Return the solution, and whether it was cached, solved from a neighbour, or from scratch.

        Threads that ask for the same key at the same time share one solve: the first one runs it,
        the others wait for its result ("cached" to them) or its exception.

        Raises
        ------
        PaletteError, PilotError
            As `solve`; an exception is not kept.
        """
        key = _key(palette, pilot, candidates, options)
        with self._lock:
            solution = self._solutions.get(key)
            if solution is not None:
                self._solutions.move_to_end(key)
                self.counts["cached", solution.status] += 1
                return solution, "cached"
            flight = self._flights.get(key)
            leads = flight is None
            if flight is None:
                flight = self._flights[key] = Future()
        if not leads:
            solution = flight.result()
            with self._lock:
                self.counts["cached", solution.status] += 1
            return solution, "cached"
        try:
            family, levels = _family(palette, pilot, key)
            near = self._nearest(family, levels)
            solution = solve(palette, pilot, candidates, warm_start=near, **options)
        except BaseException as error:
            with self._lock:
                del self._flights[key]
            flight.set_exception(error)
            raise
        origin: Origin = "cold" if near is None else "warm"
        with self._lock:
            self._keep(key, solution, family, levels)
            self.counts[origin, solution.status] += 1
            del self._flights[key]
        flight.set_result(solution)
        return solution, origin

    def _keep(
        self, key: Hashable, solution: Solution, family: Hashable, levels: FloatArray
    ) -> None:
        self._solutions[key] = solution
        while len(self._solutions) > self.max_entries:
            self._solutions.popitem(last=False)
        if solution.status is not Status.OPTIMAL or solution.fraction < 1.0:
            return
        neighbours = self._families.setdefault(family, deque(maxlen=_NEIGHBOURS))
        self._families.move_to_end(family)
        neighbours.append((levels, solution))
        while len(self._families) > _FAMILIES:
            self._families.popitem(last=False)

    def _nearest(self, family: Hashable, levels: FloatArray) -> Solution | None:
        with self._lock:
            neighbours = list(self._families.get(family, ()))
        if not neighbours:
            return None
        distance = np.abs(np.stack([there for there, _ in neighbours]) - levels).max(axis=1)
        return neighbours[int(distance.argmin())][1]


def _key(
    palette: Palette, pilot: PilotSet, candidates: float, options: dict[str, Any]
) -> tuple[Hashable, ...]:
    if not options:
        return palette.key, pilot.fingerprint, candidates, *_DEFAULTS.values()
    for name in options:
        if name not in _DEFAULTS:
            raise TypeError(f"{name!r} is not an option of a cached solve")
    return palette.key, pilot.fingerprint, candidates, *(_DEFAULTS | options).values()


def _family(palette: Palette, pilot: PilotSet, key: tuple[Any, ...]) -> tuple[Hashable, FloatArray]:
    """Return what two palettes must share for one to start the other, and the standardised levels.

    They share everything but the numbers asked: the same values are bounded on the same sides.
    """
    asked = palette.resolve(pilot)
    bounds = np.concatenate([asked.lower, asked.upper])
    given = np.concatenate([asked.fixed, asked.fixed])
    sides = np.isfinite(bounds)
    levels = np.where(sides, bounds, 0.0) / np.concatenate([pilot.scale, pilot.scale])
    _, *floors = palette.key
    return (sides.tobytes(), np.isnan(given).tobytes(), *floors, *key[1:]), levels
