"""Kinds that need no model: counts, a lexicon, and what the sampler reported."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from rewards.config.section import Scored
from rewards.templates import parse


class LexicalConfig(Scored):
    """A measure of the answer's text."""

    LATER: ClassVar[frozenset[str]] = frozenset({"text"})

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
    text: str = Field("{answer}", description="Template of what is measured; must hold {answer}.")

    @field_validator("text")
    @classmethod
    def _has_answer(cls, text: str) -> str:
        if parse(text).fields.count("answer") != 1:
            raise ValueError("the text must hold {answer} once, for the answer is what is scored")
        return text


class VaderConfig(Scored):
    """Mood of an English answer in [-1, 1], by the VADER lexicon; needs the extra `sentiment`."""

    kind: Literal["vader"]


class SamplerLogprobConfig(Scored):
    """Log-likelihood of the answer under the model that wrote it, as the sampler reports it."""

    kind: Literal["sampler_logprob"]
    reduce: Literal["mean", "sum"] = Field("mean", description="mean: per token. sum: per answer.")
