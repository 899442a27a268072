"""Answers to questions about answers, as an upstream's replies tell them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewards import likeliest
from server.backends.base import UpstreamError


def n_prompt_tokens(reply: Any) -> int:
    """Return the tokens of the prompt, as the upstream counts them; 0 when it does not tell."""
    usage = reply.get("usage") if isinstance(reply, dict) else None
    told = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return told if isinstance(told, int) and told > 0 else 0


def answer_of(reply: Any, words: Sequence[Sequence[str]]) -> list[float]:
    """Return what `rewards.likeliest.answer_of` does.

    Raises
    ------
    UpstreamError
        When the reply tells no likeliest tokens.
    ValueError
        When no token belongs to any set.
    """
    try:
        return likeliest.answer_of(reply, words)
    except likeliest.NoLikeliestError as error:
        raise UpstreamError(
            f"asked about an answer, the upstream model server fails: {error}"
        ) from error
