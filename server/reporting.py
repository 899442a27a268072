"""What a client is told about a palette: promised, expected, delivered."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rewards import Asked, RewardSuite
from server.backends.base import Candidate
from server.calibration import Calibration
from server.promise import Promise
from server.schemas import (
    CalibrationReport,
    CandidateReport,
    DeadlineReport,
    JudgingReport,
    Level,
    Measured,
    PaletteOptions,
    PaletteReport,
    ProfileReport,
    TimingReport,
    Watched,
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
    judging : JudgingReport or None
        None where nothing is judged.
    """

    candidates: list[Candidate]
    rewards: np.ndarray
    log_weights: np.ndarray
    picks: np.ndarray
    deadline: DeadlineReport | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    judging: JudgingReport | None = None


@dataclass(frozen=True, slots=True)
class Measures:
    """What a request's candidates measure beside what is aligned.

    Attributes
    ----------
    own : dict of str to Measured or None
        Transformed values in their own unit; None where some reward is missing.
    watched : dict of str to (Measured or None, Measured or None)
        Values with a held-out scorer: what is aligned, and what is watched.
    """

    own: dict[str, Measured | None] = field(default_factory=dict)
    watched: dict[str, tuple[Measured | None, Measured | None]] = field(default_factory=dict)


def measures_of(
    suite: RewardSuite,
    measured: np.ndarray,
    rewards: np.ndarray,
    log_weights: np.ndarray,
    picks: np.ndarray,
) -> Measures:
    """Return what is told of transformed values in their own unit, and of what is watched.

    Parameters
    ----------
    suite : RewardSuite
    measured : ndarray, shape (n_candidates, n_columns)
    rewards : ndarray, shape (n_candidates, n_values)
        Aligned.
    log_weights : ndarray, shape (n_candidates,)
    picks : ndarray of int
    """

    def of(column: np.ndarray) -> Measured | None:
        return _measured(column, log_weights, picks)

    names, columns = suite.names, suite.columns
    own = {name: of(measured[:, names.index(name)]) for name in suite.transforms}
    watched = {
        name: (of(rewards[:, names.index(name)]), of(measured[:, columns.index(watch)]))
        for name, watch in suite.watches.items()
    }
    return Measures(own, watched)


def _measured(column: np.ndarray, log_weights: np.ndarray, picks: np.ndarray) -> Measured | None:
    """Return what a column, shape (n_candidates,), measures; None where a reward is missing."""
    if np.isnan(column).any() or not np.isfinite(log_weights).any():
        return None
    return Measured(
        realised=float(column[picks].mean()) if len(picks) else None,
        weighted=float(tilt.expected(log_weights, column[:, None])[0]),
        candidates=float(column.mean()),
    )


def palette_report(
    options: PaletteOptions,
    promise: Promise,
    outcome: Outcome,
    names: Sequence[str],
    calibration: CalibrationReport,
    timing: TimingReport,
    profile: ProfileReport | None = None,
    measures: Measures | None = None,
) -> PaletteReport:
    """Return the report of one answered request; `names` are the values in order."""
    measures = measures or Measures()
    own = {name: one for name, one in measures.own.items() if one is not None}
    watched = {
        name: Watched(value=value, watch=watch)
        for name, (value, watch) in measures.watched.items()
        if value is not None and watch is not None
    }
    return PaletteReport(
        measured=own or None,
        watched=watched or None,
        **choice_report(options, promise, outcome, names, calibration, profile),
        timing_ms=timing,
        deadline=outcome.deadline,
        judging=outcome.judging,
        candidates_detail=_details(outcome, names) if options.report == "full" else None,
    )


def choice_report(
    options: PaletteOptions,
    promise: Promise,
    outcome: Outcome,
    names: Sequence[str],
    calibration: CalibrationReport,
    profile: ProfileReport | None = None,
) -> dict[str, Any]:
    """Return the fields of `ChoiceReport`; of the candidates it needs the rewards alone."""
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
    return {
        "status": promise.status,
        "scope": options.scope,
        "profile": profile,
        "targets": targets,
        "multipliers": {name: float(promise.multipliers[i]) for i, name in enumerate(names)},
        "expected": expected,
        "realised": _known(names, rewards[picks].mean(axis=0), outcome) if is_served else {},
        "limited_by": "max_kl" if solution is not None and solution.limited_by else None,
        "candidates": len(rewards),
        "ess": float(tilt.ess(log_weights)) if is_served else 0.0,
        "kl": float(tilt.kl(log_weights)) if is_served else 0.0,
        "calibration": calibration,
        "repair": promise.repair,
        "left_out": outcome.left_out or None,
    }


def calibration_report(
    calibration: Calibration | None, scope: str, uncovered: Sequence[str], found: Sequence[str]
) -> CalibrationReport:
    """Return what stands behind a promise of this scope.

    Parameters
    ----------
    calibration : Calibration or None
    scope : {"traffic", "answer"}
    uncovered : sequence of str
        Why the calibration does not cover the request: no matter of a promise on the answer.
    found : sequence of str
        What is known against the promise anyway.
    """
    if scope == "answer":
        return CalibrationReport(id=None, prompts=0, valid=True, warnings=list(found))
    warnings = [*found, *uncovered]
    return CalibrationReport(
        id=None if calibration is None else calibration.id,
        prompts=0 if calibration is None else calibration.pilot.n_prompts,
        valid=not warnings,
        warnings=warnings,
        version=0 if calibration is None else calibration.version,
        updated=None if calibration is None else calibration.updated or calibration.info.created,
        live_prompts=0 if calibration is None else calibration.live_prompts,
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


def judging_report(asked: Asked) -> JudgingReport:
    """Return what the chat model was asked for a request."""
    is_unknown = asked.n_questions > 0 and not asked.n_tokens
    return JudgingReport(
        questions=asked.n_questions, prompt_tokens=None if is_unknown else asked.n_tokens
    )


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
