"""From a palette to multipliers: what is promised before, or on, the candidates of a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from server.calibration import Calibration, CalibrationMissingError
from server.schemas import PaletteOptions
from solver import (
    Palette,
    PaletteError,
    PilotSet,
    Solution,
    SolutionCache,
    Status,
    min_candidates,
    repair,
    solve,
)

PromiseStatus = Literal["met", "repaired", "best_effort"]

# `"candidates": "auto"` tries these; between them the gain does not pay for the tokens.
AUTO_CANDIDATES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


class InfeasiblePaletteError(Exception):
    """No choice among N candidates meets the palette.

    Attributes
    ----------
    details : dict
        ``certificate``, ``nearest`` (a palette that can be had, in the request's form),
        ``min_candidates`` and ``status``: JSON-safe.
    param : str
        The palette's field that asks for too much.
    """

    def __init__(self, message: str, details: dict[str, Any], param: str = "targets") -> None:
        super().__init__(message)
        self.details = details
        self.param = param


@dataclass(frozen=True, slots=True)
class Promise:
    """Multipliers for a request and the levels they stand for.

    Attributes
    ----------
    palette : Palette
        What is promised: the client's palette, or the repaired one.
    multipliers : ndarray, shape (n_values,)
    solution : Solution or None
        None when nothing had to be solved (multipliers only, no calibration).
    repair : dict or None
        What was changed and how far, JSON-safe.
    solve_ms : float
        Time from palette to multipliers; microseconds when the cache had them.
    """

    status: PromiseStatus
    palette: Palette
    n_candidates: int
    multipliers: np.ndarray
    solution: Solution | None
    repair: dict[str, Any] | None = None
    solve_ms: float = 0.0


def palette_of(options: PaletteOptions) -> Palette:
    """Return the solver's palette.

    Raises
    ------
    PaletteError
        For targets that are none, and for a profile that nobody has looked up.
    """
    if options.profile is not None:
        msg = "a profile has no place here: give its targets themselves"
        raise PaletteError(msg, param="profile")
    return Palette(options.targets, floors=options.floors, on_floor=options.on_floor)


class Promiser:
    """Solves palettes on a calibration, remembering what it solved.

    Parameters
    ----------
    values : tuple of str
        Values the rewards give, in order.
    default_candidates, max_candidates : int
        N of a palette that does not say, and the largest allowed.

    Attributes
    ----------
    cache : SolutionCache
    """

    def __init__(
        self, values: tuple[str, ...], *, default_candidates: int, max_candidates: int
    ) -> None:
        self.values = values
        self.default_candidates = default_candidates
        self.max_candidates = max_candidates
        self.cache = SolutionCache()

    async def on_traffic(
        self, options: PaletteOptions, calibration: Calibration | None, n_choices: int = 1
    ) -> Promise:
        """Return the promise that holds on average over prompts, solved on the calibration.

        Raises
        ------
        PaletteError
            For a palette that makes no sense or asks for an unknown value.
        CalibrationMissingError
            When the palette needs a calibration and there is none.
        InfeasiblePaletteError
            When it cannot be met at this N and the client wants no repair.
        """
        started = time.perf_counter()
        palette = palette_of(options)
        palette.check_values(self.values)
        if calibration is None:
            if palette.needs_pilot:
                msg = (
                    "this palette needs a calibration and the model has none yet: run `palette "
                    "calibrate` or wait for the one in progress (GET /ready says how far it is), "
                    'use `"scope": "answer"`, or give multipliers'
                )
                raise CalibrationMissingError(msg)
            n_candidates = self._count(options, n_choices)
            multipliers = palette.multipliers(self.values)
            return Promise("met", palette, n_candidates, multipliers, None)
        pilot = calibration.pilot
        if options.candidates == "auto":
            return await asyncio.to_thread(self._auto, palette, pilot, options, n_choices, started)
        largest = (calibration.root or calibration).pilot.n_candidates
        n_candidates = self._count(options, n_choices, largest)
        found = self.cache.lookup(palette, pilot, n_candidates, max_kl=options.max_kl)
        if found is not None and found.status is Status.OPTIMAL:
            return Promise(
                _status_of(found),
                palette,
                n_candidates,
                found.multipliers,
                found,
                solve_ms=(time.perf_counter() - started) * 1e3,
            )
        return await asyncio.to_thread(self._settle, palette, pilot, n_candidates, options, started)

    async def on_live(
        self, options: PaletteOptions, calibration: Calibration | None, n_choices: int = 1
    ) -> tuple[Promise, Calibration | None]:
        """Return the promise of `on_traffic`, and the version of the calibration it stands on.

        Live requests bring as many candidates as they ask for. What these are too few for is
        promised on the calibration that the version grew from.

        Raises
        ------
        PaletteError, CalibrationMissingError, InfeasiblePaletteError
            As `on_traffic`.
        """
        if calibration is None or calibration.root is None:
            return await self.on_traffic(options, calibration, n_choices), calibration
        root = calibration.root
        if options.candidates == "auto":
            if calibration.pilot.n_candidates < min(self.max_candidates, root.pilot.n_candidates):
                strict = options.model_copy(update={"on_infeasible": "reject"})
                try:
                    promise = await self.on_traffic(strict, calibration, n_choices)
                except InfeasiblePaletteError:
                    calibration = root
                else:
                    if promise.status == "met":
                        return promise, calibration
                    calibration = root
        else:
            largest = root.pilot.n_candidates
            calibration = calibration.covering(self._count(options, n_choices, largest))
        return await self.on_traffic(options, calibration, n_choices), calibration

    async def on_answer(
        self, options: PaletteOptions, rewards: np.ndarray, n_candidates: int
    ) -> Promise:
        """Return the promise for one prompt's own candidates.

        Parameters
        ----------
        options : PaletteOptions
        rewards : ndarray, shape (n_candidates, n_values)
        n_candidates : int

        Raises
        ------
        PaletteError, InfeasiblePaletteError
            As `on_traffic`.
        """
        palette = palette_of(options)
        pilot = PilotSet(rewards[None], self.values)
        return await asyncio.to_thread(
            self._settle, palette, pilot, n_candidates, options, time.perf_counter()
        )

    def check(self, options: PaletteOptions, n_choices: int) -> int:
        """Return N of a palette, once it is known to make sense without solving it.

        Raises
        ------
        PaletteError
        """
        palette_of(options).check_values(self.values)
        for name, target in options.targets.items():
            is_pooled = isinstance(target, dict) and target.get("of") == "traffic"
            if is_pooled and options.scope == "answer":
                msg = (
                    f'{name}: a quantile of traffic says nothing about one answer; leave "of" '
                    'out, or use "scope": "traffic"'
                )
                raise PaletteError(msg, param=f"targets.{name}.of")
        return self._count(options, n_choices)

    def _count(self, options: PaletteOptions, n_choices: int, largest: int | None = None) -> int:
        """Return N, or raise `PaletteError` when it is out of bounds.

        A palette that does not say gets the default, or `largest`, the candidates that a
        calibration has, where these are fewer.
        """
        if options.candidates is None or options.candidates == "auto":
            return max(min(self.default_candidates, largest or self.default_candidates), n_choices)
        if not 1 <= options.candidates <= self.max_candidates:
            msg = (
                f"candidates must be from 1 to {self.max_candidates} (this server's limit), "
                f"not {options.candidates}"
            )
            raise PaletteError(msg, param="candidates")
        if options.candidates < n_choices:
            msg = (
                f"{options.candidates} candidates cannot give n={n_choices} different choices: "
                "ask for more candidates or fewer choices"
            )
            raise PaletteError(msg, param="candidates")
        return options.candidates

    def _auto(
        self,
        palette: Palette,
        pilot: PilotSet,
        options: PaletteOptions,
        n_choices: int,
        started: float,
    ) -> Promise:
        """Return the promise at the smallest N that meets the palette within its KL budget."""
        limit = min(self.max_candidates, pilot.n_candidates)
        tried = [n for n in AUTO_CANDIDATES if n_choices <= n <= limit] or [limit]
        for n_candidates in tried:
            solution, _ = self.cache.solve(palette, pilot, n_candidates, max_kl=options.max_kl)
            if solution.status is Status.OPTIMAL and solution.fraction == 1:
                break
        return self._settle(palette, pilot, n_candidates, options, started)

    def _settle(
        self,
        palette: Palette,
        pilot: PilotSet,
        n_candidates: int,
        options: PaletteOptions,
        started: float,
    ) -> Promise:
        """Solve; when that cannot be done, repair or say why. Runs in a thread."""
        if pilot.n_prompts > 1:
            solution, _ = self.cache.solve(palette, pilot, n_candidates, max_kl=options.max_kl)
        else:  # one prompt's own candidates never come again: nothing to remember
            solution = solve(palette, pilot, n_candidates, max_kl=options.max_kl)
        status = _status_of(solution)
        changes = None
        promised = palette
        if solution.status is not Status.OPTIMAL:
            if options.on_infeasible == "reject":
                raise self._infeasible(palette, pilot, n_candidates, solution)
            is_repair = options.on_infeasible == "repair"
            mended = repair(
                palette,
                pilot,
                n_candidates,
                method=options.repair.method if is_repair else "nearest",
                priorities=options.repair.priorities if is_repair else None,
                max_kl=options.max_kl,
            )
            if mended.solution.status is not Status.OPTIMAL:
                # Floors that no answer clears, or a solve that did not end: nothing to promise.
                raise self._infeasible(palette, pilot, n_candidates, solution)
            status = "repaired" if is_repair else "best_effort"
            solution, promised = mended.solution, mended.palette
            changes = {
                "method": mended.method,
                "fraction": mended.fraction,
                "distance": mended.distance,
                "asked": palette.to_dict(),
            }
        return Promise(
            status,
            promised,
            n_candidates,
            solution.multipliers,
            solution,
            changes,
            solve_ms=(time.perf_counter() - started) * 1e3,
        )

    def _infeasible(
        self, palette: Palette, pilot: PilotSet, n_candidates: int, solution: Solution
    ) -> InfeasiblePaletteError:
        """Return the error with its certificate, the nearest palette and the smallest N."""
        if solution.refused == 1:
            floors = ", ".join(f"{name} >= {floor:g}" for name, floor in palette.floors.items())
            msg = (
                f"no group of {n_candidates} candidates in the calibration has an answer that "
                f"clears the floors ({floors}): lower the request's own, or, on a server without "
                'floors of its operator, send "on_floor": "best"'
            )
            return InfeasiblePaletteError(
                msg, {"status": "infeasible", "certificate": None}, param="floors"
            )
        nearest = repair(palette, pilot, n_candidates, method="nearest")
        smallest = min_candidates(palette, pilot)
        certificate = solution.certificate
        reason = certificate.sentence if certificate else solution.status.sentence
        parts = [f"{reason.rstrip('.')}."]
        parts.append(f"Nearest palette: {_levels(nearest.levels)}.")
        if smallest is not None:
            parts.append(f"It can be met with candidates >= {smallest}.")
        elif pilot.n_prompts > 1:
            parts.append(f"No N up to {pilot.n_candidates} meets it.")
        parts.append('Or send "on_infeasible": "repair".')
        details = {
            "status": solution.status.value,
            "candidates": n_candidates,
            "certificate": certificate.to_dict() if certificate else None,
            "nearest": nearest.palette.to_dict(),
            "min_candidates": smallest,
        }
        return InfeasiblePaletteError(" ".join(parts), details)


def _status_of(solution: Solution) -> PromiseStatus:
    """Return ``met``, unless a KL budget keeps the levels short of what was asked."""
    return "met" if solution.limited_by is None else "best_effort"


def _levels(levels: Mapping[str, float | tuple[float, float]]) -> str:
    return ", ".join(
        f"{name} {level:.4g}"
        if isinstance(level, float)
        else f"{name} {level[0]:.4g} to {level[1]:.4g}"
        for name, level in levels.items()
    )
