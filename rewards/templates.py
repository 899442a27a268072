"""Templates of the rewards file: ``{prompt}`` and the like, turned into what a model reads."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

from rewards.base import Message, Sample

PLACEHOLDERS = {
    "answer": "the answer that is scored",
    "prompt": "the last user message",
    "conversation": "all messages but the answer, as plain text",
    "system": "the system message, or nothing",
    "reasoning": "what a reasoning model thought before the answer, or nothing",
}


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed template.

    Attributes
    ----------
    parts : tuple of (str, str or None)
        Literal text and the placeholder behind it.
    """

    parts: tuple[tuple[str, str | None], ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """Placeholders in order."""
        return tuple(field for _, field in self.parts if field is not None)

    def render(self, sample: Sample) -> tuple[str, int, int]:
        """Return the text, and where the answer starts and ends in it (both 0 without one)."""
        text = ""
        start = end = 0
        for literal, field in self.parts:
            text += literal
            if field == "answer":
                start, end = len(text), len(text) + len(sample.answer)
            if field is not None:
                text += fill(field, sample)
        return text, start, end


def parse(template: str) -> Template:
    """Return the parsed template.

    Raises
    ------
    ValueError
        On an unknown placeholder, or a brace that stands alone.
    """
    parts = []
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{error}; write a literal brace twice: {{{{ or }}}}") from None
    for literal, field, format_spec, conversion in pieces:
        if field is not None and (field not in PLACEHOLDERS or format_spec or conversion):
            close = difflib.get_close_matches(field, PLACEHOLDERS, n=1)
            hint = f"did you mean {{{close[0]}}}? " if close else ""
            known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
            raise ValueError(f"unknown placeholder {{{field}}}; {hint}There are {known}")
        parts.append((literal, field))
    return Template(tuple(parts))


def fill(field: str, sample: Sample) -> str:
    """Return what a placeholder stands for in this sample."""
    if field == "answer":
        return sample.answer
    if field == "prompt":
        return last_of(sample.messages, "user")
    if field == "reasoning":
        return sample.reasoning
    if field == "system":
        return last_of(sample.messages, "system")
    return "\n\n".join(
        f"{message['role'].capitalize()}: {message['content']}" for message in sample.messages
    )


def last_of(messages: Sequence[Message], role: str) -> str:
    """Return the last message of this role, or nothing."""
    for message in reversed(messages):
        if message["role"] == role:
            return message["content"]
    return ""
