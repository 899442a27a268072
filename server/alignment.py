"""One request: generate, score, solve, choose. No HTTP in here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from rewards import Asked, Message, RewardSuite
from server.admission import Admission
from server.aligning import translated
from server.backends.base import (
    Backend,
    Candidate,
    Prompt,
    SamplingSettings,
    Tools,
    UpstreamError,
)
from server.calibration import Calibration, system_of
from server.choosing import Group, choose, promise_for
from server.deadline import wait_for
from server.drawing import Draw
from server.layers import Layers
from server.leaving_out import dispensable, left_out, promise_without, without
from server.promise import Promise, Promiser
from server.reporting import (
    Outcome,
    calibration_report,
    judging_report,
    measures_of,
    palette_report,
    timing_report,
)
from server.schemas import (
    CalibrationReport,
    PaletteOptions,
    PaletteReport,
    ProfileReport,
    TimingReport,
)
from server.scoring import sample_of
from server.shelf import Shelf


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
    prompt_index : int
        Which of the answer object's prompts this is.
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
    prompt_index: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """A request that has been checked: whatever can be refused without generating has been.

    Attributes
    ----------
    request : AlignmentRequest
        Its palette is the one that holds, with nothing left to look up.
    promise : Promise or None
        None without a palette, and with scope ``answer`` until the candidates are there.
    calibration : Calibration or None
        The one the promise was solved on, should a new one arrive meanwhile.
    profile : ProfileReport or None
        The one that the palette lies on.
    """

    request: AlignmentRequest
    prompt: Prompt
    n_candidates: int
    promise: Promise | None
    calibration: Calibration | None
    started: float
    profile: ProfileReport | None = None

    def group(self, rewards: np.ndarray, *, is_lost: bool) -> Group:
        """Return the scored candidates of this request, to choose among."""
        request = self.request
        return Group(
            rewards, self.n_candidates, is_lost, request.n_choices, request.seed, self.calibration
        )


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
        Of those; None without a palette. NaN where a value the palette can do without has none.
    picks : ndarray of int
        Positions in `candidates` of those served, in order; empty without a palette.
    n_candidates, n_served : int
    prompt_tokens, spent_tokens, served_tokens : int
        Of the prompt, of all candidates, and of those served.
    timing : TimingReport
    report : PaletteReport or None
        None without a palette.
    group : Group or None
        The rewards with all else that the choice depends on.
    found : tuple of str
        What is known against the promise kept.
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
    group: Group | None = None
    found: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Choice:
    """What was chosen under which promise; empty without a palette."""

    promise: Promise | None = None
    group: Group | None = None
    found: tuple[str, ...] = ()
    picks: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.intp))


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
        options = plan.request.palette
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
            return self._served(plan, drawn.finished, candidates, _Choice(), timing, None)

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
        choice = _Choice(promise, group, tuple(warnings), picks)
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
        """Return the answer, once the observers know of it; without a promise, all are it."""
        chosen = [candidates[i] for i in choice.picks] if choice.promise else candidates
        spent = sum(candidate.n_tokens for candidate in finished)
        # Where only the upstream can count the prompt's tokens, the candidates have them.
        n_prompt_tokens = len(plan.prompt.token_ids) or max(
            (candidate.n_prompt_tokens or 0 for candidate in finished), default=0
        )
        group = choice.group
        served = Served(
            model=self.backend.model_id,
            plan=plan,
            promise=choice.promise,
            candidates=tuple(candidates),
            rewards=None if group is None else group.rewards,
            picks=choice.picks,
            n_candidates=len(finished),
            n_served=len(chosen),
            prompt_tokens=n_prompt_tokens,
            spent_tokens=spent,
            served_tokens=sum(candidate.n_tokens for candidate in chosen),
            timing=timing,
            report=report,
            group=group,
            found=choice.found,
        )
        for observe in self.observers:
            observe(served)
        options = plan.request.palette
        is_told = options is not None and options.report != "none"
        return Aligned(
            plan.prompt, tuple(chosen), n_prompt_tokens, spent, report if is_told else None
        )

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
