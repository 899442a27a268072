"""What an aligned request is at each of its stages: wanted, planned, chosen, served, answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rewards import Message
from server.backends.base import Candidate, Prompt, SamplingSettings, Tools
from server.calibration import Calibration
from server.choosing import Group
from server.promise import Promise
from server.schemas import PaletteOptions, PaletteReport, ProfileReport, TimingReport


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
class Choice:
    """What was chosen under which promise; empty without a palette."""

    promise: Promise | None = None
    group: Group | None = None
    found: tuple[str, ...] = ()
    picks: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.intp))


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

    def answer(self) -> Aligned:
        """Return what the client gets; without a promise, all candidates are chosen."""
        options = self.plan.request.palette
        is_told = options is not None and options.report != "none"
        return Aligned(
            self.plan.prompt,
            chosen_of(self.candidates, self.promise, self.picks),
            self.prompt_tokens,
            self.spent_tokens,
            self.report if is_told else None,
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


def chosen_of(
    candidates: Sequence[Candidate], promise: Promise | None, picks: np.ndarray
) -> tuple[Candidate, ...]:
    """Return the candidates that are served, in order; without a promise, all are."""
    return tuple(candidates if promise is None else [candidates[i] for i in picks])


def served_of(
    model: str,
    plan: Plan,
    finished: Sequence[Candidate],
    candidates: Sequence[Candidate],
    choice: Choice,
    timing: TimingReport,
    report: PaletteReport | None,
) -> Served:
    """Return what is observed of a request whose answers are chosen.

    Parameters
    ----------
    model : str
    plan : Plan
    finished : sequence of Candidate
        All that came to their end.
    candidates : sequence of Candidate
        Those that were chosen among.
    choice : Choice
    timing : TimingReport
    report : PaletteReport or None
    """
    chosen = chosen_of(candidates, choice.promise, choice.picks)
    # Where only the upstream can count the prompt's tokens, the candidates have them.
    n_prompt_tokens = len(plan.prompt.token_ids) or max(
        (candidate.n_prompt_tokens or 0 for candidate in finished), default=0
    )
    return Served(
        model=model,
        plan=plan,
        promise=choice.promise,
        candidates=tuple(candidates),
        rewards=None if choice.group is None else choice.group.rewards,
        picks=choice.picks,
        n_candidates=len(finished),
        n_served=len(chosen),
        prompt_tokens=n_prompt_tokens,
        spent_tokens=sum(candidate.n_tokens for candidate in finished),
        served_tokens=sum(candidate.n_tokens for candidate in chosen),
        timing=timing,
        report=report,
        group=choice.group,
        found=choice.found,
    )
