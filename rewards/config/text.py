"""Kinds that need no model: counts, a lexicon, and what the sampler reported."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rewards.config.section import Scored


class LexicalConfig(Scored):
    """A measure of the answer's text."""

    kind: Literal["lexical"]
    measure: Literal[
        "characters",
        "sentences",
        "flesch_reading_ease",
        "diversity",
        "repetition",
        "words",
        "lexical_diversity",
    ]


class VaderConfig(Scored):
    """Mood of an English answer in [-1, 1], by the VADER lexicon; needs the extra `sentiment`."""

    kind: Literal["vader"]


class SamplerLogprobConfig(Scored):
    """Log-likelihood of the answer under the model that wrote it, as the sampler reports it."""

    kind: Literal["sampler_logprob"]
    reduce: Literal["mean", "sum"] = Field("mean", description="mean: per token. sum: per answer.")
