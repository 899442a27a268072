"""How a question follows an answer, in tokens of the chat model.

What the model is asked starts with the very tokens that it read and wrote, so that nothing of them
is computed again; behind them stands what its chat template writes between an answer and the next
reply: the end of the turn, the question as the user's message, the beginning of the reply.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewards import Message, Sample

_MARK = "MARK-OF-THE-ANSWER"


class Asker:
    """Prompts that ask a model about answers.

    Parameters
    ----------
    tokenizer : Any
        transformers', with a chat template.
    max_context : int
        Longer prompts lose their beginning: the answer and the question count.
    """

    def __init__(self, tokenizer: Any, max_context: int) -> None:
        self._tokenizer = tokenizer
        self._max_context = max_context
        self._closings: dict[str, list[int]] = {}
        self._word_ids: dict[tuple[tuple[str, ...], ...], list[list[int]]] = {}

    def prompts(self, sample: Sample, questions: Sequence[str]) -> list[list[int]]:
        """Return the token ids that put each question.

        Of a sample without token ids: the whole conversation by the chat template.

        Raises
        ------
        ValueError
            When the chat template refuses it.
        """
        if sample.prompt_ids is not None and sample.answer_ids is not None:
            known = [*sample.prompt_ids, *sample.answer_ids]
            found = [known + self._closing(question) for question in questions]
        else:
            dialogue = [*sample.messages, Message(role="assistant", content=sample.answer)]
            found = [self._ids(self._asked(dialogue, question)) for question in questions]
        return [ids[-(self._max_context - 1) :] for ids in found]

    def word_ids(self, words: Sequence[Sequence[str]]) -> list[list[int]]:
        """Return the ids with which the words of each set begin.

        A word of several tokens counts by its first; one that begins with a token of white space
        says nothing, and is left out.

        Raises
        ------
        ValueError
            When a set has no such token, two sets share one, or no question can follow an answer.
        """
        key = tuple(map(tuple, words))
        if key not in self._word_ids:
            self._closing("?")
            self._word_ids[key] = self._find(key)
        return self._word_ids[key]

    def _find(self, words: Sequence[Sequence[str]]) -> list[list[int]]:
        owners: dict[int, tuple[int, str]] = {}
        for at, group in enumerate(words):
            for word in group:
                first = self._ids(word)[0]
                is_unknown = first == self._tokenizer.unk_token_id
                if is_unknown or not self._tokenizer.decode([first]).strip():
                    continue
                other_group, other = owners.setdefault(first, (at, word))
                if other_group != at:
                    raise ValueError(
                        f"{other!r} and {word!r} begin with the same token of this model, which "
                        "then cannot say one or the other; take other words"
                    )
        found = [
            [one for one, (group, _) in owners.items() if group == at] for at in range(len(words))
        ]
        for group, ids in zip(words, found, strict=True):
            if not ids:
                raise ValueError(
                    f"none of the words {', '.join(map(repr, group))} begins with a token of this "
                    "model that says something; take other words"
                )
        return found

    def _closing(self, question: str) -> list[int]:
        """Return what stands behind an answer's tokens to ask this."""
        if question not in self._closings:
            dialogue = [
                Message(role="user", content="?"),
                Message(role="assistant", content=_MARK),
            ]
            _, mark, closing = self._asked(dialogue, question).rpartition(_MARK)
            if not mark:
                raise ValueError(
                    "the model's chat template does not show earlier replies, so nothing can be "
                    "asked about them"
                )
            self._closings[question] = self._ids(closing)
        return self._closings[question]

    def _asked(self, dialogue: Sequence[Message], question: str) -> str:
        """Return the text of a dialogue that goes on with a question, up to the reply."""
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [*dialogue, Message(role="user", content=question)],
                    add_generation_prompt=True,
                    tokenize=False,
                    # To templates that know it: the reply is to begin with yes or no.
                    enable_thinking=False,
                )
            )
        except Exception as error:  # jinja's own, and the Python that templates fail as
            # Its message may quote the conversation; it is the cause, which is not logged.
            raise ValueError(
                "the model's chat template does not let a question follow the answer "
                f"({type(error).__name__})"
            ) from error

    def _ids(self, text: str) -> list[int]:
        # The template has written the special tokens; `verbose` would warn of long texts.
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [int(token) for token in ids]


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many first tokens all prompts share, at least one of each left out."""
    shortest = min(prompts, key=len)
    for at, token in enumerate(shortest[:-1]):
        if any(ids[at] != token for ids in prompts):
            return at
    return len(shortest) - 1
