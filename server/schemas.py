"""Wire types: OpenAI's fields plus our `palette`, requests first, then responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from server.backends.base import FinishReason


class _Request(BaseModel):
    """A body from a client: unknown fields are refused, never ignored."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextPart(_Request):
    """A text part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(_Request):
    """One message of a conversation. Tool messages and images are not supported yet."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def text(self) -> str:
        """Return the content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class RepairOptions(_Request):
    """How an infeasible palette is changed into a feasible one."""

    method: Literal["interpolate", "greedy", "nearest"] = "interpolate"
    priorities: list[str] | None = Field(
        default=None, description="For `greedy`: value names, the most important first."
    )


class PaletteOptions(_Request):
    """The level wanted for each human value, and what to do when it cannot be had."""

    targets: dict[str, Any] = Field(
        default_factory=dict,
        description=(
            'Value name -> target: `{"quantile": 0.8}` (with `"of": "traffic"` for the pooled '
            'quantile), `{"gain": 0.5}`, `{"at_least": x}`, `{"at_most": x}`, '
            '`{"between": [x, y]}`, `"keep"`, `{"multiplier": x}`.'
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
    on_infeasible: Literal["reject", "repair", "best_effort"] = "reject"
    repair: RepairOptions = Field(default_factory=RepairOptions)
    max_kl: float | None = Field(
        default=None, gt=0, description="Largest KL from the base model's own choice, in nats."
    )
    floors: dict[str, float] = Field(
        default_factory=dict, description="Value name -> lowest reward a served answer may have."
    )
    on_floor: Literal["refuse", "best"] = Field(
        default="refuse",
        description="When no candidate clears the floors: refuse (`content_filter`) or serve the "
        "one that misses them least.",
    )
    report: Literal["none", "summary", "full"] = "summary"


class StreamOptions(_Request):
    """OpenAI's stream options."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


def _neutral_only(value: float | None) -> float | None:
    if value:
        msg = "is not supported by this backend; leave it out or send 0"
        raise ValueError(msg)
    return value


class ResponseFormat(_Request):
    """Only plain text for now."""

    type: Literal["text"]


class ChatCompletionRequest(_Request):
    """OpenAI's chat request with one field added, `palette`."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    palette: PaletteOptions | None = Field(
        default=None, description="Absent means the operator's default, null means none."
    )
    n: int | None = Field(default=None, ge=1, le=128)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, description="Not OpenAI's; 0 keeps all tokens.")
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    seed: int | None = None
    # Accepted because clients send them; they change nothing here and OpenAI promises no effect.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    # Accepted at their neutral value only.
    presence_penalty: Annotated[float | None, AfterValidator(_neutral_only)] = None
    frequency_penalty: Annotated[float | None, AfterValidator(_neutral_only)] = None
    response_format: ResponseFormat | None = None


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
    text: str
    rewards: dict[str, float]
    weight: float
    chosen: bool
    finish_reason: FinishReason


class PaletteReport(BaseModel):
    """What was promised, what is expected, what was delivered."""

    status: Literal["met", "repaired", "best_effort"]
    scope: Literal["traffic", "answer"]
    targets: dict[str, float | tuple[float, float]] = Field(
        description="Levels in reward units that the served distribution meets."
    )
    multipliers: dict[str, float]
    expected: dict[str, Level]
    realised: dict[str, float] = Field(description="Mean reward of the answers in `choices`.")
    limited_by: Literal["max_kl"] | None = Field(
        default=None,
        description="What keeps `targets` short of the palette: its KL budget, or nothing.",
    )
    candidates: int
    ess: float = Field(description="Effective number of candidates of this request.")
    kl: float = Field(description="KL of this request's choice from a uniform one, in nats.")
    calibration: CalibrationReport
    timing_ms: TimingReport
    repair: dict[str, Any] | None = None
    candidates_detail: list[CandidateReport] | None = None


class TopLogprobEntry(BaseModel):
    """An alternative token."""

    token: str
    logprob: float
    bytes: list[int] | None


class LogprobEntry(TopLogprobEntry):
    """A token of the answer."""

    top_logprobs: list[TopLogprobEntry]


class ChoiceLogprobs(BaseModel):
    """OpenAI's log-probabilities of a choice."""

    content: list[LogprobEntry]
    refusal: None = None


class AssistantMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: str | None = None


class Choice(BaseModel):
    """One served answer."""

    index: int
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | Literal["content_filter"]


class CompletionTokensDetails(BaseModel):
    """Where completion tokens went."""

    rejected_prediction_tokens: int
    accepted_prediction_tokens: int = 0
    reasoning_tokens: int = 0
    audio_tokens: int = 0


class Usage(BaseModel):
    """Tokens spent: `completion_tokens` counts every candidate's."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionTokensDetails


class ChatCompletion(BaseModel):
    """OpenAI's chat completion with one field added, `palette`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    palette: PaletteReport | None = None


class SolveRequest(_Request):
    """Body of ``POST /v1/palette/solve``."""

    palette: PaletteOptions


class ScoreRequest(_Request):
    """Body of ``POST /v1/palette/score``."""

    messages: list[ChatMessage] = Field(min_length=1)
    answers: list[str] = Field(min_length=1, max_length=1024)
