"""Wire types of the palette: what clients ask for, what they are told."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from server.backends.base import FinishReason
from server.messages import ChatMessage, Name, Several
from server.messages import Request as _Request


class RepairOptions(_Request):
    """How an infeasible palette is changed into a feasible one."""

    method: Literal["interpolate", "greedy", "nearest"] = "interpolate"
    priorities: Several[Name] | None = Field(
        default=None, description="For `greedy`: value names, the most important first."
    )


class PaletteOptions(_Request):
    """The level wanted for each human value, and what to do when it cannot be had."""

    targets: dict[Name, Any] = Field(
        default_factory=dict,
        description=(
            'Value name -> target: `{"quantile": 0.8}` (with `"of": "traffic"` for the pooled '
            'quantile), `{"gain": 0.5}`, `{"at_least": x}`, `{"at_most": x}`, '
            '`{"between": [x, y]}`, `"keep"`, `{"multiplier": x}`. With `"optional": true` (for '
            '"keep": `{"keep": true, "optional": true}`) a target is left out, and the answer '
            "served, when its value cannot be scored."
        ),
        examples=[{"harmless": {"quantile": 0.8}, "helpful": "keep", "words": {"at_most": 40}}],
    )
    candidates: int | Literal["auto"] | None = Field(
        default=None, description="N; `auto` takes the smallest N that reaches the palette."
    )
    scope: Literal["traffic", "answer"] = Field(
        default="traffic",
        description="`traffic`: targets hold on average over prompts (needs a calibration); "
        "`answer`: on this prompt's own candidates.",
    )
    calibration: Name | None = Field(
        default=None,
        description="Name or id of the calibration to solve on; by default the one that covers "
        "the request's sampling settings and system prompt.",
    )
    on_infeasible: Literal["reject", "repair", "best_effort"] = "reject"
    repair: RepairOptions = Field(default_factory=RepairOptions)
    max_kl: float | None = Field(
        default=None, gt=0, description="Largest KL from the base model's own choice, in nats."
    )
    floors: dict[Name, float] = Field(
        default_factory=dict, description="Value name -> lowest reward a served answer may have."
    )
    on_floor: Literal["refuse", "best"] = Field(
        default="refuse",
        description="When no candidate clears the floors: refuse (`content_filter`) or serve the "
        "one that misses them least.",
    )
    deadline_ms: float | None = Field(
        default=None,
        gt=0,
        description="Milliseconds from the request's arrival after which the choice is made among "
        "the candidates that are finished and scored; the first that comes when none is.",
    )
    report: Literal["none", "summary", "full"] = "summary"
    profile: Name | None = Field(
        default=None,
        description="A stored palette, which this one lies over: targets value by value, of two "
        "floors the higher, any other field where it is given.",
    )


class Level(BaseModel):
    """An expected level with its standard error, in reward units."""

    level: float
    stderr: float | None = None


class CalibrationReport(BaseModel):
    """Which calibration stands behind the promise, and whether it covers this request."""

    id: str | None
    prompts: int
    valid: bool
    warnings: list[str]
    version: int = Field(default=0, description="Counts what live traffic made of the calibration.")
    updated: datetime | None = Field(default=None, description="When this version was made.")
    live_prompts: int = Field(default=0, description="Those of `prompts` that are live traffic.")


class TimingReport(BaseModel):
    """Milliseconds per stage; scoring overlaps generation, `score` is what came after it."""

    queue: float
    solve: float
    generate: float
    score: float
    total: float


class CandidateReport(BaseModel):
    """One candidate, with `"report": "full"`."""

    index: int
    text: str = Field(description="What the rewards read: the answer with its tool calls.")
    rewards: dict[str, float]
    weight: float
    chosen: bool
    finish_reason: FinishReason


class DeadlineReport(BaseModel):
    """What came of a deadline: which of the candidates wanted were there in time."""

    ms: float
    asked: int = Field(description="Candidates that would have been chosen among without it.")
    used: int = Field(description="Candidates finished and scored when the choice was made.")
    met: bool = Field(description="False when there was nothing to serve yet at the deadline.")


class ProfileReport(BaseModel):
    """The stored palette that a palette lies on."""

    name: str
    version: int


class Measured(BaseModel):
    """A reward of one request's candidates in its own unit."""

    realised: float | None = Field(description="Mean of the answers chosen; null: none was.")
    weighted: float = Field(description="Mean over the candidates with the choice's weights.")
    candidates: float = Field(description="Plain mean over the candidates: the base model's.")


class Watched(BaseModel):
    """A value that is optimised and the held-out reward of the same thing, which is not."""

    value: Measured
    watch: Measured


class ChoiceReport(BaseModel):
    """What was promised, and what the choice among the candidates gives."""

    status: Literal["met", "repaired", "best_effort"]
    scope: Literal["traffic", "answer"]
    profile: ProfileReport | None = None
    targets: dict[str, float | tuple[float, float]] = Field(
        description="Levels in reward units that the served distribution meets."
    )
    multipliers: dict[str, float]
    expected: dict[str, Level]
    realised: dict[str, float] = Field(description="Mean reward of the answers chosen.")
    limited_by: Literal["max_kl"] | None = Field(
        default=None,
        description="What keeps `targets` short of the palette: its KL budget, or nothing.",
    )
    candidates: int
    ess: float = Field(description="Effective number of candidates of this request.")
    kl: float = Field(description="KL of this request's choice from a uniform one, in nats.")
    calibration: CalibrationReport
    repair: dict[str, Any] | None = None
    left_out: dict[str, str] | None = Field(
        default=None,
        description="Values that could not be scored, and why: those without a target or floor, "
        "and optional targets, which the promise then does without.",
    )


class JudgingReport(BaseModel):
    """What the chat model was asked about the candidates; no part of `usage`."""

    questions: int = Field(description="Put for this request; what was known already was not.")
    prompt_tokens: int | None = Field(
        description="Of all these questions, each with the conversation and the answer before it, "
        "most of which the model has read already; null where an upstream does not tell."
    )


class PaletteReport(ChoiceReport):
    """What was promised, what is expected, what was delivered."""

    timing_ms: TimingReport
    deadline: DeadlineReport | None = None
    judging: JudgingReport | None = Field(
        default=None, description="Where values are judged by the chat model."
    )
    measured: dict[str, Measured] | None = Field(
        default=None,
        description="Values that are transformed before they are aligned, as they are measured; "
        "`targets`, `expected` and `realised` are in the unit that is aligned.",
    )
    watched: dict[str, Watched] | None = Field(
        default=None,
        description="Values with a held-out scorer: when it falls while the value rises, the "
        "reward is being gamed.",
    )
    candidates_detail: list[CandidateReport] | None = None


class ReplayedCandidate(BaseModel):
    """One candidate of an earlier answer."""

    index: int
    rewards: dict[str, float]
    weight: float
    chosen: bool = Field(description="By the palette of the replay.")
    served: bool = Field(description="By the palette of the answer.")
    text: str | None = Field(description="Null unless the operator keeps texts.")


class ReplayReport(ChoiceReport):
    """What another palette would have chosen from the candidates of an earlier answer."""

    id: str
    index: int
    model: str
    chosen: list[int] = Field(description="Indices of candidates, in order of choice.")
    served: list[int] = Field(description="Indices of those that the answer had.")
    candidates_detail: list[ReplayedCandidate]
    solve_ms: float


class ReplayRequest(_Request):
    """Body of ``POST /v1/palette/replay``."""

    id: Name = Field(description="Of a chat or text completion.")
    index: int = Field(
        default=0, ge=0, description="Which prompt of a text completion that had several."
    )
    palette: PaletteOptions


class ProfileRequest(_Request):
    """Body of ``PUT /v1/palette/profiles/{name}``."""

    palette: PaletteOptions
    description: str = Field(default="", max_length=1000)
    expected_version: int | None = Field(
        default=None,
        ge=0,
        description="Write only if this is the newest version; 0: only if there is none.",
    )


class ProfileAnswer(BaseModel):
    """One version of a stored palette."""

    object: Literal["palette.profile"] = "palette.profile"
    name: str
    version: int
    palette: dict[str, Any] | None = Field(description="As it was written; null: deleted.")
    description: str
    created: str
    deleted: bool


class ProfileList(BaseModel):
    """Stored palettes, or the versions of one."""

    object: Literal["list"] = "list"
    data: list[ProfileAnswer]


class Conditions(_Request):
    """What is asked about; as with a chat, this decides which calibration answers."""

    model: str | None = Field(
        default=None, description="Whose calibration: a name of `/v1/models`; by default the first."
    )
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, description="0 and -1 keep all tokens.")
    max_tokens: int | None = Field(default=None, ge=1)
    system: str | None = Field(default=None, description="System prompt of the conversations.")


class NamedConditions(Conditions):
    """The same where there is no palette to name a calibration."""

    calibration: Name | None = Field(
        default=None,
        description="Name or id of the calibration; by default the one that covers the rest.",
    )


class SolveRequest(Conditions):
    """Body of ``POST /v1/palette/solve``."""

    palette: PaletteOptions


class ScoreRequest(_Request):
    """Body of ``POST /v1/palette/score``."""

    messages: Several[ChatMessage] = Field(min_length=1)
    answers: Several[str] = Field(min_length=1, max_length=1024)


class FrontierRequest(Conditions):
    """Body of ``POST /v1/palette/frontier``."""

    values: tuple[str, str] = Field(description="The two values to trade for each other.")
    palette: PaletteOptions = Field(
        default_factory=PaletteOptions,
        description="Targets and floors of the other values, `candidates` and `max_kl`.",
    )
    points: int = Field(default=11, ge=2, le=201)
    senses: dict[Name, Literal["more", "less"]] = Field(
        default_factory=dict, description='`{"words": "less"}` for a value that is wanted low.'
    )


class SpreadRequest(NamedConditions):
    """Body of ``POST /v1/palette/spread``."""

    palettes: int = Field(default=6, ge=1, le=64, description="How many.")
    values: Several[Name] | None = Field(
        default=None, min_length=1, description="Values to raise or keep; all by default."
    )
    candidates: int | None = Field(default=None, ge=1)
    max_kl: float | None = Field(
        default=1.0, gt=0, description="KL of each palette, in nats; null for the limits."
    )


class PartyRequest(_Request):
    """One party of a negotiation."""

    name: str = Field(min_length=1, max_length=200)
    targets: dict[Name, Any]
    floors: dict[Name, float] = Field(default_factory=dict)
    weight: float = Field(default=1.0, gt=0)


class NegotiateRequest(NamedConditions):
    """Body of ``POST /v1/palette/negotiate``."""

    parties: Several[PartyRequest] = Field(min_length=1, max_length=64)
    candidates: int | None = Field(default=None, ge=1)
    max_kl: float | None = Field(default=None, gt=0)
