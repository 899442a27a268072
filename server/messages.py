"""Wire types of a conversation: messages, tools, response formats. Text only."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError
from pydantic_core.core_schema import ValidationInfo

from rewards import Message

T = TypeVar("T")

# A list whose check ends at the first wrong item: a million of them would take half a minute.
Several = Annotated[list[T], Field(fail_fast=True)]

# Longer than any name in use; messages quote it, and look for one that is like it.
Name = Annotated[str, StringConstraints(max_length=256)]


class Request(BaseModel):
    """A body from a client: unknown fields are refused, never ignored."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def refuse(message: str) -> PydanticCustomError:
    """Return the error that makes a validator refuse a field with this sentence."""
    return PydanticCustomError("refused", "{reason}", {"reason": message})


class TextPart(Request):
    """A text part of a message's content."""

    type: Literal["text"]
    text: str
    # A hint where to cut a cache; it changes no answer.
    prompt_cache_breakpoint: dict[str, Any] | None = None


class RefusalPart(Request):
    """What an assistant said when it refused."""

    type: Literal["refusal"]
    refusal: str


ContentPart = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


def _text_only(content: object) -> object:
    """Refuse parts that no text model reads; said here, the message can name the remedy."""
    if isinstance(content, list):
        for index, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in ("image_url", "input_audio", "file"):
                msg = f"part {index} is {kind}: this server reads text only; send text parts"
                raise refuse(msg)
    return content


class CalledFunction(Request):
    """Name and arguments of a call; `arguments` is JSON text as the model wrote it."""

    name: str
    arguments: str
    # The official client's reading of the arguments, which it sends along.
    parsed_arguments: Any = None


class ToolCallPart(Request):
    """A call that the assistant made earlier in the conversation."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Request):
    """One message of a conversation; an answer of this server can be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | Several[ContentPart] | None, BeforeValidator(_text_only)] = Field(
        default=None, validate_default=True
    )
    name: str | None = Field(
        default=None, description="Handed to the chat template, which may or may not write it."
    )
    refusal: str | None = None
    reasoning_content: str | None = Field(
        default=None, description="Not OpenAI's: what a reasoning model thought before."
    )
    tool_calls: Several[ToolCallPart] | None = None
    tool_call_id: str | None = Field(default=None, validate_default=True)
    # The official client's reading of the content, and fields that have nothing in them here.
    parsed: Any = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None

    @field_validator("content")
    @classmethod
    def _check_content(
        cls, content: str | list[ContentPart] | None, info: ValidationInfo
    ) -> str | list[ContentPart] | None:
        role = info.data.get("role")
        if content is None and role not in ("assistant", None):
            raise PydanticKnownError("missing")
        if role != "assistant" and isinstance(content, list):
            for part in content:
                if isinstance(part, RefusalPart):
                    raise refuse("only an assistant's message has refusal parts; send text parts")
        return content

    @field_validator("refusal", "reasoning_content", "tool_calls")
    @classmethod
    def _check_assistant(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("role") != "assistant":
            raise refuse("belongs to assistant messages only")
        return value

    @field_validator("tool_call_id")
    @classmethod
    def _check_tool_call_id(cls, call: str | None, info: ValidationInfo) -> str | None:
        role = info.data.get("role")
        if call is None and role == "tool":
            raise PydanticKnownError("missing")
        if call is not None and role != "tool":
            raise refuse("belongs to tool messages only")
        return call

    @model_validator(mode="after")
    def _check_something_is_said(self) -> ChatMessage:
        if self.content is None and self.refusal is None and not self.tool_calls:
            raise refuse("an assistant message needs content, refusal or tool_calls")
        return self

    def text(self) -> str:
        """Return the content as one string; a refusal is what was said instead of an answer."""
        if self.content is None:
            return self.refusal or ""
        if isinstance(self.content, str):
            return self.content
        return "".join(
            part.text if isinstance(part, TextPart) else part.refusal for part in self.content
        )

    def message(self) -> Message:
        """Return what chat templates know."""
        # `developer` is OpenAI's newer word for `system`.
        role = "system" if self.role == "developer" else self.role
        message = Message(role=role, content=self.text())
        if self.name is not None:
            message["name"] = self.name
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": call.type,
                    "function": {
                        "name": call.function.name,
                        "arguments": call.function.arguments,
                    },
                }
                for call in self.tool_calls
            ]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class FunctionDefinition(Request):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Request):
    """OpenAI's tool object; functions are the only kind."""

    type: Literal["function"]
    function: FunctionDefinition


class ChosenFunction(Request):
    """Name of a function."""

    name: str


class NamedToolChoice(Request):
    """The one function to call."""

    type: Literal["function"]
    function: ChosenFunction


class TextFormat(Request):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Request):
    """Any JSON object."""

    type: Literal["json_object"]
    value: dict[str, Any] | None = Field(
        default=None, description="A schema, as Hugging Face's client sends it; not OpenAI's."
    )


class JsonSchema(Request):
    """A named schema. `strict` changes nothing: every candidate is held to the schema."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Request):
    """JSON that conforms to a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]
