"""What of a sample a model reads: the section ``input``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, JsonValue, field_validator

from rewards.config.section import Section
from rewards.templates import parse


class _Templates(Section):
    """Text made from templates."""

    LATER: ClassVar[frozenset[str]] = frozenset({"strip"})

    strip: bool = Field(False, description="Take white space off both ends of the answer.")


class TextInput(_Templates):
    """One text."""

    view: Literal["text"]
    text: str = Field("{answer}", description="Template; must hold {answer}.")

    @field_validator("text")
    @classmethod
    def _has_answer(cls, text: str) -> str:
        if parse(text).fields.count("answer") != 1:
            raise ValueError("the text must hold {answer} once, for the answer is what is scored")
        return text


class PairInput(_Templates):
    """Two texts, joined by the tokenizer's own pair encoding."""

    view: Literal["pair"]
    a: str = Field("{prompt}", description="Template of the first text; shortened first.")
    b: str = Field("{answer}", description="Template of the second text; must hold {answer}.")

    @field_validator("a", "b")
    @classmethod
    def _has_answer(cls, text: str, info: object) -> str:
        wanted = 1 if getattr(info, "field_name", "") == "b" else 0
        if parse(text).fields.count("answer") != wanted:
            raise ValueError("of a pair, b must hold {answer} once and a must not hold it")
        return text


class ChatInput(Section):
    """The whole dialogue with the answer, in the reward model's own chat template."""

    LATER: ClassVar[frozenset[str]] = frozenset({"question", "template_options"})

    view: Literal["chat"]
    system: Literal["keep", "drop"] = Field(
        "keep", description="drop: for models that were trained without system messages."
    )
    question: str | None = Field(
        None,
        min_length=1,
        description="A last user message behind the answer: what is asked about it, or the "
        "principle that it is held against.",
    )
    template_options: dict[str, JsonValue] = Field(
        {}, description="Further arguments of the chat template, such as guardian_config."
    )


InputConfig = Annotated[TextInput | PairInput | ChatInput, Field(discriminator="view")]
