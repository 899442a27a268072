"""Checks that an answer passes or fails: the kind ``verifiable``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import regex
from pydantic import Field, field_validator, model_validator

from rewards.config.section import Scored


class RegexCheckConfig(Scored):
    """1 when a pattern is found in the answer, else 0."""

    kind: Literal["verifiable"]
    check: Literal["regex"]
    pattern: str = Field(min_length=1, description="As Python's `re`, with \\p{...}; (?i) inside.")
    match: Literal["search", "full"] = Field("search", description="full: the whole answer.")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        return _compiled(pattern, groups=())


class JsonSchemaCheckConfig(Scored):
    """1 when the answer is JSON that conforms to a JSON Schema, else 0."""

    kind: Literal["verifiable"]
    check: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema", description="2020-12 unless it says.")
    fence: bool = Field(
        True, description="Where the answer holds one ```json block, read that block alone."
    )

    @field_validator("json_schema")
    @classmethod
    def _is_schema(cls, schema: dict[str, Any]) -> dict[str, Any]:
        # Only now: most files have no schema.
        from rewards.models.verifiable import schema_validator

        schema_validator(schema)
        return schema


class NumberCheckConfig(Scored):
    """1 when the last number of the answer is the expected one, else 0."""

    kind: Literal["verifiable"]
    check: Literal["number"]
    expected: float | None = Field(None, allow_inf_nan=False)
    expected_from: str | None = Field(
        None, description="Pattern for the last user message; its group `expected` is the number."
    )
    tolerance: float = Field(0.0, ge=0, allow_inf_nan=False, description="Largest difference.")

    @field_validator("expected_from")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        return _compiled(pattern, groups=("expected",))

    @model_validator(mode="after")
    def _expects_one(self) -> NumberCheckConfig:
        if (self.expected is None) == (self.expected_from is None):
            raise ValueError("give either expected or expected_from, and not both")
        return self


class WordLimitsConfig(Scored):
    """1 when the answer has from min to max words, both counted in, else 0."""

    kind: Literal["verifiable"]
    check: Literal["words"]
    min: int | None = Field(None, ge=0)
    max: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _limits(self) -> WordLimitsConfig:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"no answer has {self.min} words or more and {self.max} or less")
        return self


class TermsCheckConfig(Scored):
    """Share of terms that the answer holds (required), or keeps away from (banned), in [0, 1]."""

    kind: Literal["verifiable"]
    check: Literal["required", "banned"]
    terms: list[str] = Field(description="Whole words or phrases; case does not matter.")

    @field_validator("terms")
    @classmethod
    def _are_terms(cls, terms: list[str]) -> list[str]:
        if not terms or not all(term.strip() for term in terms):
            raise ValueError("give at least one term, and none that is blank")
        folded = [" ".join(term.casefold().split()) for term in terms]
        for term in folded:
            if folded.count(term) > 1:
                raise ValueError(f"the term {term!r} stands twice; remove one")
        return terms


VerifiableConfig = Annotated[
    RegexCheckConfig
    | JsonSchemaCheckConfig
    | NumberCheckConfig
    | WordLimitsConfig
    | TermsCheckConfig,
    Field(discriminator="check"),
]


def _compiled(pattern: str, groups: Sequence[str]) -> str:
    """Return the pattern, when it compiles and has these groups."""
    try:
        found = regex.compile(pattern).groupindex
    except regex.error as error:
        raise ValueError(f"no valid pattern: {error}") from None
    for group in groups:
        if group not in found:
            raise ValueError(f"the pattern must name what it takes: (?P<{group}>...)")
    return pattern
