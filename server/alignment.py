"""One request: generate, score, solve, choose. No HTTP in here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from rewards import Message, RewardSuite
from server.admission import Admission
from server.backends.base import (
    Backend,
    Candidate,
    Prompt,
    SamplingSettings,
    Tools,
    UpstreamError,
)
from server.calibration import Calibration
from server.deadline import promise_fewer, wait_for
from server.drawing import Draw
from server.promise import Promise, Promiser
from server.reporting import Outcome, palette_report, timing_report
from server.schemas import (
    CalibrationReport,
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
        Nothing where `text` is to be continued.
    sampling : SamplingSettings
    n_choices : int
        Different answers wanted.
    seed : int
        In [0, 2**63); the same request with the same seed gets the same answer.
    palette : PaletteOptions or None
        None: the base model's own answers, nothing scored, nothing chosen.
    top_logprobs : int
    wants_logprobs : bool
        Whether the client is told the log-probabilities of its answers' tokens.
    tools : Tools, optional
    text : str or tuple of int, optional
        A text, or its token ids, that the model continues without a chat template.
    answer_id : str
        The id of OpenAI's answer object, by which the client can speak of it later.
    """

    messages: tuple[Message, ...]
    sampling: SamplingSettings
    n_choices: int
    seed: int
    palette: PaletteOptions | None = None
    top_logprobs: int = 0
    wants_logprobs: bool = False
    tools: Tools | None = None
    text: str | tuple[int, ...] | None = None
    answer_id: str = ""


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
    n_prompt_tokens : int
    spent_tokens : int
        Tokens sampled for all candidates that came to their end.
    """

    prompt: Prompt
    chosen: tuple[Candidate, ...]
    n_prompt_tokens: int
    spent_tokens: int
    report: PaletteReport | None


@dataclass(frozen=True, slots=True)
class Served:
    """What one answered request took and gave, for whoever observes.

    `plan`, `candidates` and the report's `candidates_detail` hold texts, which must not be logged.

    Attributes
    ----------
    model : str
    plan : Plan
    promise : Promise or None
        The one kept, which a deadline may have made anew; None without a palette.
    candidates : tuple of Candidate
        Those that were chosen among.
    rewards : ndarray, shape (n_candidates, n_values), or None
        Of those; None without a palette.
    picks : ndarray of int
        Positions in `candidates` of those served, in order; empty without a palette.
    n_candidates, n_served : int
    prompt_tokens, spent_tokens, served_tokens : int
        Of the prompt, of all candidates, and of those served.
    timing : TimingReport
    report : PaletteReport or None
        None without a palette.
    """

    model: str
    plan: Plan
    promise: Promise | None
    candidates: tuple[Candidate, ...]
    rewards: np.ndarray | None
    picks: np.ndarray
    n_candidates: int
    n_served: int
    prompt_tokens: int
    spent_tokens: int
    served_tokens: int
    timing: TimingReport
    report: PaletteReport | None


@dataclass(frozen=True, slots=True)
class _Choice:
    """What was chosen under which promise; empty without a palette."""

    promise: Promise | None = None
    rewards: np.ndarray | None = None
    picks: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.intp))


Observer = Callable[[Served], None]


class Aligner:
    """Serves aligned answers from a backend, rewards and a calibration.

    Attributes
    ----------
    calibration : Calibration or None
        Replaced whole when a new one is ready; requests in flight keep the one they began with.
    observe : callable, optional
        Is told of every answer.
    """

    def __init__(
        self,
        backend: Backend,
        rewards: RewardSuite,
        promiser: Promiser,
        admission: Admission,
        calibration: Calibration | None = None,
        observe: Observer | None = None,
    ) -> None:
        self.backend = backend
        self.rewards = rewards
        self.promiser = promiser
        self.admission = admission
        self.calibration = calibration
        self._observe = observe
        self._reads_logprobs = set(rewards.text_only_names) != set(rewards.names)

    async def plan(self, request: AlignmentRequest) -> Plan:
        """Return the request with its prompt rendered and its palette solved.

        Raises
        ------
        PaletteError, InfeasiblePaletteError, CalibrationMissingError
            See `Promiser.on_traffic`.
        PromptError, ContextLengthError
            See `Backend.render` and `Backend.read`.
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
        if request.text is None:
            prompt = await self.backend.render(request.messages, request.tools)
        else:
            prompt = await self.backend.read(request.text)
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
        options = plan.request.palette
        queued = time.perf_counter()
        async with self.admission:
            begun = time.perf_counter()
            drawn = self._draw(plan)
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
            return self._served(plan, drawn.finished, candidates, _Choice(), timing, None)

        warnings: list[str] = []
        promise = plan.promise
        is_short = len(candidates) < plan.n_candidates
        is_lost = drawn.is_ended and len(drawn.finished) < plan.n_candidates
        cause = "failures of the upstream" if is_lost else "the deadline"
        told = f"{cause} left {len(candidates)} of {plan.n_candidates} candidates"
        if promise is None:
            promise = await self.promiser.on_answer(options, rewards, len(candidates))
            if is_lost:  # a deadline has its own report
                warnings.append(told)
        elif is_short:
            told += (
                ", and shorter answers come through more easily: levels promised on average may "
                "not hold"
            )
            promise, told = await promise_fewer(
                self.promiser,
                options,
                plan.calibration,
                promise,
                len(candidates),
                plan.request.n_choices,
                told,
            )
            warnings.append(told)
        log_weights, picks = self._choose(plan, promise, rewards)
        timing = timing_report(plan.started, marks, promise.solve_ms)
        report = palette_report(
            options,
            promise,
            Outcome(candidates, rewards, log_weights, picks, deadline),
            self.promiser.values,
            self._calibration_report(plan, warnings),
            timing,
        )
        choice = _Choice(promise, rewards, picks)
        return self._served(plan, drawn.finished, candidates, choice, timing, report)

    def _served(
        self,
        plan: Plan,
        finished: list[Candidate],
        candidates: list[Candidate],
        choice: _Choice,
        timing: TimingReport,
        report: PaletteReport | None,
    ) -> Aligned:
        """Return the answer, once the observer was told of it; without a promise, all are it."""
        chosen = [candidates[i] for i in choice.picks] if choice.promise else candidates
        spent = sum(candidate.n_tokens for candidate in finished)
        # Where only the upstream can count the prompt's tokens, the candidates have them.
        n_prompt_tokens = len(plan.prompt.token_ids) or max(
            (candidate.n_prompt_tokens or 0 for candidate in finished), default=0
        )
        if self._observe is not None:
            self._observe(
                Served(
                    model=self.backend.model_id,
                    plan=plan,
                    promise=choice.promise,
                    candidates=tuple(candidates),
                    rewards=choice.rewards,
                    picks=choice.picks,
                    n_candidates=len(finished),
                    n_served=len(chosen),
                    prompt_tokens=n_prompt_tokens,
                    spent_tokens=spent,
                    served_tokens=sum(candidate.n_tokens for candidate in chosen),
                    timing=timing,
                    report=report,
                )
            )
        options = plan.request.palette
        is_told = options is not None and options.report != "none"
        return Aligned(
            plan.prompt, tuple(chosen), n_prompt_tokens, spent, report if is_told else None
        )

    def _draw(self, plan: Plan) -> Draw:
        """Return the candidates of a plan, which are to be waited for."""
        request = plan.request

        async def score(candidate: Candidate) -> np.ndarray:
            return await self.rewards.score([sample_of(plan.prompt, candidate)])

        return Draw(
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

    def _calibration_report(self, plan: Plan, found: list[str]) -> CalibrationReport:
        """Return what stands behind the promise; `found` is what is known against it already."""
        calibration, request = plan.calibration, plan.request
        if request.palette is not None and request.palette.scope == "answer":
            return CalibrationReport(id=None, prompts=0, valid=True, warnings=found)
        if calibration is None:
            warnings = ["no calibration: multipliers are used as given, no level is promised"]
            return CalibrationReport(id=None, prompts=0, valid=False, warnings=warnings + found)
        warnings = found + calibration.warnings_for(
            self.backend.fingerprint, self.rewards.fingerprint, request.sampling
        )
        if plan.prompt.tools is not None:
            warnings.append("tools are not covered: the calibration was sampled without them")
        if plan.prompt.is_raw:
            warnings.append(
                "a prompt without the chat template is not covered: the calibration was sampled "
                "with it"
            )
        return CalibrationReport(
            id=calibration.id,
            prompts=calibration.pilot.n_prompts,
            valid=not warnings,
            warnings=warnings,
        )
