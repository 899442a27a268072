"""One request: generate, score, solve, choose. No HTTP in here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from rewards import Asked, RewardSuite
from server.admission import Admission
from server.aligning import translated
from server.alignment_stages import Aligned, AlignmentRequest, Choice, Plan, Served, served_of
from server.backends.base import Backend, Candidate, UpstreamError
from server.calibration import Calibration, system_of
from server.choosing import choose, promise_for
from server.deadline import wait_for
from server.drawing import Draw
from server.layers import Layers
from server.leaving_out import dispensable, left_out, promise_without, without
from server.promise import Promiser
from server.reporting import (
    Outcome,
    calibration_report,
    judging_report,
    measures_of,
    palette_report,
    timing_report,
)
from server.schemas import CalibrationReport, PaletteOptions
from server.scoring import sample_of
from server.shelf import Shelf

Observer = Callable[[Served], None]
Doubts = Callable[[Calibration], Iterable[str]]


class Aligner:
    """Serves aligned answers from a backend, rewards and calibrations.

    Attributes
    ----------
    layers : Layers
    shelf : Shelf
        Calibrations; requests in flight keep the one they began with.
    observers : list of callable
        Are told of every answer, in order; what one of them raises fails the request.
    doubts : callable
        Says what live traffic has shown against a calibration.
    """

    def __init__(
        self,
        backend: Backend,
        rewards: RewardSuite,
        promiser: Promiser,
        admission: Admission,
        layers: Layers,
        shelf: Shelf | None = None,
        observers: Iterable[Observer] = (),
    ) -> None:
        self.backend = backend
        self.rewards = rewards
        self.promiser = promiser
        self.admission = admission
        self.layers = layers
        self.shelf = shelf or Shelf()
        self.observers = list(observers)
        self.doubts: Doubts = lambda calibration: ()
        self._reads_logprobs = set(rewards.text_only_columns) != set(rewards.columns)

    @property
    def calibration(self) -> Calibration | None:
        """The calibration of a request that leaves all to the server; assigned, the only one."""
        return self.shelf.default

    @calibration.setter
    def calibration(self, only: Calibration | None) -> None:
        self.shelf = Shelf.of(only)

    async def plan(self, request: AlignmentRequest) -> Plan:
        """Return the request with its prompt rendered and its palette solved.

        Raises
        ------
        PaletteError, ProfileError
            See `Layers.resolve`.
        PaletteError, InfeasiblePaletteError, CalibrationMissingError
            See `Promiser.on_traffic` and `Shelf.choose`.
        PromptError, ContextLengthError
            See `Backend.render` and `Backend.read`.
        """
        started = time.perf_counter()
        laid = await self.layers.resolve(request.palette)
        request = replace(request, palette=laid.options)
        options = request.palette
        name = None if options is None else options.calibration
        calibration = self.shelf.choose(request.sampling, request.messages, name)
        if options is not None:
            options = translated(options, calibration, self.rewards)
            request = replace(request, palette=options)
        promise = None
        n_candidates = request.n_choices
        if options is not None:
            if options.scope == "answer":
                n_candidates = self.promiser.check(options, request.n_choices)
            else:
                promise, calibration = await self.promiser.on_live(
                    options, calibration, request.n_choices
                )
                n_candidates = promise.n_candidates
        if request.sampling.temperature == 0:
            # All candidates would be the same text: one says as much as N, and costs less.
            n_candidates = request.n_choices
        if request.text is None:
            prompt = await self.backend.render(request.messages, request.tools)
        else:
            prompt = await self.backend.read(request.text)
        return Plan(request, prompt, n_candidates, promise, calibration, started, laid.profile)

    async def run(self, plan: Plan) -> Aligned:
        """Return the chosen answers of a planned request.

        Cancelling it takes generation and scoring with it.

        Raises
        ------
        QueueFullError
            When too many requests wait already.
        BackendError, RewardError, InfeasiblePaletteError
        """
        model, options = self.backend.model_id, plan.request.palette
        reasons: dict[str, str] = {}  # why a value could not be scored
        asked = Asked()
        queued = time.perf_counter()
        async with self.admission:
            begun = time.perf_counter()
            drawn = self._draw(plan, reasons, asked)
            deadline = await wait_for(drawn, options, plan.started, plan.n_candidates)
            scored = time.perf_counter()
        candidates, rewards = drawn.ready()
        if len(candidates) < plan.request.n_choices:
            msg = (
                f"only {len(candidates)} of {plan.n_candidates} candidates came from the upstream "
                f"model server, too few for n={plan.request.n_choices}; retry later"
            )
            raise UpstreamError(msg)
        marks = (queued, begun, drawn.generated, scored)
        if options is None or rewards is None:
            timing = timing_report(plan.started, marks, 0.0)
            return self._answered(
                served_of(model, plan, drawn.finished, candidates, Choice(), timing, None)
            )

        promise = plan.promise
        measured, rewards = rewards, self._aligned(rewards, plan.calibration)
        lost = left_out(rewards, self.promiser.values, reasons)
        if promise is not None and lost:
            options, promise = await promise_without(
                self.promiser, options, plan.calibration, promise, lost, plan.request.n_choices
            )
        elif lost:
            options = without(options, lost, len(candidates))
        is_lost = drawn.is_ended and len(drawn.finished) < plan.n_candidates
        group = plan.group(rewards, is_lost=is_lost)
        promise, warnings = await promise_for(group, options, promise, self.promiser)
        log_weights, picks = choose(group, promise, self.promiser.values)
        timing = timing_report(plan.started, marks, promise.solve_ms)
        judging = judging_report(asked) if self.rewards.needs_judge else None
        report = palette_report(
            options,
            promise,
            Outcome(candidates, group.known, log_weights, picks, deadline, lost, judging),
            self.promiser.values,
            self._calibration_report(plan, warnings),
            timing,
            plan.profile,
            measures_of(self.rewards, measured, rewards, log_weights, picks),
        )
        choice = Choice(promise, group, tuple(warnings), picks)
        return self._answered(
            served_of(model, plan, drawn.finished, candidates, choice, timing, report)
        )

    def _answered(self, served: Served) -> Aligned:
        """Return the answer, once the observers know of it."""
        for observe in self.observers:
            observe(served)
        return served.answer()

    def _draw(self, plan: Plan, reasons: dict[str, str], asked: Asked) -> Draw:
        """Return the candidates of a plan, which are to be waited for.

        Why values could not be scored is put into `reasons`, what was asked of them into `asked`.
        """
        request = plan.request
        columns = self.rewards.columns
        can_fail = dispensable(request.palette or PaletteOptions(), self.promiser.values)
        can_fail |= set(self.rewards.watches.values())

        async def score(candidate: Candidate) -> np.ndarray:
            more = len(drawn.finished) < plan.n_candidates
            sample = sample_of(plan.prompt, candidate)
            found = await self.rewards.attempt([sample], can_fail, columns, more=more)
            reasons.update(found.failures)
            asked.add(found.asked)
            return found.rewards

        drawn = Draw(
            self.backend.generate(
                plan.prompt,
                plan.n_candidates,
                request.sampling,
                request.seed,
                top_logprobs=request.top_logprobs,
                wants_logprobs=request.wants_logprobs
                or (request.palette is not None and self._reads_logprobs),
            ),
            None if request.palette is None else score,
            request.n_choices,
        )
        return drawn

    def _aligned(self, measured: np.ndarray, calibration: Calibration | None) -> np.ndarray:
        """Return the rewards that are aligned, shape (n_candidates, n_values)."""
        if calibration is None or calibration.units is None:
            return measured[:, : len(self.promiser.values)]
        return calibration.units.of(self.rewards.columns).align(measured)

    def _calibration_report(self, plan: Plan, found: list[str]) -> CalibrationReport:
        """Return what stands behind the promise; `found` is what is known against it already."""
        options = plan.request.palette
        scope = "traffic" if options is None else options.scope
        return calibration_report(plan.calibration, scope, self.uncovered(plan), found)

    def uncovered(self, plan: Plan) -> list[str]:
        """Return why the calibration does not cover a request; empty when it does."""
        if plan.calibration is None:
            return ["no calibration: multipliers are used as given, no level is promised"]
        warnings = plan.calibration.warnings_for(
            self.backend.fingerprint,
            self.rewards.fingerprint,
            plan.request.sampling,
            system_of(plan.request.messages),
        )
        if plan.prompt.tools is not None:
            warnings.append("tools are not covered: the calibration was sampled without them")
        if plan.prompt.is_raw:
            warnings.append(
                "a prompt without the chat template is not covered: the calibration was sampled "
                "with it"
            )
        warnings.extend(self.doubts(plan.calibration))
        return warnings
