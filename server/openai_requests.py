"""Wire types of requests: OpenAI's, with `palette` added."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator
from pydantic_core.core_schema import ValidationInfo

from server.messages import (
    ChatMessage,
    Name,
    NamedToolChoice,
    Request,
    ResponseFormat,
    Several,
    TextPart,
    Tool,
    refuse,
)
from server.schemas import PaletteOptions


class StreamOptions(Request):
    """OpenAI's stream options; obfuscation of chunk sizes is not offered."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class Prediction(Request):
    """OpenAI's predicted output: it saves time there and changes no answer."""

    type: Literal["content"]
    content: str | Several[TextPart]


def _only(remedy: str, *neutral: object) -> BeforeValidator:
    """Return a validator that takes null and neutral values and refuses the rest."""

    def check(value: object) -> object:
        if value is not None and value not in neutral:
            raise refuse(remedy)
        return value

    return BeforeValidator(check)


def _no_bias_beyond_bounds(bias: dict[int, float] | None) -> dict[int, float] | None:
    if bias and (min(bias) < 0 or max(map(abs, bias.values())) > 100):
        raise refuse("token ids are not negative, and biases go from -100 to 100")
    return bias


# Each is an answer to wait for; a longer list is better cut by who sends it.
_MOST_PROMPTS = 256
_Stop = Annotated[str, Field(min_length=1)]


class SamplingRequest(Request):
    """What chat and text completions share."""

    model: Name
    palette: PaletteOptions | None = Field(
        default=None, description="Absent means the operator's default, null means none."
    )
    n: int | None = Field(default=None, ge=1, le=128)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    stop: _Stop | Annotated[Several[_Stop], Field(max_length=16)] | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: Annotated[dict[int, float] | None, AfterValidator(_no_bias_beyond_bounds)] = None
    seed: int | None = None
    user: str | None = Field(default=None, description="Changes nothing here.")
    # Not OpenAI's; clients of vLLM send them.
    top_k: int | None = Field(default=None, ge=-1, description="0 and -1 keep all tokens.")
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)

    @field_validator("stream_options")
    @classmethod
    def _check_stream_options(
        cls, options: StreamOptions | None, info: ValidationInfo
    ) -> StreamOptions | None:
        if options is not None and not info.data.get("stream"):
            raise refuse("for stream: true only")
        return options


class ChatCompletionRequest(SamplingRequest):
    """OpenAI's chat request with one field added, `palette`.

    What cannot change an answer is accepted; what would have to and cannot is refused.
    """

    messages: Several[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Several[Tool] | None = Field(default=None, min_length=1, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    # Neutral values only.
    modalities: Annotated[
        list[Literal["text"]] | None, _only("this server writes text only", [], ["text"])
    ] = None
    service_tier: Annotated[
        Literal["auto", "default"] | None,
        _only("there is one way to be served here: `default`", "auto", "default"),
    ] = None
    store: Annotated[
        Literal[False] | None, _only("nothing is stored here; keep the answer yourself", False)
    ] = None
    verbosity: Annotated[
        Literal["medium"] | None,
        _only("not adjustable; ask a palette for it, such as words: {at_most: 40}", "medium"),
    ] = None
    # Hints and labels: no answer depends on them.
    metadata: dict[str, str] | None = None
    prediction: Prediction | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    safety_identifier: str | None = None
    # Refused, each with what to do instead.
    audio: Annotated[None, _only("this server writes text only; leave it out")] = None
    function_call: Annotated[None, _only("use `tool_choice`, which replaces it")] = None
    functions: Annotated[None, _only("use `tools`, which replace them")] = None
    moderation: Annotated[
        None, _only("not offered; a palette with floors keeps answers from being served")
    ] = None
    reasoning_effort: Annotated[
        None, _only("not adjustable here; leave it out, and bound max_completion_tokens")
    ] = None
    web_search_options: Annotated[
        None, _only("this server searches nothing; give it a tool that does")
    ] = None

    @field_validator("max_completion_tokens")
    @classmethod
    def _check_one_limit(cls, limit: int | None, info: ValidationInfo) -> int | None:
        if limit is not None and info.data.get("max_tokens") is not None:
            raise refuse("max_tokens is the old name of max_completion_tokens: send one of them")
        return limit

    @field_validator("top_logprobs")
    @classmethod
    def _check_top_logprobs(cls, top: int | None, info: ValidationInfo) -> int | None:
        if top is not None and not info.data.get("logprobs"):
            raise refuse("needs logprobs: true")
        return top

    @field_validator("tool_choice", "parallel_tool_calls")
    @classmethod
    def _check_there_are_tools(cls, value: Any, info: ValidationInfo) -> Any:
        tools = info.data.get("tools") or []
        if value not in (None, "none") and not tools:
            raise refuse("needs tools")
        if isinstance(value, NamedToolChoice):
            wanted, names = value.function.name, [tool.function.name for tool in tools]
            if wanted in ("auto", "none", "required"):
                raise refuse(
                    f"a function named {wanted} cannot be told from that choice: rename it"
                )
            if wanted not in names:
                raise refuse(f"{wanted} is not among the tools: {', '.join(names)}")
        return value


class CompletionRequest(SamplingRequest):
    """OpenAI's text completion request with one field added, `palette`."""

    prompt: (
        str
        | Annotated[Several[str], Field(min_length=1, max_length=_MOST_PROMPTS)]
        | Annotated[Several[int], Field(min_length=1)]
        | Annotated[Several[Several[int]], Field(min_length=1, max_length=_MOST_PROMPTS)]
    )
    logprobs: int | None = Field(default=None, ge=0, le=20, strict=True)
    echo: bool | None = False
    best_of: int | None = None
    suffix: Annotated[
        None, _only("this server does not fill in; put all of the context in `prompt`")
    ] = None

    @field_validator("best_of")
    @classmethod
    def _check_best_of(cls, best_of: int | None, info: ValidationInfo) -> int | None:
        if best_of is not None and best_of != (info.data.get("n") or 1):
            msg = (
                "must equal n: choosing among candidates is what a palette does; send "
                '"palette": {"candidates": ...} with the values you want'
            )
            raise refuse(msg)
        return best_of

    @field_validator("echo")
    @classmethod
    def _check_echo(cls, echo: bool | None, info: ValidationInfo) -> bool | None:
        if echo and info.data.get("logprobs") is not None:
            raise refuse("log-probabilities of the prompt are not available: echo without logprobs")
        return echo
