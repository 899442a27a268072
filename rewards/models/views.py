"""Views: what of a sample a reward model reads."""

from __future__ import annotations

import dataclasses
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


def make_view(config: InputConfig, tokenizer: Any, *, prefill: str | None = None) -> View:
    """Return the view of a configuration.

    Parameters
    ----------
    config : InputConfig
    tokenizer : transformers tokenizer
        Holds the chat template.
    prefill : str or None
        Of a chat: the template's generation prompt and this text follow the answer, so that the
        next token is the model's own. None for models that are no generators.

    Raises
    ------
    ValueError
        When a chat is wanted and the tokenizer has no chat template, or one that does not write
        the answer.
    """
    if isinstance(config, ChatInput):
        if not tokenizer.chat_template:
            raise ValueError("it has no chat template; use the view pair or text for its input")
        return ChatView(tokenizer, config, prefill)
    if isinstance(config, PairInput):
        return PairView(config.a, config.b, strips=config.strip)
    return TextView(config.text, strips=config.strip)


class TextView(View):
    """One text, from a template."""

    def __init__(self, text: str, *, strips: bool) -> None:
        self._text = parse(text)
        self._strips = strips

    @override
    def render(self, sample: Sample) -> Rendered:
        return Rendered(*self._text.render(_stripped(sample) if self._strips else sample))


class PairView(View):
    """Two texts, from two templates; the answer is in the second."""

    def __init__(self, first: str, second: str, *, strips: bool) -> None:
        self._first = parse(first)
        self._second = parse(second)
        self._strips = strips

    @override
    def render(self, sample: Sample) -> Rendered:
        shown = _stripped(sample) if self._strips else sample
        return Rendered(*self._second.render(shown), first=self._first.render(shown)[0])


class ChatView(View):
    """The dialogue with the answer, in the chat template of the model's own tokenizer."""

    def __init__(self, tokenizer: Any, config: ChatInput, prefill: str | None) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._prefill = prefill
        # What the template writes behind an answer: an end marker, mostly.
        question = Message(role="user", content="?")
        marked = self._apply([question], _MARK)
        if marked == self._apply([question], f"{_MARK}?"):
            raise ValueError("its chat template does not write the answer; use the view text")
        self._end = marked.rpartition(_MARK)[2]

    @override
    def render(self, sample: Sample) -> Rendered:
        dialogue = [
            message
            for message in sample.messages
            if not (self._config.system == "drop" and message["role"] == "system")
        ]
        text = self._apply(dialogue, sample.answer)
        # Templates may strip the answer. One that changes it more leaves all of it cuttable.
        core = sample.answer.strip()
        end = len(text) - len(self._end) if text.endswith(self._end) else len(text)
        start = end - len(core) if text[:end].endswith(core) else end
        return Rendered(text, start, end)

    def _apply(self, dialogue: Sequence[Message], answer: str) -> str:
        messages = [*dialogue, Message(role="assistant", content=answer)]
        if self._config.question is not None:
            messages.append(Message(role="user", content=self._config.question))
        text = self._tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=self._prefill is not None,
            **self._config.template_options,
        )
        return f"{text}{self._prefill or ''}"


def _stripped(sample: Sample) -> Sample:
    return dataclasses.replace(sample, answer=sample.answer.strip())
