"""What clients align, and the file as a whole."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rewards.config.judge import JudgeConfig
from rewards.config.models import (
    CausalLmConfig,
    EmbeddingConfig,
    LikelihoodConfig,
    ProcessRewardConfig,
    SequenceClassifierConfig,
)
from rewards.config.outside import PythonConfig, RemoteConfig
from rewards.config.pooling import VllmPoolingConfig
from rewards.config.section import Name, Section
from rewards.config.text import LexicalConfig, SamplerLogprobConfig, VaderConfig
from rewards.config.transforms import TransformConfig
from rewards.config.verifiable import VerifiableConfig

ScorerConfig = Annotated[
    SequenceClassifierConfig
    | VllmPoolingConfig
    | CausalLmConfig
    | LikelihoodConfig
    | EmbeddingConfig
    | ProcessRewardConfig
    | LexicalConfig
    | SamplerLogprobConfig
    | RemoteConfig
    | PythonConfig
    | VaderConfig
    | JudgeConfig
    | VerifiableConfig,
    Field(discriminator="kind"),
]


class MessageConfig(Section):
    """One turn of a conversation."""

    role: str = Field(min_length=1)
    content: str


class CheckConfig(Section):
    """Two answers of which one has clearly more of a value: a test of sign, label and format."""

    prompt: str | None = Field(None, description="What the user says.")
    messages: list[MessageConfig] | None = Field(
        None, min_length=1, description="Instead of the prompt, a whole conversation."
    )
    better: str = Field(description="The answer that must get the higher number.")
    worse: str

    @model_validator(mode="after")
    def _differs(self) -> CheckConfig:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages, and not both")
        if self.better == self.worse:
            raise ValueError("better and worse are the same text; write two that differ")
        return self


class ValueConfig(Section):
    """What a client may align."""

    source: str | None = Field(
        None,
        alias="from",
        description="The scorer that measures it; `scorer.output` of one that has several outputs.",
    )
    mix: dict[str, float] | None = Field(
        None,
        min_length=1,
        description="Instead of `from`: several of those, with the weights of their sum.",
    )
    watch: str | None = Field(
        None,
        description="A held-out scorer (or scorer.output) of the same value. It is reported and "
        "never optimised: when it falls while the value rises, the reward is being gamed.",
    )
    description: str = Field("", description="What a higher number means; shown to clients.")
    transform: TransformConfig | None = Field(
        None, description="What is done to the numbers before they are aligned."
    )
    unit: str = Field("score", description="Unit of the numbers; shown to clients.")
    check: list[CheckConfig] = Field(
        [],
        description="Pairs of answers that are scored at the start, which ends where the worse one "
        "does not get the lower number: a wrong sign, label or format raises no other error.",
    )

    @model_validator(mode="after")
    def _is_measured(self) -> ValueConfig:
        if (self.source is None) == (self.mix is None):
            raise ValueError("say what measures it: either from or mix, and not both")
        for source, weight in (self.mix or {}).items():
            if not math.isfinite(weight) or weight == 0:
                raise ValueError(f"the weight of {source} is {weight}; it must be finite, not 0")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Its sources, as ``scorer`` or ``scorer.output``, with their weights."""
        return {self.source: 1.0} if self.source is not None else dict(self.mix or {})


class RewardsConfig(Section):
    """A rewards file."""

    version: Literal[1]
    scorers: dict[Name, ScorerConfig] = Field(min_length=1)
    values: dict[Name, ValueConfig] = Field(min_length=1)
