"""Questions about answers, as chat completions of one token with its likeliest alternatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rewards import Message, Sample
from server.backends.base import UpstreamError

# OpenAI's own limit.
_N_TOP = 20


def question_fields(sample: Sample, question: str) -> dict[str, Any]:
    """Return the fields of a request that asks about an answer."""
    return {
        "messages": [
            *sample.messages,
            Message(role="assistant", content=sample.answer),
            Message(role="user", content=question),
        ],
        "logprobs": True,
        "top_logprobs": _N_TOP,
    }


def n_prompt_tokens(reply: Any) -> int:
    """Return the tokens of the prompt, as the upstream counts them; 0 when it does not tell."""
    usage = reply.get("usage") if isinstance(reply, dict) else None
    told = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return told if isinstance(told, int) and told > 0 else 0


def answer_of(reply: Any, words: Sequence[Sequence[str]]) -> list[float]:
    """Return the log-probability that the reply begins with a word of each set, in nats.

    A token counts for the words that begin with it, unless they are of two sets. A set that none of
    the tokens told belongs to has the probability of the least likely one: it has no more.

    Raises
    ------
    UpstreamError
        When the reply tells no likeliest tokens.
    ValueError
        When no token belongs to any set.
    """
    try:
        entry = reply["choices"][0]["logprobs"]["content"][0]
        top = {one["token"]: float(one["logprob"]) for one in entry["top_logprobs"]}
        least = min(top.values())
    except (KeyError, IndexError, TypeError, ValueError) as error:
        msg = (
            "the upstream model server does not tell the likeliest first tokens (top_logprobs), so "
            "its model cannot judge"
        )
        raise UpstreamError(msg) from error
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
