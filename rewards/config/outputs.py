"""How what a model gives becomes one number: the sections ``output`` and ``outputs``."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from rewards.base import SCORE
from rewards.config.section import Name, Scored, Section


class OutputConfig(Section):
    """How the model's logits become one number. Raw logits unless said otherwise.

    The raw logit of a label is its log-odds already where labels do not exclude each other
    (multi-label models, trained with a sigmoid for each). Where they do (softmax), that is
    ``activation: log_odds``.
    """

    LATER: ClassVar[frozenset[str]] = frozenset({"expect", "attribute"})

    label: str | None = Field(None, description="Read the logit of this label (config.id2label).")
    index: int | None = Field(None, ge=0, description="Read the logit at this position.")
    margin: tuple[str | int, str | int] | None = Field(
        None, description="Read the first label's (or position's) logit minus the second's."
    )
    expect: dict[str, float] | None = Field(
        None,
        min_length=2,
        description="A number for each label: read their mean, weighted with the softmax "
        "probabilities. For ordered classes.",
    )
    attribute: str | None = Field(
        None,
        description="Read this attribute of what the model's own code gives, instead of its "
        "logits: rewards, score, ... An index chooses among several numbers.",
    )
    activation: Literal["none", "sigmoid", "softmax", "log_sigmoid", "log_odds"] = Field(
        "none",
        description="softmax: probabilities of all labels, before reading; sigmoid, log_sigmoid: "
        "after. log_odds: log p - log(1 - p) of the label among all, from the logits.",
    )
    sign: Literal[1, -1] = Field(1, description="-1 when a lower number is more of the value.")

    @field_validator("margin", mode="before")
    @classmethod
    def _as_tuple(cls, margin: object) -> object:
        if isinstance(margin, list) and len(margin) != 2:
            raise ValueError("a margin takes two labels (or positions): [wanted, unwanted]")
        return tuple(margin) if isinstance(margin, list) else margin

    @model_validator(mode="after")
    def _reads_one(self) -> OutputConfig:
        readings = ("label", "index", "margin", "expect")
        chosen = [name for name in readings if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other; keep one of them")
        if self.expect is not None and self.activation != "none":
            raise ValueError("expect takes the softmax by itself; leave activation out")
        if self.activation == "log_odds" and self.label is None and self.index is None:
            raise ValueError("log_odds are those of one label; set label or index")
        for label, number in (self.expect or {}).items():
            if not math.isfinite(number):
                raise ValueError(f"the number of {label} is {number}; it must be finite")
        if self.attribute is None:
            return self
        if not self.attribute.isidentifier() or self.attribute.startswith("_"):
            raise ValueError(f"{self.attribute!r} is no name of an attribute")
        if self.activation in ("softmax", "log_odds") or not {*chosen} <= {"index"}:
            raise ValueError("of an attribute, only an index can be read, and no softmax be taken")
        return self


class ReadsOutputs(Scored):
    """A scorer whose model gives one or several numbers."""

    output: OutputConfig = Field(OutputConfig(), description="How its one number is read.")
    outputs: dict[Name, OutputConfig] | None = Field(
        None,
        min_length=1,
        description="Several numbers of one pass, by name: a value then comes from scorer.name.",
    )

    @model_validator(mode="after")
    def _one_way(self) -> ReadsOutputs:
        if self.outputs is not None and "output" in self.model_fields_set:
            raise ValueError("output and outputs exclude each other; keep one of them")
        return self

    @property
    def reads(self) -> dict[str, OutputConfig]:
        """How each output is read."""
        return {SCORE: self.output} if self.outputs is None else self.outputs

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of its outputs."""
        return tuple(self.reads)
