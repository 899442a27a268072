"""How what a model gives becomes one number: the sections ``output`` and ``outputs``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from rewards.base import SCORE
from rewards.config.section import Name, Scored, Section


class OutputConfig(Section):
    """How the model's logits become one number. Raw logits unless said otherwise."""

    label: str | None = Field(None, description="Read the logit of this label (config.id2label).")
    index: int | None = Field(None, ge=0, description="Read the logit at this position.")
    margin: tuple[str | int, str | int] | None = Field(
        None, description="Read the first label's (or position's) logit minus the second's."
    )
    activation: Literal["none", "sigmoid", "softmax", "log_sigmoid"] = Field(
        "none",
        description="softmax: probabilities of all labels, before reading; the others after.",
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
        chosen = [name for name in ("label", "index", "margin") if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other; keep one of them")
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
