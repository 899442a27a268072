"""Better and worse answers: whether a value tells them apart, and which mistake is likely if not.

A wrong sign, label or input format raises no error: the scores are numbers like any others. A pair
of answers of which one clearly has more of the value shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rewards.base import FloatArray, Message, Sample, Scorer
from rewards.columns import Column
from rewards.config import CheckConfig, MessageConfig

# Closer than this, relative to one plus the score, two answers were read as one text.
_SAME = 1e-4


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one conversation; the better one must get the higher number."""

    better: Sample
    worse: Sample


def make_pair(config: CheckConfig) -> Pair:
    """Return the pair of an entry of the file."""
    said = config.messages or [MessageConfig(role="user", content=config.prompt or "")]
    messages = tuple(Message(role=one.role, content=one.content) for one in said)
    return Pair(Sample(messages, config.better), Sample(messages, config.worse))


def samples_of(pairs: Sequence[Pair]) -> list[Sample]:
    """Return better, worse, better, worse, ..."""
    return [sample for pair in pairs for sample in (pair.better, pair.worse)]


def unscorable(column: Column, scorers: Mapping[str, Scorer]) -> str | None:
    """Return why pairs cannot be scored, or None when they can."""
    if any(scorers[name].needs_logprobs for name in column.scorers):
        return (
            "it reads what the sampler reports of its own answers, which answers of a file lack; "
            "leave check out"
        )
    return None


def find_problem(
    column: Column, scorers: Mapping[str, Scorer], pairs: Sequence[Pair], scores: FloatArray
) -> str | None:
    """Return what is wrong when a worse answer scores no lower, with the likely cause; else None.

    Parameters
    ----------
    column : Column
    scorers : mapping of str to Scorer
        Loaded; called here, so this runs on the thread that owns the device.
    pairs : sequence of Pair
    scores : ndarray, shape (2 n_pairs,)
        Of `samples_of` the pairs.
    """
    if _is_right(scores):
        return None
    gaps = scores[::2] - scores[1::2]
    row = int(np.argmax(gaps <= 0))
    better, worse = scores[2 * row : 2 * row + 2]
    wrong = f"pair {row + 1}: the better answer has {better:.4g}, the worse one {worse:.4g}"
    settings = _better_settings(column, scorers, pairs, scores)
    if settings:
        return f"{wrong}. Every pair comes out right with {' or with '.join(settings)}"
    if abs(gaps[row]) <= _SAME * (1.0 + abs(better)):
        return (
            f"{wrong}: both are read as one text. Correct the input, which may lack {{answer}} or "
            "what tells the two apart, or raise max_length, which may cut it off"
        )
    return (
        f"{wrong}. No other sign, label or view puts every pair right; correct the pair, or use "
        "another model"
    )


def _better_settings(
    column: Column, scorers: Mapping[str, Scorer], pairs: Sequence[Pair], scores: FloatArray
) -> list[str]:
    """Return what, written in the file instead, would put every pair right."""
    if _is_right(-scores):
        found = ["the sign turned round (sign: -1, or a margin the other way)"]
    else:
        found = []
    if len(column.terms) > 1:
        return found
    others = scorers[column.terms[0].scorer].alternatives(samples_of(pairs))
    return [*found, *(setting for setting, given in others.items() if _is_right(given))]


def _is_right(scores: FloatArray) -> bool:
    return bool(np.all(scores[::2] > scores[1::2]))
