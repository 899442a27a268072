"""What is done to a value's numbers before they are aligned: the section ``transform``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rewards.config.section import Section


class TransformConfig(Section):
    """Steps between what is measured and what is aligned, always in the order of these fields.

    Standardising is none of them: the solver standardises every value by itself, and targets and
    reports stay in the value's own unit.
    """

    log_odds: bool = Field(
        False, description="log p − log(1 − p): for a source that gives probabilities only."
    )
    length_control: bool = Field(
        False,
        description="Take out what goes with the answer's length among answers to one prompt "
        "(a slope on log(1 + words), fitted on the calibration).",
    )
    centre: bool = Field(
        False,
        description="Count from the mean of the candidates of the same prompt. For scores that "
        "mean nothing across prompts (Bradley-Terry): levels then read as gains over the base "
        "model, and answers stay what they are.",
    )
    clip: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Largest distance from the base mean, in standard deviations within a prompt.",
    )
    shape: Literal["log_sigmoid", "quantile"] | None = Field(
        None,
        description="log_sigmoid: log σ(r − reference), which stops paying for what is good "
        "already. quantile: the share of the base model's answers that score less.",
    )
    reference: float = Field(
        0.85,
        gt=0,
        lt=1,
        description="For log_sigmoid: the quantile, within prompts, of the base model's rewards "
        "that counts as good.",
    )

    @model_validator(mode="after")
    def _keeps_promises(self) -> TransformConfig:
        if self.centre and (self.clip is not None or self.shape is not None):
            raise ValueError(
                "centre cannot be bent by clip or shape: the mean of a request's N candidates "
                "scatters otherwise than that of the calibration's, and what is promised would "
                "not be what is served; leave centre out (answers do not change)"
            )
        if "reference" in self.model_fields_set and self.shape != "log_sigmoid":
            raise ValueError("a reference is for shape: log_sigmoid only; leave it out")
        return self

    @property
    def is_pointwise(self) -> bool:
        """Whether an answer's number is a function of its reward alone."""
        return not (self.length_control or self.centre)
