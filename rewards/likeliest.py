"""Questions about answers, as chat completions of one token with its likeliest alternatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rewards.base import Message, Sample
from rewards.errors import RewardError

# OpenAI's own limit.
N_TOP = 20


class NoLikeliestError(RewardError):
    """A reply tells no likeliest tokens, so that nothing can be read from it."""


def question_fields(sample: Sample, question: str) -> dict[str, Any]:
    """Return the fields of a request that asks about an answer."""
    return {
        "messages": [
            *sample.messages,
            Message(role="assistant", content=sample.answer),
            Message(role="user", content=question),
        ],
        "logprobs": True,
        "top_logprobs": N_TOP,
    }


def answer_of(reply: Any, words: Sequence[Sequence[str]]) -> list[float]:
    """Return the log-probability that the reply begins with a word of each set, in nats.

    A token counts for the words that begin with it, unless they are of two sets. A set that none of
    the tokens told belongs to has the probability of the least likely one: it has no more.

    Raises
    ------
    NoLikeliestError
        When the reply tells no likeliest tokens.
    ValueError
        When no token belongs to any set.
    """
    try:
        entry = reply["choices"][0]["logprobs"]["content"][0]
        top = {str(one["token"]): float(one["logprob"]) for one in entry["top_logprobs"]}
        least = min(top.values())
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise NoLikeliestError(
            "it does not tell the likeliest first tokens (top_logprobs), so its model cannot judge"
        ) from error
    found: list[list[float]] = [[] for _ in words]
    for token, logprob in top.items():
        fitting = [
            at
            for at, group in enumerate(words)
            if token.strip() and any(word.startswith(token) for word in group)
        ]
        if len(fitting) == 1:
            found[fitting[0]].append(logprob)
    if not any(found):
        wanted = ", ".join(repr(word) for group in words for word in group)
        raise ValueError(
            f"none of the {len(top)} likeliest beginnings of the model's reply is one of {wanted}: "
            "put a question that these words answer, or let the model answer without thinking first"
        )
    return [float(np.logaddexp.reduce(logprobs)) if logprobs else least for logprobs in found]
