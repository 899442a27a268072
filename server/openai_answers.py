"""Wire types of answers: OpenAI's, with `palette` added."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, SerializerFunctionWrapHandler, model_serializer

from server.backends.base import FinishReason
from server.schemas import PaletteReport


class _Answer(BaseModel):
    """Fields that OpenAI leaves out where there is nothing in them are left out here too."""

    optional: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _leave_out(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = handler(self)
        for name in self.optional:
            if dumped.get(name, ...) is None:
                del dumped[name]
        return dumped


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


class FunctionCall(BaseModel):
    """Name and arguments (JSON text as the model wrote it) of a call."""

    name: str
    arguments: str


class ToolCallEntry(BaseModel):
    """A call that the client is asked to make."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(_Answer):
    """The answer."""

    optional = ("tool_calls", "reasoning_content")

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: str | None = None
    tool_calls: list[ToolCallEntry] | None = None
    reasoning_content: str | None = None


class Choice(BaseModel):
    """One served answer."""

    index: int
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | Literal["content_filter"]


class CompletionTokensDetails(_Answer):
    """Where completion tokens went."""

    optional = ("reasoning_tokens",)

    rejected_prediction_tokens: int
    accepted_prediction_tokens: int = 0
    reasoning_tokens: int | None = None
    audio_tokens: int = 0


class Usage(BaseModel):
    """Tokens spent: `completion_tokens` counts every candidate's."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionTokensDetails


class ChatCompletion(_Answer):
    """OpenAI's chat completion with one field added, `palette`."""

    optional = ("palette", "service_tier")

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    service_tier: Literal["default"] | None = None
    choices: list[Choice]
    usage: Usage
    palette: PaletteReport | None = None


class TextLogprobs(BaseModel):
    """OpenAI's older form of log-probabilities: one list a field."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(BaseModel):
    """One served continuation; `finish_reason` is null in all but the last chunk of a stream."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | Literal["content_filter"] | None


class Completion(_Answer):
    """OpenAI's text completion; also its stream chunks. With several prompts, a report for each."""

    optional = ("palette", "usage")

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage | None = None
    palette: PaletteReport | list[PaletteReport] | None = None
