"""Fewer candidates than asked for: which are waited for, and what can still be promised."""

from __future__ import annotations

from dataclasses import replace

from server.calibration import Calibration
from server.drawing import Draw
from server.promise import InfeasiblePaletteError, Promise, Promiser
from server.schemas import DeadlineReport, PaletteOptions


async def wait_for(
    drawn: Draw, options: PaletteOptions | None, started: float, n_asked: int
) -> DeadlineReport | None:
    """Wait for all candidates, or until the palette's deadline; return what came of that one.

    Parameters
    ----------
    drawn : Draw
    options : PaletteOptions or None
    started : float
        When the request arrived, on the clock of `time.perf_counter`.
    n_asked : int
        Candidates on their way.
    """
    if options is None or options.deadline_ms is None:
        await drawn.run()
        return None
    is_met = await drawn.run_until(started + options.deadline_ms / 1e3)
    n_used = len(drawn.ready()[0])
    return DeadlineReport(ms=options.deadline_ms, asked=n_asked, used=n_used, met=is_met)


async def promise_fewer(
    promiser: Promiser,
    options: PaletteOptions,
    calibration: Calibration | None,
    promise: Promise,
    n_candidates: int,
    n_choices: int,
    told: str,
) -> tuple[Promise, str]:
    """Return the promise for the candidates that are left, and what is not promised.

    It is solved for as many as there are, and no longer `met`: those that a deadline or a failing
    upstream leaves are no fair sample of the model's answers. `told` is what the client hears of
    them anyway.
    """
    if promise.solution is None:
        return promise, told
    # An answer is there: it is not refused for what more candidates would have met.
    is_reject = options.on_infeasible == "reject"
    fewer = options.model_copy(
        update={
            "candidates": n_candidates,
            "on_infeasible": "best_effort" if is_reject else options.on_infeasible,
        }
    )
    try:
        promise = await promiser.on_traffic(fewer, calibration, n_choices)
    except InfeasiblePaletteError:
        told += f"; multipliers are those of {promise.n_candidates} candidates"
    if promise.status == "met":
        promise = replace(promise, status="best_effort")
    return promise, told
