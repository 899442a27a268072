"""Views: what of a sample a reward model reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from rewards.base import Message, Rendered, Sample
from rewards.config import ChatInput, InputConfig, PairInput
from rewards.templates import parse

_MARK = "MARK-OF-THE-ANSWER"


class View(ABC):
    """Turns a sample into what a model reads."""

    @abstractmethod
    def render(self, sample: Sample) -> Rendered:
        """Return the text or pair of this sample."""


def make_view(config: InputConfig, tokenizer: Any) -> View:
    """Return the view of a configuration.

    Raises
    ------
    ValueError
        When a chat is wanted and the tokenizer has no chat template.
    """
    if isinstance(config, ChatInput):
        if not tokenizer.chat_template:
            raise ValueError("it has no chat template; use the view pair or text for its input")
        return ChatView(tokenizer, drops_system=config.system == "drop")
    if isinstance(config, PairInput):
        return PairView(config.a, config.b)
    return TextView(config.text)


class TextView(View):
    """One text, from a template."""

    def __init__(self, text: str) -> None:
        self._text = parse(text)

    @override
    def render(self, sample: Sample) -> Rendered:
        return Rendered(*self._text.render(sample))


class PairView(View):
    """Two texts, from two templates; the answer is in the second."""

    def __init__(self, first: str, second: str) -> None:
        self._first = parse(first)
        self._second = parse(second)

    @override
    def render(self, sample: Sample) -> Rendered:
        return Rendered(*self._second.render(sample), first=self._first.render(sample)[0])


class ChatView(View):
    """The dialogue with the answer, in the chat template of the model's own tokenizer."""

    def __init__(self, tokenizer: Any, *, drops_system: bool) -> None:
        self._tokenizer = tokenizer
        self._drops_system = drops_system
        # What the template writes behind an answer: an end marker, mostly.
        question = Message(role="user", content="?")
        self._end = self._apply([question], _MARK).rpartition(_MARK)[2]

    @override
    def render(self, sample: Sample) -> Rendered:
        dialogue = [
            message
            for message in sample.messages
            if not (self._drops_system and message["role"] == "system")
        ]
        text = self._apply(dialogue, sample.answer)
        # Templates may strip the answer. One that changes it more leaves all of it cuttable.
        core = sample.answer.strip()
        end = len(text) - len(self._end) if text.endswith(self._end) else len(text)
        start = end - len(core) if text[:end].endswith(core) else end
        return Rendered(text, start, end)

    def _apply(self, dialogue: Sequence[Message], answer: str) -> str:
        messages = [*dialogue, Message(role="assistant", content=answer)]
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False))
