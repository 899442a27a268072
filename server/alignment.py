"""One request: generate, score, solve, choose. No HTTP in here."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np

from rewards import Message, RewardSuite
from server.admission import Admission
from server.backends.base import Backend, Candidate, Prompt, SamplingSettings
from server.calibration import Calibration
from server.promise import Promise, Promiser
from server.schemas import (
    CalibrationReport,
    CandidateReport,
    Level,
    PaletteOptions,
    PaletteReport,
    TimingReport,
)
from server.scoring import sample_of
from solver import tilt


@dataclass(frozen=True, slots=True)
class AlignmentRequest:
    """What a client wants, checked for form only.

    Attributes
    ----------
    messages : tuple of Message
    sampling : SamplingSettings
    n_choices : int
        Different answers wanted.
    seed : int
        In [0, 2**63); the same request with the same seed gets the same answer.
    palette : PaletteOptions or None
        None: the base model's own answers, nothing scored, nothing chosen.
    top_logprobs : int
    """

    messages: tuple[Message, ...]
    sampling: SamplingSettings
    n_choices: int
    seed: int
    palette: PaletteOptions | None = None
    top_logprobs: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """A request that has been checked: whatever can be refused without generating has been.

    Attributes
    ----------
    promise : Promise or None
        None without a palette, and with scope ``answer`` until the candidates are there.
    calibration : Calibration or None
        The one the promise was solved on, should a new one arrive meanwhile.
    """

    request: AlignmentRequest
    prompt: Prompt
    n_candidates: int
    promise: Promise | None
    calibration: Calibration | None
    started: float


@dataclass(frozen=True, slots=True)
class Aligned:
    """The answers served, in order of choice, and what the client is told about them.

    Attributes
    ----------
    chosen : tuple of Candidate
        Empty when no candidate clears the palette's floors and it says to refuse.
    spent_tokens : int
        Tokens sampled for all candidates.
    """

    prompt: Prompt
    chosen: tuple[Candidate, ...]
    spent_tokens: int
    report: PaletteReport | None


class Aligner:
    """Serves aligned answers from a backend, rewards and a calibration.

    Attributes
    ----------
    calibration : Calibration or None
        Replaced whole when a new one is ready; requests in flight keep the one they began with.
    """

    def __init__(
        self,
        backend: Backend,
        rewards: RewardSuite,
        promiser: Promiser,
        admission: Admission,
        calibration: Calibration | None = None,
    ) -> None:
        self.backend = backend
        self.rewards = rewards
        self.promiser = promiser
        self.admission = admission
        self.calibration = calibration

    async def plan(self, request: AlignmentRequest) -> Plan:
        """Return the request with its prompt rendered and its palette solved.

        Raises
        ------
        PaletteError, InfeasiblePaletteError, CalibrationMissingError
            See `Promiser.on_traffic`.
        PromptError, ContextLengthError
            See `Backend.render`.
        """
        started = time.perf_counter()
        calibration, options = self.calibration, request.palette
        promise = None
        n_candidates = request.n_choices
        if options is not None:
            if options.scope == "answer":
                n_candidates = self.promiser.check(options, request.n_choices)
            else:
                promise = await self.promiser.on_traffic(options, calibration, request.n_choices)
                n_candidates = promise.n_candidates
        if request.sampling.temperature == 0:
            # All candidates would be the same text: one says as much as N, and costs less.
            n_candidates = request.n_choices
        prompt = await self.backend.render(request.messages)
        return Plan(request, prompt, n_candidates, promise, calibration, started)

    async def run(self, plan: Plan) -> Aligned:
        """Return the chosen answers of a planned request.

        Cancelling it takes generation and scoring with it.

        Raises
        ------
        QueueFullError
            When too many requests wait already.
        BackendError, RewardError, InfeasiblePaletteError
        """
        queued = time.perf_counter()
        async with self.admission:
            begun = time.perf_counter()
            candidates, generated, rewards = await self._draw(plan)
            scored = time.perf_counter()
        spent = sum(candidate.n_tokens for candidate in candidates)
        options = plan.request.palette
        if options is None or rewards is None:
            return Aligned(plan.prompt, tuple(candidates), spent, None)

        promise = plan.promise or await self.promiser.on_answer(options, rewards, len(candidates))
        log_weights, picks = self._choose(plan, promise, rewards)
        ended = time.perf_counter()
        report = None
        if options.report != "none":
            timing = TimingReport(
                queue=_ms(queued, begun),
                solve=round(promise.solve_ms, 3),
                generate=_ms(begun, generated),
                score=_ms(generated, scored),
                total=_ms(plan.started, ended),
            )
            report = self._report(plan, promise, candidates, rewards, log_weights, picks, timing)
        return Aligned(plan.prompt, tuple(candidates[i] for i in picks), spent, report)

    async def _draw(self, plan: Plan) -> tuple[list[Candidate], float, np.ndarray | None]:
        """Return the candidates in order, when the last one came, and their rewards.

        Each candidate is scored as it comes, while the others are still being generated.
        """
        request = plan.request
        stream = self.backend.generate(
            plan.prompt,
            plan.n_candidates,
            request.sampling,
            request.seed,
            top_logprobs=request.top_logprobs,
        )
        drawn: list[tuple[Candidate, asyncio.Task[np.ndarray] | None]] = []
        try:
            async with asyncio.TaskGroup() as group, aclosing(stream):  # type: ignore[type-var]
                async for candidate in stream:
                    scoring = None
                    if request.palette is not None:
                        sample = sample_of(plan.prompt, candidate)
                        scoring = group.create_task(self.rewards.score([sample]))
                    drawn.append((candidate, scoring))
                generated = time.perf_counter()
        except ExceptionGroup as failures:
            # One failure cancels the rest, so there is one to tell.
            raise failures.exceptions[0] from None
        drawn.sort(key=lambda pair: pair[0].index)
        candidates = [candidate for candidate, _ in drawn]
        scores = [scoring.result() for _, scoring in drawn if scoring is not None]
        return candidates, generated, np.concatenate(scores) if scores else None

    def _choose(
        self, plan: Plan, promise: Promise, rewards: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return log-weights (n_candidates,) and the indices chosen, from the request's seed."""
        floors = [promise.palette.floors.get(name, np.nan) for name in self.promiser.values]
        scale = 1.0 if plan.calibration is None else plan.calibration.pilot.scale
        mask = tilt.floor_mask(rewards, floors, promise.palette.on_floor, scale)
        if not mask.any():
            return np.full(len(rewards), -np.inf), np.empty(0, dtype=np.intp)
        log_weights = tilt.log_weights(promise.multipliers, rewards, mask)
        # Another stream than the candidates': they use the seed itself.
        seed = int(np.random.SeedSequence([plan.request.seed, 1]).generate_state(1, np.uint64)[0])
        return log_weights, tilt.draw(log_weights, seed, plan.request.n_choices)

    def _report(
        self,
        plan: Plan,
        promise: Promise,
        candidates: list[Candidate],
        rewards: np.ndarray,
        log_weights: np.ndarray,
        picks: np.ndarray,
        timing: TimingReport,
    ) -> PaletteReport:
        names = self.promiser.values
        options = plan.request.palette
        assert options is not None
        weights = np.exp(log_weights)
        is_served = len(picks) > 0
        solution = promise.solution
        if solution is None:
            # Nothing was promised on average: what these candidates' weights give is all there is.
            expected = {}
            if is_served:
                means = tilt.expected(log_weights, rewards)
                expected = {name: Level(level=float(means[i])) for i, name in enumerate(names)}
            targets: dict[str, float | tuple[float, float]] = {}
        else:
            on_answer = options.scope == "answer"
            expected = {
                name: Level(
                    level=float(solution.expected[i]),
                    stderr=None if on_answer else float(solution.stderr[i]),
                )
                for i, name in enumerate(names)
            }
            targets = dict(solution.targets)
        return PaletteReport(
            status=promise.status,
            scope=options.scope,
            targets=targets,
            multipliers={name: float(promise.multipliers[i]) for i, name in enumerate(names)},
            expected=expected,
            realised=(
                dict(zip(names, rewards[picks].mean(axis=0).tolist(), strict=True))
                if is_served
                else {}
            ),
            limited_by="max_kl" if solution is not None and solution.limited_by else None,
            candidates=len(candidates),
            ess=float(tilt.ess(log_weights)) if is_served else 0.0,
            kl=float(tilt.kl(log_weights)) if is_served else 0.0,
            calibration=self._calibration_report(plan),
            timing_ms=timing,
            repair=promise.repair,
            candidates_detail=(
                [
                    CandidateReport(
                        index=one.index,
                        text=one.text,
                        rewards=dict(zip(names, rewards[i].tolist(), strict=True)),
                        weight=float(weights[i]),
                        chosen=i in picks,
                        finish_reason=one.finish_reason,
                    )
                    for i, one in enumerate(candidates)
                ]
                if options.report == "full"
                else None
            ),
        )

    def _calibration_report(self, plan: Plan) -> CalibrationReport:
        calibration, request = plan.calibration, plan.request
        if request.palette is not None and request.palette.scope == "answer":
            return CalibrationReport(id=None, prompts=0, valid=True, warnings=[])
        if calibration is None:
            warnings = ["no calibration: multipliers are used as given, no level is promised"]
            return CalibrationReport(id=None, prompts=0, valid=False, warnings=warnings)
        warnings = calibration.warnings_for(
            self.backend.fingerprint, self.rewards.fingerprint, request.sampling
        )
        return CalibrationReport(
            id=calibration.id,
            prompts=calibration.pilot.n_prompts,
            valid=not warnings,
            warnings=warnings,
        )


def _ms(start: float, end: float) -> float:
    return round((end - start) * 1e3, 3)
