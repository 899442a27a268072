"""What a client is told about a palette: promised, expected, delivered."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from server.backends.base import Candidate
from server.promise import Promise
from server.schemas import (
    CalibrationReport,
    CandidateReport,
    DeadlineReport,
    Level,
    PaletteOptions,
    PaletteReport,
    TimingReport,
)
from server.scoring import answer_text
from solver import tilt


@dataclass(frozen=True, slots=True)
class Outcome:
    """The candidates of a request and what was chosen among them.

    Attributes
    ----------
    candidates : list of Candidate
    rewards : ndarray, shape (n_candidates, n_values)
    log_weights : ndarray, shape (n_candidates,)
    picks : ndarray of int
        Empty when no candidate clears the floors.
    deadline : DeadlineReport or None
    left_out : dict of str to str
        Values without rewards, and why.
    """

    candidates: list[Candidate]
    rewards: np.ndarray
    log_weights: np.ndarray
    picks: np.ndarray
    deadline: DeadlineReport | None = None
    left_out: dict[str, str] = field(default_factory=dict)


def palette_report(
    options: PaletteOptions,
    promise: Promise,
    outcome: Outcome,
    names: Sequence[str],
    calibration: CalibrationReport,
    timing: TimingReport,
) -> PaletteReport:
    """Return the report of one answered request; `names` are the values in order."""
    rewards, log_weights, picks = outcome.rewards, outcome.log_weights, outcome.picks
    is_served = len(picks) > 0
    solution = promise.solution
    targets: dict[str, float | tuple[float, float]] = {}
    expected = {}
    if solution is not None:
        targets = dict(solution.targets)
        on_answer = options.scope == "answer"
        expected = {
            name: Level(
                level=float(solution.expected[i]),
                stderr=None if on_answer else float(solution.stderr[i]),
            )
            for i, name in enumerate(names)
            if not (on_answer and name in outcome.left_out)
        }
    elif is_served:
        # Nothing was promised on average: what these candidates' weights give is all there is.
        means = tilt.expected(log_weights, rewards)
        expected = {
            name: Level(level=float(means[i]))
            for i, name in enumerate(names)
            if name not in outcome.left_out
        }
    return PaletteReport(
        status=promise.status,
        scope=options.scope,
        targets=targets,
        multipliers={name: float(promise.multipliers[i]) for i, name in enumerate(names)},
        expected=expected,
        realised=_known(names, rewards[picks].mean(axis=0), outcome) if is_served else {},
        limited_by="max_kl" if solution is not None and solution.limited_by else None,
        candidates=len(outcome.candidates),
        ess=float(tilt.ess(log_weights)) if is_served else 0.0,
        kl=float(tilt.kl(log_weights)) if is_served else 0.0,
        calibration=calibration,
        timing_ms=timing,
        repair=promise.repair,
        deadline=outcome.deadline,
        left_out=outcome.left_out or None,
        candidates_detail=_details(outcome, names) if options.report == "full" else None,
    )


def _known(names: Sequence[str], rewards: np.ndarray, outcome: Outcome) -> dict[str, float]:
    """Return the rewards, shape (n_values,), by value, of the values that have any."""
    pairs = zip(names, rewards.tolist(), strict=True)
    return {name: reward for name, reward in pairs if name not in outcome.left_out}


def _details(outcome: Outcome, names: Sequence[str]) -> list[CandidateReport]:
    weights = np.exp(outcome.log_weights)
    return [
        CandidateReport(
            index=one.index,
            text=answer_text(one),
            rewards=_known(names, outcome.rewards[i], outcome),
            weight=float(weights[i]),
            chosen=i in outcome.picks,
            finish_reason=one.finish_reason,
        )
        for i, one in enumerate(outcome.candidates)
    ]


def timing_report(
    started: float, marks: tuple[float, float, float, float], solve_ms: float
) -> TimingReport:
    """Return the stages between the marks: queued, begun, generated, scored; it ends now."""
    queued, begun, generated, scored = marks
    return TimingReport(
        queue=_ms(queued, begun),
        solve=round(solve_ms, 3),
        generate=_ms(begun, generated),
        score=_ms(generated, scored),
        total=_ms(started, time.perf_counter()),
    )


def _ms(start: float, end: float) -> float:
    return round((end - start) * 1e3, 3)
