"""Answers to questions about answers, as an upstream's replies tell them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewards import likeliest
from server.backends.base import UpstreamError


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
